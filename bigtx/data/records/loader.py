"""The batches of a fine-tuning run: the order of records, divided over ranks and micro batches, prepared ahead in a
thread.

The order is a pure function of (lengths, seed, batch size), so a position in it is one number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from bigtx.data.stream.loader import StepLoader, check_division

WINDOW_BATCHES = 32
"""Global batches whose records are sorted by length together, so that little padding is needed."""


class RecordOrder:
    """The record at each position i of a run.

    Each epoch is a permutation of its own; a batch may cross the border of two. Within a window of
    batches the records are sorted by length, then cut into global batches, whose order is drawn.
    """

    def __init__(self, lengths: np.ndarray, *, global_batch_size: int, seed: int) -> None:
        """Args:
        lengths: int [N], of each record; equal lengths leave the records unsorted.
        """
        assert len(lengths), "no records"
        self._lengths, self._size, self._seed = lengths, global_batch_size, seed
        self._window = (-1, np.empty(0, np.int64))
        self._epoch = (-1, np.empty(0, np.int64))

    def batch(self, number: int) -> np.ndarray:
        """Return the records of a global batch, int64 [global_batch_size]; batch 0 is the first."""
        window, place = divmod(number, WINDOW_BATCHES)
        if self._window[0] != window:
            self._window = (window, self._draw_window(window))
        return self._window[1][place * self._size : (place + 1) * self._size]

    def _draw_window(self, window: int) -> np.ndarray:
        span = WINDOW_BATCHES * self._size
        numbers = np.arange(window * span, (window + 1) * span)
        epochs, places = np.divmod(numbers, len(self._lengths))
        records = np.concatenate([self._permutation(epoch)[places[epochs == epoch]] for epoch in np.unique(epochs)])
        records = records[np.argsort(self._lengths[records], kind="stable")]
        shuffled = self._generator("window", window).permutation(WINDOW_BATCHES)
        return records.reshape(WINDOW_BATCHES, self._size)[shuffled].ravel()

    def _permutation(self, epoch: int) -> np.ndarray:
        if self._epoch[0] != epoch:
            self._epoch = (int(epoch), self._generator("epoch", int(epoch)).permutation(len(self._lengths)))
        return self._epoch[1]

    def _generator(self, what: str, number: int) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(key=[self._seed, {"epoch": 0, "window": 1}[what] << 48 | number]))


Collate = Callable[[Sequence[int], Sequence[int]], Any]
"""(records, their numbers in the run) -> a micro batch on the CPU."""


class RecordLoader(StepLoader):
    """An endless iterator over optimizer steps."""

    def __init__(
        self,
        lengths: np.ndarray,
        collate: Collate,
        *,
        global_batch_size: int,
        micro_batch_size: int,
        seed: int,
        rank: int,
        world_size: int,
        start_sequence: int,
        prefetch_batches: int,
    ) -> None:
        """Args:
        lengths: int [N], of each record.

        Raises:
            ConfigError: the global batch cannot be divided into ranks and micro batches.
        """
        check_division(global_batch_size, micro_batch_size, world_size)
        self._order = RecordOrder(lengths, global_batch_size=global_batch_size, seed=seed)
        self._collate = collate
        self._size, self._micro, self._rank, self._world = global_batch_size, micro_batch_size, rank, world_size
        super().__init__(
            self._micro_batches(start_sequence),
            num_micro_batches=global_batch_size // (world_size * micro_batch_size),
            start_sequence=start_sequence,
            prefetch_batches=prefetch_batches,
        )

    def num_tokens(self, micro_batches: list[Any]) -> int:
        """Return the number of tokens of records, without padding."""
        return sum(batch.num_tokens for batch in micro_batches)

    def _sequence_after_step(self) -> int:
        return self.next_sequence + self._size

    def _micro_batches(self, start_sequence: int) -> Iterator[Any]:
        assert start_sequence % self._size == 0
        step = start_sequence // self._size
        # Neighbours have about equal length: dealt in turns, they give every rank about the same work.
        places = np.arange(self._size)[self._rank :: self._world].reshape(-1, self._micro)
        while True:
            records = self._order.batch(step)
            for own in places:
                yield self._collate(records[own].tolist(), (step * self._size + own).tolist())
            step += 1
