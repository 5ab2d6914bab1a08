"""The global order: each sequence once per epoch, exact shares, the same whichever way it is asked."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bigtx.data.corpus.blocks import WINDOW_BLOCKS
from bigtx.data.stream.mixture import MAX_SPAN, Phase
from bigtx.data.stream.order import Order, Places, SourceOrder, permutation, rows_of_blocks


def make_order(blocks: list[list[int]], weights: list[float], seed: int = 1) -> Order:
    sources = [SourceOrder(f"source-{number}", np.array(rows)) for number, rows in enumerate(blocks)]
    return Order(sources, [Phase(0, weights)], seed)


def place_of(order: Order, sequence: int) -> tuple[int, ...]:
    """The source index, epoch, block and row of one sequence of the run."""
    return tuple(int(array[0]) for array in order.places(np.array([sequence])))


def places(order: Order, start: int, count: int) -> Places:
    return order.places(np.arange(start, start + count))


def test_a_permutation_never_changes() -> None:
    assert permutation(8, 1, 2).tolist() == [7, 5, 6, 1, 4, 3, 0, 2]


def test_rows_of_blocks_predict_every_token_but_the_first() -> None:
    assert rows_of_blocks(np.array([1, 2, 8, 9, 10, 17]), 8).tolist() == [0, 1, 1, 1, 2, 2]


@given(st.lists(st.integers(0, 5), min_size=1, max_size=3 * WINDOW_BLOCKS).filter(any), st.integers(0, 2**32))
@settings(max_examples=50, deadline=None)
def test_each_epoch_gives_each_row_once(rows: list[int], seed: int) -> None:
    order = make_order([rows], [1.0], seed)
    every_row = sorted((block, row) for block, count in enumerate(rows) for row in range(count))
    for epoch in range(3):
        found = places(order, epoch * len(every_row), len(every_row))
        assert set(found.epoch.tolist()) == {epoch}
        assert sorted(zip(found.block.tolist(), found.row.tolist(), strict=True)) == every_row


def test_epochs_and_seeds_differ() -> None:
    orders = [places(make_order([[3] * 100], [1.0], seed), 0, 600).block.tolist() for seed in (1, 2)]
    assert orders[0] != orders[1]
    assert orders[0][:300] != orders[0][300:]


def test_rows_of_one_block_are_spread_over_its_window() -> None:
    blocks = places(make_order([[100] * WINDOW_BLOCKS], [1.0]), 0, 100).block
    assert len(np.unique(blocks)) > WINDOW_BLOCKS / 2


def test_reading_stays_within_a_window() -> None:
    rows = WINDOW_BLOCKS * 10
    read = places(make_order([[10] * 3 * WINDOW_BLOCKS], [1.0]), rows, rows)
    assert len(np.unique(read.block)) == WINDOW_BLOCKS


@pytest.mark.parametrize("start", [0, 17, 12_345_678_901])
def test_places_do_not_depend_on_how_they_are_asked_for(start: int) -> None:
    rows = [[3, 0, 7, 1], [5] * 200, [11, 2]]
    weights = [0.7, 0.2, 0.1]
    whole = places(make_order(rows, weights), start, 300)
    order = make_order(rows, weights)
    one_by_one = [place_of(order, start + i) for i in range(300)]
    assert one_by_one == list(zip(*(array.tolist() for array in whole), strict=True))


def test_sequences_may_lie_far_apart() -> None:
    order = make_order([[3, 0, 7, 1], [5] * 200, [11, 2]], [0.7, 0.2, 0.1])
    sequences = np.array([5, 6, 9, MAX_SPAN - 1, MAX_SPAN, 10**6, 3 * 10**11, 3 * 10**11 + 4])
    together = zip(*(array.tolist() for array in order.places(sequences)), strict=True)
    assert list(together) == [place_of(order, sequence) for sequence in sequences.tolist()]


def test_the_order_never_changes() -> None:
    order = make_order([[3, 0, 7, 1], [5] * 200, [11, 2]], [0.7, 0.2, 0.1], seed=7)
    assert [place_of(order, sequence) for sequence in (0, 1, 2, 3, 10**12)] == [
        (0, 0, 2, 3),
        (1, 0, 149, 0),
        (0, 0, 2, 2),
        (0, 0, 3, 0),
        (0, 63_636_363_636, 3, 0),
    ]


def test_another_source_leaves_a_sources_own_order_as_it_was() -> None:
    alone = places(Order([SourceOrder("web", np.array([4] * 50))], [Phase(0, [1.0])], 1), 0, 200)
    sources = [SourceOrder("books", np.array([9] * 30)), SourceOrder("web", np.array([4] * 50))]
    mixed = places(Order(sources, [Phase(0, [1.0, 2.0])], 1), 0, 300)
    web = mixed.source == 1
    assert mixed.block[web].tolist() == alone.block.tolist()
    assert mixed.row[web].tolist() == alone.row.tolist()


def test_four_million_blocks_are_quick() -> None:
    order = make_order([[256] * 3_800_000], [1.0])
    assert place_of(order, 0) != place_of(order, 10**8)
