"""The facts in the manifest of a checkpoint: their types, and which file has which range of a parameter.

    "ranges": {"head.weight": {"kinds": ["master", "exp_avg", "exp_avg_sq"], "files": [[0, 7, 250], [7, 1, 90]]}}

The files are numbered in the order of their names. `[first, count, length]` are `count` files from number `first` on;
each has the next `length` elements of the flattened parameter, for each kind. The last one may have fewer. ZeRO cuts
parameters into equal parts, so the table grows with the number of parameters and ranks, and not with their product.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence, Set
from typing import Any

_FILE = re.compile(r"[a-z]+-\d{5,}\.safetensors")
_TYPES: dict[str, Any] = {
    "step": int,
    "files": dict,
    "parameters": dict,
    "ranges": dict,
    "state": dict,
    "meter": dict,
    "guards": dict,
    "tracked": dict,
    "tokenizer": str,
    "wandb_run_id": str,
    "frozen_sha256": str,
    "world_size": int,
    "num_updates": int,
    "expert_counts": list,
    "adapter_scale": int | float,
}
"""The types of the facts of a manifest that programs read; `files` and `parameters` are in every manifest."""

Range = tuple[str, tuple[int, ...], tuple[str, ...], int, int]
"""Name, shape and kinds of a parameter, and the elements [start, stop) of the flattened parameter."""

Runs = Sequence[Sequence[int]]
"""[first, count, length] for each run of files; see above."""


def content_problem(content: Mapping[str, Any]) -> str | None:
    """Return what is wrong with a manifest that has the right hash of itself: the hash may have been computed again.

    Args:
        content: the manifest.

    Returns:
        The problem in words; None if programs can read the manifest.
    """
    for key, kind in _TYPES.items():
        value = content.get(key)
        if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
            return f"{key} is of the type {type(value).__name__}"
    for key in ("files", "parameters"):
        if content.get(key) is None:
            return f"{key} is missing"
    for name, entry in content["files"].items():
        if not _FILE.fullmatch(name):  # A name must not lead out of the folder.
            return f"files has the name {name[:100]!r}"
        if not (isinstance(entry, dict) and type(entry.get("size")) is int and isinstance(entry.get("sha256"), str)):
            return f"files.{name} is not the size and the sha256 of a file"
    for name, shape in content["parameters"].items():
        if not (isinstance(shape, list) and all(type(length) is int and length >= 0 for length in shape)):
            return f"parameters.{name[:100]} is not a shape"
    ranges = content.get("ranges")
    return None if ranges is None else _table_problem(ranges, content["parameters"], len(content["files"]))


def table_of(
    ranges_by_file: Mapping[str, Sequence[Range]], names: Set[str]
) -> tuple[dict[str, list[int]], dict[str, Any]]:
    """Check that the ranges of all files cover every parameter exactly once, and list them.

    Args:
        ranges_by_file: the ranges in each file, by the file's name.
        names: the parameters that must be there.

    Returns:
        The shape of each parameter, and the manifest's `ranges`.
    """
    pieces: dict[str, list[tuple[int, int, int]]] = {}
    facts: dict[str, tuple[tuple[int, ...], tuple[str, ...]]] = {}
    for number, file in enumerate(sorted(ranges_by_file)):
        for name, shape, kinds, start, stop in ranges_by_file[file]:
            own = (tuple(shape), tuple(kinds))
            assert facts.setdefault(name, own) == own, f"{name}: files differ in its shape or its kinds"
            pieces.setdefault(name, []).append((start, stop, number))
    assert set(pieces) == names
    table = {}
    for name, parts in pieces.items():
        shape, kinds = facts[name]
        table[name] = {"kinds": list(kinds), "files": _runs(name, sorted(parts), math.prod(shape))}
    return {name: list(shape) for name, (shape, _) in facts.items()}, table


def _runs(name: str, parts: Sequence[tuple[int, int, int]], numel: int) -> list[list[int]]:
    """Return the runs of a parameter's parts, given as (start, stop, number of the file) in order."""
    runs: list[list[int]] = []
    end = 0
    for start, stop, number in parts:
        assert start == end, f"{name}: elements {end} to {start} are missing or written twice"
        end, length = stop, stop - start
        first, count, usual = runs[-1] if runs else (0, 0, 0)
        if count and number == first + count and (length == usual or (length < usual and stop == numel)):
            runs[-1][1] += 1
        elif length:
            runs.append([number, 1, length])
    assert end == numel, f"{name}: only {end} elements written"
    return runs


def overlapping(runs: Runs, numel: int, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """Yield the ranges of a parameter that contain elements of [start, stop).

    Args:
        runs: the parameter's runs of files.
        numel: the parameter's number of elements.
        start, stop: elements of the flattened parameter.

    Yields:
        (first, last, number): the elements [first, last) are in the file of this number.
    """
    begin, stop = 0, min(stop, numel)
    for number, count, length in runs:
        for place in range(max(0, start - begin) // length, count):
            first = begin + place * length
            if first >= stop:
                return
            yield first, min(first + length, numel), number + place
        begin += count * length


def _table_problem(table: Mapping[str, Any], shapes: Mapping[str, Sequence[int]], num_files: int) -> str | None:
    """Return what is wrong with the `ranges` of a manifest, in words; None if they cover each parameter once."""
    if table.keys() != shapes.keys():
        return "ranges has other names than parameters"
    for name, entry in table.items():
        kinds, runs = (entry.get("kinds"), entry.get("files")) if isinstance(entry, dict) else (None, None)
        if not (isinstance(kinds, list) and all(isinstance(kind, str) for kind in kinds)):
            return f"ranges.{name[:100]} has no list of kinds"
        if not (isinstance(runs, list) and _covers(runs, math.prod(shapes[name]), num_files)):
            return f"ranges.{name[:100]} does not cover the parameter with files of the checkpoint"
    return None


def _covers(runs: list[Any], numel: int, num_files: int) -> bool:
    end = length = 0
    for run in runs:
        if not (isinstance(run, list) and len(run) == 3 and all(type(number) is int for number in run)):
            return False
        first, count, length = run
        if not (first >= 0 and count >= 1 and length >= 1 and first + count <= num_files):
            return False
        end += count * length
    return end - length < numel <= end or numel == end == 0
