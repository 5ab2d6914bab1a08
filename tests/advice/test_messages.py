"""All advice in the source is followed by a test, and what messages name is there."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import pytest
from advice.messages import OPTIONS, PACKAGE, Message, advice, constants, messages
from advice.test_advice_followed import CASES
from config.test_advice import CASES as CONFIG_CASES
from config.test_advice import places  # noqa: F401 - a fixture

from bigtx.cli import COMMANDS, main
from bigtx.commands.suggestions import MEANT
from bigtx.config.load import load
from bigtx.config.schema import FinetuneConfig, PrepareConfig, PretrainConfig, TokenizerTrainConfig
from bigtx.config.settings import find, leaves
from bigtx.utils.errors import ConfigError

NO_ADVICE = "names a command or a setting, and advises nothing that could be copied"
NEEDS_A_MACHINE = "needs a machine or a program that tests do not have"
FOLLOWED_ON_A_CLUSTER = "followed by tests/slurm and tests/test_slurm_command.py"
EXCEPTIONS: Mapping[str, str] = {
    "`bigtx configs list`. `bigtx configs explain KEY` explains": "the usage of commands with settings",
    "`bigtx help COMMAND` shows the options of a command": "the usage of bigtx",
    "usage: bigtx help [COMMAND]": "the usage of bigtx",
    "pretrain pretrain/gpt-125m.yaml data.sources.mine.path=corpus": "the usage of bigtx slurm",
    "tokenize only part I of N": "the usage of bigtx data prepare",
    "finetune/imdb.yaml base=runs/mine data.train=reviews": "the usage of bigtx finetune",
    "did you mean --ranks N?": "a launch of ranks, which these cases do not start",
    "; /help shows the commands, Ctrl-D ends the chat": "tests/test_chat.py does so on a terminal",
    "(train.min_steps={train.min_steps}, since train.epochs=": NO_ADVICE,
    " would hold out fewer than ": NO_ADVICE,
    "it is an encoder; `bigtx finetune` trains it for a task": NO_ADVICE,
    "CORPUS is the output folder of a": NO_ADVICE,
    " is not a manifest of `bigtx data prepare`": NO_ADVICE,
    "Another `bigtx data` command is writing": NO_ADVICE,
    " exists and is not a corpus of `bigtx data prepare`": NO_ADVICE,
    "is neither a mapping nor a text; write {": NO_ADVICE,
    "exact and fast resume needs prepared shards": NO_ADVICE,
    "`bigtx data prepare` lists such samples and reads the others": NO_ADVICE,
    "the corpora have no held-out text; prepare": NO_ADVICE,
    "write it again, e.g. ffmpeg": NEEDS_A_MACHINE,
    "raise it (ulimit -Hn)": NEEDS_A_MACHINE,
    "It was fetched twice; check the shard": NEEDS_A_MACHINE,
    "is not supported by this machine's": NEEDS_A_MACHINE,
    "next: {command('bigtx', 'slurm', 'status'": FOLLOWED_ON_A_CLUSTER,
    "to stop it with a checkpoint and resume it later": FOLLOWED_ON_A_CLUSTER,
    "to cancel it: {command('scancel'": FOLLOWED_ON_A_CLUSTER,
    "this SLURM job has {nodes} nodes": FOLLOWED_ON_A_CLUSTER,
    "srun has started {nodes} copies": FOLLOWED_ON_A_CLUSTER,
    "print the script with `bigtx slurm render`": FOLLOWED_ON_A_CLUSTER,
    ": write a number of nodes, e.g. {name}=2": FOLLOWED_ON_A_CLUSTER,
    "the machines of this run start different ranks": NEEDS_A_MACHINE,
    "; write pip install '{wanted}'": NEEDS_A_MACHINE,
    "; write ulimit -n {": NEEDS_A_MACHINE,
    "docker run --shm-size=8g": NEEDS_A_MACHINE,
    "is nearly out of memory: at most": NEEDS_A_MACHINE,
    "bigtx doctor starts its own ranks": FOLLOWED_ON_A_CLUSTER,
    "have the same GPU ({gpu})": NEEDS_A_MACHINE,
    "if another run uses that port": NEEDS_A_MACHINE,
    "has no device of its own": NEEDS_A_MACHINE,
    "no API key (see `wandb login`)": NEEDS_A_MACHINE,
    "run `wandb login --host {host}`, or set WANDB_API_KEY": NEEDS_A_MACHINE,
    "unset WANDB_MODE, which says so": "tests/track/test_sync.py",
    "`bigtx wandb sync` is sending this run": NO_ADVICE,
    "as many as --ranks says": NEEDS_A_MACHINE,
    "another launcher has started the ranks already": "tests/launch/test_world.py",
    " has too many evaluations called ": "needs 10,000 files",
    "the run transcribes recordings and reads no prompts": "as of a model that sorts texts",
    "the plan covers only decoders in 16 bits": "it refuses what a recipe asks for, and names what measures that",
    "the model reads audio (model.audio), but only models of tokens": "as of a model that sorts texts",
}
"""What no case follows, by words of it, and why."""


SCHEMAS = (PretrainConfig, FinetuneConfig, PrepareConfig, TokenizerTrainConfig)
SECTIONS = sorted({setting.key.split(".")[0] for schema in SCHEMAS for setting in leaves(schema) if "." in setting.key})
SETTING = re.compile(rf"(?<![\w./{{'-])(?:{'|'.join(SECTIONS)})(?:\.[a-z_]+)+(?![\w(./{{])")
COMMAND = re.compile(r"`bigtx ([a-z]+)(?: ([a-z]+))?")


def test_each_advice_is_followed(places: Path) -> None:  # noqa: F811
    """A new message that advises something needs a case in this folder, or a reason above."""
    followed = [words for case in CASES for words in case.sources]
    said = [_said(schema, arguments) for schema, arguments in CONFIG_CASES]
    left = [
        f"{message.place}: {message.text}"
        for message in advice()
        if message.text.removeprefix("bigtx ") not in COMMANDS
        and message.text not in MEANT.values()
        and not any(words in message.text for words in [*followed, *EXCEPTIONS])
        and not any(_pattern(message).search(text) for text in said)
    ]
    assert not left, "\n".join(left)


def _said(schema: type, arguments: list[str]) -> str:
    with pytest.raises(ConfigError) as caught:
        load(schema, arguments)
    return str(caught.value)


def _pattern(message: Message) -> re.Pattern[str]:
    """What a text of the source looks like once its braces are filled in."""
    pieces, depth = [""], 0
    for sign in message.text:
        depth += sign == "{"
        if not depth:
            pieces[-1] += sign
        elif sign == "}" and depth == 1:
            pieces.append("")
        depth -= sign == "}"
    if not any(len(piece) > 5 for piece in pieces):
        return re.compile(r"(?!)")  # It says too little of its own to be told from others.
    return re.compile(".*".join(map(re.escape, pieces)), re.DOTALL)


def test_what_messages_name_is_there() -> None:
    known = {*COMMANDS, *(name.split()[0] for name in COMMANDS), "pretrain", "finetune"}
    wrong = []
    for place, text in messages():
        for key in SETTING.findall(text):
            if not any(find(schema, key) for schema in SCHEMAS):
                wrong.append(f"{place}: {key}")
        for first, second in COMMAND.findall(text):
            if first not in known or (f"{first} {second}" not in known and first not in COMMANDS and second):
                wrong.append(f"{place}: bigtx {first} {second}")
    assert not wrong, "\n".join(wrong)


def test_what_other_programs_call_a_command_leads_to_ours(capsys: pytest.CaptureFixture[str]) -> None:
    named = {command for text in MEANT.values() for command in re.findall(r"`(bigtx [^`]+)`", text)}
    assert len(named) > 10
    for command in named:
        words = command.removeprefix("bigtx ").replace("FILE", "finetune/chat.yaml").split()
        try:
            assert main([*words, "--help"]) == 0, command
        except SystemExit as end:
            assert not end.code, command


def test_options_are_shown_as_name_and_value() -> None:
    """A dash is for switches: no text says `--output FILE` or `-o FILE`."""
    names = "|".join(OPTIONS).replace("_", "[_-]")
    dashed = re.compile(rf"(?<![\w-])(?:--(?:{names})(?![\w-])|-o (?=[A-Z]))")
    wrong = [f"{place}: {text}" for place, text in constants() if dashed.search(text)]
    assert not wrong, "\n".join(wrong)


def test_numbers_of_settings_are_shown_as_they_are_written() -> None:
    """A setting of 1,024 would be read as a text."""
    grouped = re.compile(r"\b[a-z_]+\.?[a-z_.]+=\{[^{}]*:,\}")
    found = [path.name for path in PACKAGE.rglob("*.py") if grouped.search(path.read_text(encoding="utf-8"))]
    assert not found


def test_each_exception_is_needed() -> None:
    texts = [message.text for message in advice()]
    assert [words for words in EXCEPTIONS if not any(words in text for text in texts)] == []
