"""The batches of a fine-tuning run: the order of records, divided over ranks and micro batches, prepared ahead in a
thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from bigtx.data.records.order import RecordOrder
from bigtx.data.stream.loader import StepLoader, check_division

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
