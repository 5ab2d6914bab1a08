"""What is held out: the last of each class, or what a hash of the content says."""

from __future__ import annotations

from bigtx.data.records.record import Record
from bigtx.data.records.split import split_records


def make(count: int) -> list[Record]:
    return [Record({"text": f"number {number}"}, "a.jsonl", number + 1) for number in range(count)]


def test_the_last_of_each_class() -> None:
    groups = ["a"] * 10 + ["b"] * 20
    kept, held = split_records(make(30), groups, 0.1, "tail", "test")
    assert held == [9, 28, 29] and kept == [place for place in range(30) if place not in held]


def test_a_hash_holds_out_its_share_of_each_split_and_moves_nothing() -> None:
    records = make(2000)
    kept, test = split_records(records, [None] * 2000, 0.1, "hash", "test")
    assert 150 < len(test) < 250 and sorted(kept + test) == list(range(2000))
    rest = [records[place] for place in kept]
    _, validation = split_records(rest, [None] * len(rest), 0.1, "hash", "validation")
    assert 130 < len(validation) < 230, "a second split of the same share is not empty"
    assert split_records(records[:500], [None] * 500, 0.1, "hash", "test")[1] == [
        place for place in test if place < 500
    ]
