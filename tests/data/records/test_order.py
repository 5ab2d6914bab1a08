"""In which order records come."""

from __future__ import annotations

import weakref

import numpy as np
import pytest

from bigtx.data.stream.loader import Division
from bigtx.finetuning.inputs import WINDOW_BATCHES, RecordLoader, RecordOrder


@pytest.mark.parametrize("count", [1, 7, 100, 1000])
def test_every_record_once_an_epoch(count: int) -> None:
    lengths = np.random.default_rng(1).integers(1, 50, count)
    order = RecordOrder(lengths, global_batch_size=8, seed=3)
    # Windows cut epochs off where they end: over whole windows, each record comes as often as the epochs say.
    num_windows = max(1, 4 * count // (WINDOW_BATCHES * 8)) + 1
    seen = np.concatenate([order.batch(number) for number in range(num_windows * WINDOW_BATCHES)])
    counts = np.bincount(seen, minlength=count)
    assert counts.max() - counts.min() <= 1
    assert len(seen) == counts.sum()


def test_batches_are_of_like_length_and_come_in_any_order() -> None:
    lengths = np.random.default_rng(1).integers(1, 500, 2000)
    order = RecordOrder(lengths, global_batch_size=16, seed=3)
    batches = [order.batch(number) for number in range(WINDOW_BATCHES)]
    spread = np.mean([np.ptp(lengths[batch]) for batch in batches])
    assert spread < np.ptp(lengths) / 10
    means = [lengths[batch].mean() for batch in batches]
    assert means != sorted(means)
    again = RecordOrder(lengths, global_batch_size=16, seed=3)
    assert again.batch(40).tolist() == order.batch(40).tolist(), "a batch does not depend on those asked for before"
    assert RecordOrder(lengths, global_batch_size=16, seed=4).batch(0).tolist() != batches[0].tolist()


def test_the_order_never_changes() -> None:
    """A run that continues with a later release reads the same batches."""
    order = RecordOrder(np.arange(300) % 7, global_batch_size=4, seed=3)
    assert [order.batch(number).tolist() for number in (0, 1, 31, 32)] == [
        [91, 126, 266, 175],
        [105, 147, 196, 70],
        [144, 130, 193, 11],
        [50, 113, 218, 239],
    ]


@pytest.mark.parametrize("name", ["_permute", "_draw_window"])
def test_one_epoch_and_one_window_are_kept_in_memory(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    draw, drawn = getattr(RecordOrder, name), list[weakref.ref[np.ndarray]]()

    def watched(order: RecordOrder, number: int) -> np.ndarray:
        result = draw(order, number)
        drawn.append(weakref.ref(result))
        return result

    monkeypatch.setattr(RecordOrder, name, watched)
    order = RecordOrder(np.arange(300) % 7, global_batch_size=4, seed=3)
    for number in range(8 * WINDOW_BATCHES):
        order.batch(number)
    assert len(drawn) >= 4 and sum(kept() is not None for kept in drawn) == 1


class Batch:
    def __init__(self, places: list[int], numbers: list[int]) -> None:
        self.places, self.numbers, self.num_tokens = places, numbers, len(places)


def steps_of(world_size: int, micro: int, start: int = 0, count: int = 3) -> list[set[tuple[int, int]]]:
    found: list[set[tuple[int, int]]] = [set() for _ in range(count)]
    for rank in range(world_size):
        loader = RecordLoader(
            np.arange(1, 38),
            lambda places, numbers: Batch(list(places), list(numbers)),
            Division(global_batch_size=8, micro_batch_size=micro, rank=rank, world_size=world_size),
            seed=1,
            start_sequence=start * 8,
            prefetch_batches=0,
        )
        for step in range(count):
            for batch in next(loader):
                found[step] |= set(zip(batch.places, batch.numbers, strict=True))
    return found


def test_ranks_micro_batches_and_resume_change_nothing() -> None:
    expected = steps_of(1, 8)
    assert all(len(step) == 8 for step in expected)
    assert steps_of(2, 2) == steps_of(4, 1) == steps_of(1, 4) == expected
    assert steps_of(2, 4, start=1, count=2) == expected[1:]
