"""The table of the `bigtx` commands. A command's module is imported only when the command is called."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NoReturn

from bigtx import __version__
from bigtx.config.runs import find_config, similar_configs
from bigtx.utils import shell
from bigtx.utils.errors import ConfigError, exit_cleanly
from bigtx.utils.processes import share_cores
from bigtx.utils.secrets import scrub_text

MEANT = {
    "train": "`bigtx pretrain` trains a model on prepared corpora, `bigtx finetune` one on records for a task",
    "resume": "`bigtx pretrain RUN` or `bigtx finetune RUN` resumes a run",
    "tokenize": "`bigtx tokenizer train` makes a tokenizer, `bigtx data prepare` tokenizes texts",
    "preprocess": "`bigtx data prepare` turns text files into tokenized shards",
    "sft": "`bigtx finetune finetune/chat.yaml` trains on chats",
    "dpo": "`bigtx finetune finetune/dpo.yaml` trains on pairs of answers",
    "lora": "`bigtx finetune FILE model.lora.rank=8` trains adapters",
    "sample": "`bigtx generate` continues prompts",
    "infer": "`bigtx generate` continues prompts, `bigtx predict` predicts for records",
    "inference": "`bigtx generate` continues prompts, `bigtx predict` predicts for records",
    "serve": "there is no server; `bigtx generate` and `bigtx predict` process files, `bigtx export` writes a model "
    "for servers that read Hugging Face's format",
    "eval": "`bigtx evaluate` measures a run on held-out data",
    "test": "`bigtx evaluate` measures a run on held-out data",
    "validate": "`bigtx evaluate` measures a run on held-out data, `bigtx data verify` checks a corpus",
    "convert": "`bigtx import` and `bigtx export` convert from and to Hugging Face's format",
    "push": "`bigtx export` writes a folder in Hugging Face's format; nothing is uploaded",
    "plot": "there are no plots here; the metrics are in RUN/metrics.jsonl, and charts are in W&B",
    "metrics": "the metrics are in RUN/metrics.jsonl, and charts are in W&B",
    "logs": "the metrics are in RUN/metrics.jsonl, the logs of the ranks in RUN/logs",
    "config": "`bigtx configs list` lists the recipes, `bigtx configs explain` explains the settings",
    "recipes": "`bigtx configs list` lists the recipes",
    "init": "`bigtx configs copy` copies a recipe, to change it",
}
"""Names of commands in other programs, or names that are too different from ours for a comparison of letters."""
USES = {"pretrain": "bigtx pretrain", "finetune": "bigtx finetune", "model": "bigtx pretrain FILE"}
"""The command that takes a recipe, by the recipe's folder."""
_TOKENIZER = "tokenizer"


def suggest(words: Sequence[str], commands: Sequence[str]) -> str:
    """Return a sentence about a command line that does not begin with a command.

    Args:
        words: the words of the command line, at least one.
        commands: the names of all commands.
    """
    first = words[0]
    members = [name.split()[1] for name in commands if name.startswith(f"{first} ")]
    if members:
        member = words[1] if len(words) > 1 else ""
        similar = difflib.get_close_matches(member, members, 2, 0.5)
        meant = f"did you mean {_either(f'{first} {name}' for name in similar)}?" if similar else ""
        written = scrub_text(f"{first} {member}".rstrip())
        return f"no command {written!r}; {meant or f'`bigtx {first}` has {_listed(members)}'}"
    if first.endswith((".yaml", ".yml")) and find_config(first) is not None:
        lines = " or ".join(f"{use} {shell.command(*words)}" for use in _uses(first))
        return f"{first} is a file of settings, not a command; write {lines}"
    return f"no command {scrub_text(first)!r}; {_meant(words, commands)}"


