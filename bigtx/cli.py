"""The table of the `bigtx` commands. A command's module is imported only when the command is called."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from typing import NoReturn

from bigtx import __version__
from bigtx.utils import imported
from bigtx.utils.errors import ConfigError, exit_cleanly
from bigtx.utils.processes import extend_segments, share_cores

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
    "checkpoints": ("bigtx.commands.checkpoints:command", "show, check or prune the checkpoints of a run"),
    "wandb sync": ("bigtx.commands.wandb:sync_command", "send to W&B what it does not have of runs"),
    "doctor": ("bigtx.commands.doctor:command", "check whether machines are fit to train"),
    "slurm submit": ("bigtx.commands.slurm:submit_command", "submit a job to a SLURM cluster"),
    "slurm render": ("bigtx.commands.slurm:render_command", "print the batch script of a job"),
    "slurm status": ("bigtx.commands.slurm:status_command", "show the starts and jobs of a run"),
    "generate": ("bigtx.commands.generate:generate_command", "continue prompts with a trained model"),
    "chat": ("bigtx.commands.generate:chat_command", "chat with a model that was trained on chats"),
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
    "Training": ("pretrain", "finetune", "checkpoints", "wandb"),
    "On a cluster": ("doctor", "slurm"),
    "Using a model": ("generate", "chat", "predict", "evaluate", "import", "export"),
}
"""Groups of commands, by their first words; all other commands are shown at the end, as `OTHER`."""
OTHER = "Other"


@exit_cleanly
def main(argv: Sequence[str] | None = None) -> int | None:
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
    extend_segments()
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
        _resolve(name)(["--help"])
    elif members := _members(" ".join(words)):
        print(f"usage: bigtx {words[0]} COMMAND [NAME=VALUE ...]\n\n{_table(members)}")
    else:
        _refuse(words)
    return 0


def version_command(argv: Sequence[str]) -> int:
    """Print the version; with `--json` also those of Python and packages, which are not imported."""
    from bigtx.utils.arguments import Arguments

    parser = Arguments("version", "Print the version; as JSON also those of packages.")
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


def _resolve(name: str) -> Callable[[Sequence[str]], int | None]:
    command: Callable[[Sequence[str]], int | None] = imported(COMMANDS[name][0])
    return command


def _refuse(words: Sequence[str]) -> NoReturn:
    """Refuse a command line and say which command was probably meant.

    Raises:
        ConfigError: always.
    """
    from bigtx.commands.suggestions import suggest

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
