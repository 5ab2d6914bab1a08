"""The choice of records to hold out, by a rule that depends only on the records, so that all machines agree."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Literal

import xxhash

from bigtx.data.records.record import Record


def split_records(
    records: Sequence[Record], groups: Sequence[Any], fraction: float, how: Literal["hash", "tail"], name: str
) -> tuple[list[int], list[int]]:
    """Divide records into those that stay and those that are held out.

    Args:
        groups: the class of each record, or any other group that is to be held out evenly.
        fraction: the share to hold out.
        how: "tail": the last ones of each group, in the order of `records`, rounded down; "hash": those of each group
            whose content has the lowest hashes. Equal records stay together, and some of each group stay. A group
            that is too small for its share passes the rest of it to the next one, so that for many small groups
            together the share is right.
        name: the name of the split: each has hashes of its own.

    Returns:
        The indices into `records` of both, in order.
    """
    assert len(records) == len(groups)
    places: dict[Any, list[int]] = {}
    for place, group in enumerate(groups):
        places.setdefault(group, []).append(place)
    held: set[int] = set()
    if how == "tail":
        for own in places.values():
            held.update(own[len(own) - int(len(own) * fraction + 1e-9) :])
    else:
        owed = 0.0
        for group in sorted(places, key=str):
            owed += len(places[group]) * fraction
            found = _lowest(records, places[group], int(owed + 0.5), name)
            owed -= len(found)
            held.update(found)
    return [place for place in range(len(records)) if place not in held], sorted(held)


def _lowest(records: Sequence[Record], places: Sequence[int], count: int, name: str) -> list[int]:
    """Return at most so many places, of the contents with the lowest hashes; all places of a content or none, and not
    all.
    """
    if count < 1:
        return []
    equal: dict[int, list[int]] = {}
    for place in places:
        equal.setdefault(_hash(records[place], name), []).append(place)
    found: list[int] = []
    for _, own in sorted(equal.items())[: len(equal) - 1]:
        if len(found) + len(own) <= count:
            found += own
    return found


def _hash(record: Record, name: str) -> int:
    content = name + json.dumps(record.fields, sort_keys=True, default=str)
    return xxhash.xxh3_64_intdigest(content.encode("utf-8", "surrogatepass"))