def _meant(words: Sequence[str], commands: Sequence[str]) -> str:
    """Suggest what a word may mean: a name in another program, a command, the second word of one, or a recipe."""
    name = words[0].lower().replace("_", "-")
    if name in MEANT:
        return MEANT[name]
    seconds = [known.split()[1] for known in commands if " " in known]
    firsts = list(dict.fromkeys(known.split()[0] for known in commands))
    if similar := difflib.get_close_matches(" ".join([name, *words[1:2]]), commands, 1, 0.85):
        return f"did you mean {_either(similar)}?"
    if similar := difflib.get_close_matches(name, firsts, 1, 0.7):
        return f"did you mean {_either(similar)}?"
    if similar := difflib.get_close_matches(name, MEANT, 1, 0.8):
        return MEANT[similar[0]]
    if similar := difflib.get_close_matches(name, seconds, 1, 0.75):
        return f"did you mean {_either(known for known in commands if known.endswith(f' {similar[0]}'))}?"
    if recipes := similar_configs(words[0]):
        return f"did you mean {' or '.join(f'{use} {recipe}' for recipe in recipes for use in _uses(recipe))}?"
    return "`bigtx help` shows all commands"


def _uses(name: str) -> list[str]:
    """Return the commands that take a file of settings, judging by its folder and name."""
    folder = Path(name).parent.name
    if folder == "data":
        return ["bigtx tokenizer train" if _TOKENIZER in Path(name).name else "bigtx data prepare"]
    return [USES[folder]] if folder in USES else ["bigtx pretrain", "bigtx finetune"]


def _either(names: Iterable[str]) -> str:
    return " or ".join(f"bigtx {name}" for name in names)


def _listed(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}"


COMMANDS: dict[str, tuple[str, str]] = {
    "tokenizer train": ("bigtx.commands.tokenizer:train_command", "train a sentencepiece tokenizer on text files"),
    "tokenizer import": ("bigtx.commands.tokenizer:import_command", "import a tokenizer made elsewhere"),
    "tokenizer inspect": ("bigtx.commands.tokenizer:inspect_command", "show how a tokenizer encodes texts"),
    "data prepare": ("bigtx.commands.data:prepare_command", "turn text files into tokenized shards"),
    "data merge": ("bigtx.commands.data:merge_command", "merge the parts of a preparation into one corpus"),
    "data inspect": ("bigtx.commands.data:inspect_command", "show a corpus: shards, counts, decoded samples"),
    "data stats": ("bigtx.commands.data:stats_command", "show statistics of a prepared corpus"),
    "data verify": ("bigtx.commands.data:verify_command", "read all of a prepared corpus and check it"),
    "pretrain": ("bigtx.pretrain:main", "train a model on prepared corpora"),
    "finetune": ("bigtx.finetune:main", "train a model on records, for a task"),
    "doctor": ("bigtx.commands.doctor:command", "check whether machines are fit to train"),
    "slurm submit": ("bigtx.commands.slurm:submit_command", "submit a job to a SLURM cluster"),
    "slurm render": ("bigtx.commands.slurm:render_command", "print the batch script of a job"),
    "slurm status": ("bigtx.commands.slurm:status_command", "show the starts and jobs of a run"),
    "generate": ("bigtx.commands.generate:command", "continue prompts with a trained model"),
    "chat": ("bigtx.commands.chat:command", "chat with a model that was trained on chats"),
    "predict": ("bigtx.commands.predict:command", "predict for records with a fine-tuned model"),
    "evaluate": ("bigtx.commands.evaluate:command", "measure a run on held-out data"),
    "import": ("bigtx.commands.interop:import_command", "turn a Hugging Face model into a run"),
    "export": ("bigtx.commands.interop:export_command", "write a run as a Hugging Face model"),
    "configs list": ("bigtx.commands.configs:list_command", "list the recipes that come with bigtx"),
    "configs show": ("bigtx.commands.configs:show_command", "print a recipe"),
    "configs copy": ("bigtx.commands.configs:copy_command", "copy a recipe, to change it"),
    "configs plan": ("bigtx.commands.configs:plan_command", "estimate the memory and time of a pretraining"),
    "configs explain": ("bigtx.commands.configs:explain_command", "explain a setting"),
    "help": ("bigtx.cli:help_command", "explain a command and its options"),
    "version": ("bigtx.cli:version_command", "print the version (--json: also of packages)"),
}
HEADINGS = {
    "From text to data": ("tokenizer", "data"),
    "Training": ("pretrain", "finetune"),
    "On a cluster": ("doctor", "slurm"),
    "Using a model": ("generate", "chat", "predict", "evaluate", "import", "export"),
}
"""Groups of commands, by their first words; all other commands are shown at the end, as `OTHER`."""
OTHER = "Other"


