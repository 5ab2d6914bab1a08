"""Prefetching: the readers of remote blocks get the next blocks early, so that these arrive before they are needed."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

import numpy as np

from bigtx.data.corpus.blocks import BlockReader, RemoteBlockReader
from bigtx.data.stream.order import Places

_STEPS_AHEAD, _TOKENS_AHEAD = 8, 1 << 22
"""The distance at which remote blocks are prefetched: the larger of the two, with tokens counted over all ranks."""


def rows_ahead(rows_of_step: int, world_size: int, sequence_length: int) -> int:
    """Return how many of its own rows a rank prefetches from remote blocks, by its rows of a step."""
    return max(_STEPS_AHEAD * rows_of_step, -(-_TOKENS_AHEAD // (sequence_length * world_size)))


def tell_ahead(
    located: Iterator[tuple[np.ndarray, Places]], readers: Sequence[BlockReader], num_rows: int
) -> Iterator[tuple[np.ndarray, Places]]:
    """Yield sequences with their places, after passing the readers those of up to `num_rows` rows further on."""
    if not any(isinstance(reader, RemoteBlockReader) for reader in readers):
        yield from located
        return
    waiting: deque[tuple[np.ndarray, Places]] = deque()
    rows_waiting = 0
    for sequences, places in located:
        for source, reader in enumerate(readers):
            reader.expect(dict.fromkeys(places.block[places.source == source].tolist()))
        waiting.append((sequences, places))
        rows_waiting += len(sequences)
        while rows_waiting - len(waiting[0][0]) >= num_rows:
            rows_waiting -= len(waiting[0][0])
            yield waiting.popleft()
