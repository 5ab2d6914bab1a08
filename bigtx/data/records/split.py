"""Which records are held out: by a rule that only looks at the records, so that it is the same on every machine."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Literal

import xxhash

from bigtx.data.records.record import Record


def split_records(
    records: Sequence[Record], groups: Sequence[Any], fraction: float, how: Literal["hash", "tail"], name: str
) -> tuple[list[int], list[int]]:
    """Divide records in those that stay and those that are held out.

    Args:
        groups: the class of each record, or anything else of which each shall be held out evenly.
        fraction: share to hold out.
        how: "tail": the last ones of each group, in the order of `records`, rounded down; "hash": those whose content
            has a hash below the share, so that equal records stay together and a record added moves no other.
        name: of the split: each has hashes of its own, or nothing would be left below the share of a second one.

    Returns:
        The places in `records` of both, in order.
    """
    assert len(records) == len(groups)
    if how == "hash":
        held = [_share(record, name) < fraction for record in records]
    else:
        places: dict[Any, list[int]] = {}
        for place, group in enumerate(groups):
            places.setdefault(group, []).append(place)
        last = {place for own in places.values() for place in own[len(own) - int(len(own) * fraction + 1e-9) :]}
        held = [place in last for place in range(len(records))]
    kept = [place for place, is_held in enumerate(held) if not is_held]
    return kept, [place for place, is_held in enumerate(held) if is_held]


def _share(record: Record, name: str) -> float:
    content = name + json.dumps(record.fields, sort_keys=True, default=str)
    return xxhash.xxh3_64_intdigest(content.encode("utf-8", "surrogatepass")) / 2**64