@exit_cleanly
def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the arguments without the program's name; None takes those of the process.

    Returns:
        The exit status.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    first, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if first in ("-h", "--help"):
        return help_command(rest)
    if first == "--version":
        return version_command(rest)
    if set(rest) <= {"-h", "--help"} and _members(first):
        return help_command([first])
    name = _command(arguments)
    if name is None:
        _refuse(arguments)
    share_cores()
    return _resolve(name)(arguments[len(name.split()) :])


def help_command(argv: Sequence[str]) -> int:
    """Explain a command or a group of commands, or list all commands.

    Raises:
        ConfigError: there is no such command.
    """
    words = [word for word in argv if word not in ("-h", "--help")]
    name = _command(words)
    if not words:
        print(f"usage: bigtx COMMAND [NAME=VALUE ...]\n\n{_all_commands()}\n")
        print("`bigtx help COMMAND` shows the options of a command.")
    elif name == "help":
        print("usage: bigtx help [COMMAND]\n\nExplain a command and its options, as `bigtx COMMAND --help` does.")
    elif name is not None:
        return _resolve(name)(["--help"])
    elif members := _members(" ".join(words)):
        print(f"usage: bigtx {words[0]} COMMAND [NAME=VALUE ...]\n\n{_table(members)}")
    else:
        _refuse(words)
    return 0


def version_command(argv: Sequence[str]) -> int:
    """Print the version; with `--json` also those of Python and packages, which are not imported."""
    from bigtx.utils.arguments import Arguments

    parser = Arguments(prog="bigtx version", description="Print the version; as JSON also those of packages.")
    parser.add_json()
    if not parser.parse_args(argv).json:
        print(f"bigtx {__version__}")
        return 0
    import platform

    from bigtx.utils.hardware import packages
    from bigtx.utils.log import say_json

    say_json(packages() | {"python": platform.python_version()})
    return 0


def _command(words: Sequence[str]) -> str | None:
    """Return the command that a command line begins with, if any."""
    return next((name for length in (1, 2) if (name := " ".join(words[:length])) in COMMANDS), None)


def _members(group: str) -> list[str]:
    """Return the commands of a group: those of two words whose first word it is."""
    return [name for name in COMMANDS if name.startswith(f"{group} ")]


def _resolve(name: str) -> Callable[[Sequence[str]], int]:
    module, _, function = COMMANDS[name][0].partition(":")
    command: Callable[[Sequence[str]], int] = getattr(importlib.import_module(module), function)
    return command


def _refuse(words: Sequence[str]) -> NoReturn:
    """Refuse a command line and say which command was probably meant.

    Raises:
        ConfigError: always.
    """

    raise ConfigError(suggest(words, list(COMMANDS)))


def _all_commands() -> str:
    first_words = {word: heading for heading, words in HEADINGS.items() for word in words}
    parts = []
    for heading in (*HEADINGS, OTHER):
        names = [name for name in COMMANDS if first_words.get(name.split()[0], OTHER) == heading]
        parts.append(f"{heading}:\n{_table(names)}")
    return "\n".join(parts)


def _table(names: Iterable[str]) -> str:
    width = max(map(len, COMMANDS)) + 2
    return "\n".join(f"  {name:<{width}}{COMMANDS[name][1]}" for name in names)
