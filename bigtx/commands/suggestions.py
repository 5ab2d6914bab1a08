"""Suggestions for a command that does not exist."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path

from bigtx.config.runs import find_config, similar_configs
from bigtx.utils import shell
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
