"""What is held out: the last of each class, or what a hash of the content says."""

from __future__ import annotations

from collections import Counter

from bigtx.data.records.record import Record, split_records


def make(count: int) -> list[Record]:
    return [Record({"text": f"number {number}"}, "a.jsonl", number + 1) for number in range(count)]


def test_the_last_of_each_class() -> None:
    groups = ["a"] * 10 + ["b"] * 20
    kept, held = split_records(make(30), groups, 0.1, "tail", "test")
    assert held == [9, 28, 29] and kept == [place for place in range(30) if place not in held]


def test_a_hash_holds_out_its_share_of_each_split_and_moves_next_to_nothing() -> None:
    records = make(2000)
    kept, test = split_records(records, [None] * 2000, 0.1, "hash", "test")
    assert len(test) == 200 and sorted(kept + test) == list(range(2000))
    rest = [records[place] for place in kept]
    _, validation = split_records(rest, [None] * len(rest), 0.1, "hash", "validation")
    assert len(validation) == 180, "a second split of the same share is not empty"
    for count in (1999, 1000):
        _, fewer = split_records(records[:count], [None] * count, 0.1, "hash", "test")
        common = {place for place in test if place < count}
        assert len(common ^ set(fewer)) <= max(1, count // 50), "only records at the border move"


def test_a_hash_holds_out_the_same_share_of_each_class() -> None:
    groups = ["many"] * 900 + ["some"] * 90 + ["few"] * 10
    _, held = split_records(make(1000), groups, 0.1, "hash", "validation")
    assert [sum(groups[place] == name for place in held) for name in ("many", "some", "few")] == [90, 9, 1]


def test_the_share_of_many_small_classes_is_right_and_none_is_held_out_whole() -> None:
    groups = [f"class {number // 4}" for number in range(400)]
    _, held = split_records(make(400), groups, 0.1, "hash", "validation")
    assert len(held) == 40
    assert max(Counter(groups[place] for place in held).values()) == 1
    alone = ["many"] * 9 + ["one of its kind"]
    for fraction in (0.1, 0.5, 0.9):
        kept, held = split_records(make(10), alone, fraction, "hash", "validation")
        assert 9 in kept and len(held) == round(10 * fraction) - (fraction == 0.9)


def test_equal_records_stay_together() -> None:
    records = [Record({"text": f"number {number % 40}"}, "a.jsonl", number + 1) for number in range(200)]
    kept, held = split_records(records, [None] * 200, 0.1, "hash", "validation")
    assert len(held) == 20 and not {place % 40 for place in kept} & {place % 40 for place in held}
    _, held = split_records([records[0]] * 9 + [records[1]], [None] * 10, 0.1, "hash", "validation")
    assert held in ([], [9]), "one record that is there nine times is more than the share"
