"""The `bigtx` command table. A command's module is imported only when the command is called."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Callable, Iterable, Sequence

from bigtx import __version__
from bigtx.utils.errors import EXIT_USER_ERROR, exit_cleanly
from bigtx.utils.processes import share_cores

COMMANDS: dict[str, tuple[str, str]] = {
    "tokenizer train": ("bigtx.commands.tokenizer:train_command", "train a sentencepiece tokenizer on text files"),
    "tokenizer import": ("bigtx.commands.tokenizer:import_command", "take over a tokenizer made elsewhere"),
    "tokenizer inspect": ("bigtx.commands.tokenizer:inspect_command", "show what a tokenizer makes of texts"),
    "data prepare": ("bigtx.commands.data:prepare_command", "turn text files into tokenized shards"),
    "data merge": ("bigtx.commands.data:merge_command", "make one corpus of the parts of a preparation"),
    "data inspect": ("bigtx.commands.data:inspect_command", "show a prepared corpus: shards, counts, decoded samples"),
    "data stats": ("bigtx.commands.data:stats_command", "show a prepared corpus in figures"),
    "data verify": ("bigtx.commands.data:verify_command", "read all of a prepared corpus and check it"),
    "generate": ("bigtx.commands.generate:command", "continue prompts with a trained model"),
    "chat": ("bigtx.commands.chat:command", "talk with a model that was trained on chats"),
    "predict": ("bigtx.commands.predict:command", "say what a fine-tuned model makes of records"),
    "evaluate": ("bigtx.commands.evaluate:command", "measure a run on held-out data"),
    "import": ("bigtx.commands.interop:import_command", "make a run of a Hugging Face model"),
    "export": ("bigtx.commands.interop:export_command", "write a run as a Hugging Face model"),
    "configs list": ("bigtx.commands.configs:list_command", "show the recipes that come with bigtx"),
    "configs copy": ("bigtx.commands.configs:copy_command", "copy a recipe, to change it"),
    "configs explain": ("bigtx.commands.configs:explain_command", "say what a setting means"),
}
TRAINING = """To train (--help says more):
  deepspeed --module bigtx.pretrain FILE.yaml KEY=VALUE ...   from text to a model
  bigtx-finetune FILE.yaml base=RUN KEY=VALUE ...             from a model to one that does a job"""


@exit_cleanly
def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: without the program's name; None takes the process's own.

    Returns:
        The exit status.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    for length in (1, 2):
        command = COMMANDS.get(" ".join(arguments[:length]))
        if command:
            share_cores()
            return _resolve(command[0])(arguments[length:])
    return _answer(arguments)


def _resolve(place: str) -> Callable[[Sequence[str]], int]:
    module, _, name = place.partition(":")
    function: Callable[[Sequence[str]], int] = getattr(importlib.import_module(module), name)
    return function


def _answer(arguments: list[str]) -> int:
    """What is no command: a request for help or the version, or a mistake."""
    first = arguments[0] if arguments else "--help"
    if first == "--version":
        print(f"bigtx {__version__}")
        return 0
    if first in ("-h", "--help"):
        print(f"usage: bigtx COMMAND ...\n\nFrom text to a trained Transformer.\n\n{_table(COMMANDS)}\n\n{TRAINING}")
        return 0
    group = [name for name in COMMANDS if name.split()[0] == first]
    if group and set(arguments[1:]) <= {"-h", "--help"}:
        print(f"usage: bigtx {first} COMMAND ...\n\n{_table(group)}")
        return 0
    written = " ".join([first, *arguments[1:2]] if group else [first])
    similar = difflib.get_close_matches(written, group or COMMANDS, 1) or group
    hint = f"did you mean bigtx {' or '.join(similar)}?" if similar else "`bigtx --help` shows all commands"
    print(f"bigtx: no command {written!r}; {hint}", file=sys.stderr)
    if first in ("pretrain", "train", "finetune"):
        print(TRAINING, file=sys.stderr)
    return EXIT_USER_ERROR


def _table(names: Iterable[str]) -> str:
    width = max(map(len, COMMANDS)) + 2
    return "\n".join(f"  bigtx {name:<{width}}{COMMANDS[name][1]}" for name in names)
