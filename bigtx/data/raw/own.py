"""The files that bigtx itself writes and never reads as input: corpora, tokenizers, runs, exports, lists, complete or
not.

An output may be within the input folder (`input.paths=. output=corpus`). So folders and files are recognized by their
content, at every moment of a job, and the input is the same when a command is run again.
"""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Collection, Sequence

from bigtx.utils.errors import DataError

MADE = "made by bigtx"
"""The name under which they are counted."""

RUN = "a run"
_SPLITS = ("train", "validation")
_SPLIT = {"manifest.json", "blocks.npy"}
_TOKENIZER = "bigtx_tokenizer.json"
_RUN = ({"run.lock", "logs"}, {"config.yaml", "logs"}, {"config.yaml", "checkpoints"})
"""Names that are together in a run's folder: from its start on, and if it was copied without its logs."""
_PARTIAL = ".partial"
_IN_PARTIAL = ("part-*-of-*", "tokenizer", "work", "corpus")
_REJECTS = ".rejects.jsonl"
_ABOUT = ".about.json"
_LOOKED_AT = 4096


def without_own(folder: str, names: Sequence[str]) -> list[str]:
    """Return the names of files and folders that bigtx did not make.

    Args:
        names: all names in the folder.
    """
    beside = set(names)
    return [name for name in names if not _is_own(os.path.join(folder, name), beside)]


def _is_own(path: str, beside: Collection[str]) -> bool:
    return _kind_of_listed(path) is not None if os.path.isdir(path) else is_own_file(path, beside)


def _kind_of_listed(folder: str) -> str | None:
    try:
        return kind_of(folder, os.listdir(folder))
    except OSError:
        return None  # The reader reports what is wrong.


def kind_of(folder: str, names: Collection[str]) -> str | None:
    """Return the kind of a folder that bigtx made, e.g. "a tokenizer"; None if it did not make it.

    Args:
        names: the names in it.
    """
    found = set(names)
    if _TOKENIZER in found:
        return "a tokenizer"
    if any(run <= found for run in _RUN):
        return RUN
    if found >= _SPLIT and _names_blocks(folder):
        return "a part of a corpus"
    if any(split in found and _names_blocks(os.path.join(folder, split)) for split in _SPLITS):
        return "a prepared corpus"
    # During a preparation, and the rest of one that was killed while it cleaned up.
    in_partial = found and all(any(fnmatch.fnmatch(name, own) for own in _IN_PARTIAL) for name in found)
    return "a corpus in preparation" if folder.endswith(_PARTIAL) and in_partial else None


def own_of(path: str, base: str, known: dict[str, bool]) -> str | None:
    """Return the first of the folders between a base and a path, or the path itself, that bigtx made.

    Args:
        known: the results for earlier folders; new ones are added.
    """
    parts = os.path.relpath(path, base).split(os.sep)
    for count in range(1, len(parts) + 1):
        each = os.path.join(base, *parts[:count])
        if each not in known:
            pair = (each + _ABOUT, each.removesuffix(_ABOUT))
            known[each] = _is_own(each, {os.path.basename(other) for other in pair if os.path.isfile(other)})
        if known[each]:
            return each
    return None


def refuse_own(path: str, setting: str = "") -> None:
    """Refuse a folder as input if bigtx made it.

    Raises:
        DataError: bigtx made it.
    """
    kind = _kind_of_listed(path)
    # A user may have put a tokenizer next to the texts.
    if kind and not os.path.isfile(os.path.join(path, _TOKENIZER)):
        named = f" (named in {setting})" if setting else ""
        raise DataError(f"{path}{named} is {kind}, which was made by bigtx; name the folder to read.")


def is_own_file(path: str, beside: Collection[str]) -> bool:
    """Return whether a file is a list of rejects, the card of an export, or predictions of `bigtx predict` or their
    description.

    Args:
        beside: the names in its folder.
    """
    if path.endswith(_REJECTS):
        begin = _begin(path)
        return not begin or begin.startswith(b'{"file": ')
    if os.path.basename(path) == "README.md":
        begin = _begin(path)
        return begin.startswith(b"---\n") and b"\n- bigtx\n" in begin.partition(b"\n---\n")[0]
    name = os.path.basename(path)
    return name.removesuffix(_ABOUT) in beside if name.endswith(_ABOUT) else name + _ABOUT in beside


def _names_blocks(split: str) -> bool:
    begin = _begin(os.path.join(split, "manifest.json"))
    return b'"bigtx-blocks"' in begin


def _begin(path: str) -> bytes:
    if not os.path.isfile(path):
        return b""
    try:
        with open(path, "rb") as file:
            return file.read(_LOOKED_AT)
    except OSError:
        return b""
