"""What a preparation counts and divides, by hand: removed documents, shards of processes, near duplicates."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from bigtx.config.schema import PrepareConfig
from bigtx.data.prepare.assemble import Count, Plan, Task, add_up, make_tasks
from bigtx.data.prepare.chunks import MAX_RANGES, RECORD_DTYPE, Chunk, Chunks, key_range, save_chunks
from bigtx.data.prepare.encode import NUM_EXAMPLES, Removed, UnitResult


def test_what_units_removed_is_added() -> None:
    total = Removed()
    for number in range(NUM_EXAMPLES + 2):
        total.add(Removed(2, 100 + number, [{"text": str(number)}]))
    count = NUM_EXAMPLES + 2
    assert (total.documents, total.bytes) == (2 * count, 100 * count + count * (count - 1) // 2)
    assert [example["text"] for example in total.examples] == [str(number) for number in range(NUM_EXAMPLES)]


def test_counts_of_ranges_are_added() -> None:
    """The smallest and the largest hash are those of any range, also of one with the hash 0."""
    one = Count(Counter(exact=2), 0, 0, {0: np.array([[1, 5, 9], [0, 0, 0]])})
    two = Count(Counter(exact=1, near=4), 7, 2**64 - 1, {0: np.array([[2, 3, 4], [1, 1, 1]]), 1: np.ones((2, 3))})
    assert (add_up([one]).smallest, add_up([one]).largest) == (0, 0)
    total = add_up([one, two])
    assert (total.removed, total.smallest, total.largest) == ({"exact": 3, "near": 4}, 0, 2**64 - 1)
    assert total.groups[0].tolist() == [[3, 8, 13], [1, 1, 1]] and total.groups[1].tolist() == [[1] * 3] * 2
    assert add_up([two]).smallest == 7


def test_processes_share_all_shards_and_none_twice() -> None:
    # Shards of 20 tokens: 7 in the first split, 1 in the second.
    plan = Plan(held_out_below=0, tokens_before=[[0, 50, 121], [0, 0, 20]], block_tokens=10, shard_blocks=2)
    assert make_tasks(plan, 3) == [Task(0, 0, 2), Task(0, 2, 4), Task(0, 4, 6), Task(0, 6, 7), Task(1, 0, 1)]
    assert make_tasks(plan, 100) == [*(Task(0, first, first + 1) for first in range(7)), Task(1, 0, 1)]


@pytest.mark.parametrize("count", [1, 3, 4, MAX_RANGES])
def test_each_key_is_in_one_range(count: int) -> None:
    ranges = [key_range(number, count) for number in range(count)]
    assert ranges[0][0] == 0 and ranges[-1][1] == 2**64 - 1
    assert [first for first, _ in ranges[1:]] == [last + 1 for _, last in ranges[:-1]]
    sizes = {last - first for first, last in ranges}
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(("range_bytes", "expected"), [(10_000, 1), (2000, 1), (1999, 2), (300, 7), (1, 2000)])
def test_a_range_of_tokens_fits_into_memory(tmp_path: Path, range_bytes: int, expected: int) -> None:
    """Two units of 400 and 600 tokens, each of 2 bytes."""
    results = [UnitResult(number, "", 1, num_tokens=tokens) for number, tokens in enumerate((400, 600))]
    chunks = save_chunks(tmp_path, results, PrepareConfig(), np.dtype("<u2"), near=None, range_bytes=range_bytes)
    assert chunks.num_ranges == expected


class Kept:
    """A chunk whose documents are in memory."""

    def __init__(self, keys: list[int], numbers: list[int]) -> None:
        self._records = np.zeros(len(keys), RECORD_DTYPE)
        self._records["key"], self._records["text_hash"], self._records["number"] = keys, keys, numbers

    def records(self, first_key: int, last_key: int) -> np.ndarray:
        inside = (self._records["key"] >= first_key) & (self._records["key"] <= last_key)
        return self._records[inside]


def test_near_duplicates_are_found_by_their_number_in_the_whole_input(tmp_path: Path) -> None:
    """The first unit has documents 0 to 2, the second one 3 to 5; of these, 1 and 5 are near duplicates."""
    near = tmp_path / "removed"
    near.write_bytes(bytes([0, 1, 0, 0, 0, 1, 0, 0]))
    made: list[Any] = [Kept([10, 20, 30], [2, 0, 1]), Kept([15, 25, 35], [0, 2, 1])]
    groups = [np.array([0], np.uint32)] * 2
    chunks = Chunks(cast(list[Chunk], made), [0, 3], [(None, None)], groups, np.dtype("<u2"), 1, True, near)
    records, places, removed = chunks.records(0)
    assert records["key"].tolist() == [10, 15, 20, 35] and places.tolist() == [0, 1, 0, 1]
    assert removed == {"exact duplicate": 0, "near duplicate": 2}
