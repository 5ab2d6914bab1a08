"""The kind of a folder by the names in it, for messages about a folder that is not what a command needs."""

from __future__ import annotations

from pathlib import Path

MODEL = "a Hugging Face model"
MARKS = (
    ("a run", ("config.yaml", "environment.json")),
    ("a prepared corpus", ("train/manifest.json",)),
    ("a prepared corpus", ("validation/manifest.json",)),
    ("a tokenizer", ("bigtx_tokenizer.json",)),
    ("adapters in PEFT's format", ("adapter_config.json",)),
    (MODEL, ("config.json",)),
    ("a checkpoint or a split of a corpus", ("manifest.json",)),
)
"""Kinds of folders, the more certain ones first, and the files by which each is known."""


def kind_of_folder(folder: Path | str) -> str | None:
    """Return a folder's kind in words; None where its names do not show it."""
    for kind, names in MARKS:
        if all((Path(folder) / name).is_file() for name in names):
            return kind
    return None
