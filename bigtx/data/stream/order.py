"""The global order of training sequences: pure arithmetic, no state.

    sequence i of the run
        -> source, and the number of the sequence in that source        (mixture.py: a tree of rounded splits)
        -> epoch of the source, and the place within the epoch           (division)
        -> block and row                                                 (two keyed shuffles and a binary search)

A row is `sequence_length` inputs with their labels, cut from one block; a block of n tokens has ceil((n - 1) / T) rows.
Each epoch permutes the blocks of a source, and then permutes the rows within each window of WINDOW_BLOCKS blocks, so
that neighbouring rows of one long document are not in one batch, while reading stays local to a few megabytes.
Everything depends on (seed, source names, phases with their weights, tokens of the blocks, sequence_length), not on
the number of ranks, and sequence 10^9 is found as quickly as sequence 0.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import xxhash

from bigtx.data.corpus.blocks import WINDOW_BLOCKS
from bigtx.data.stream.mixture import MAX_SPAN, Mixture, Phase, runs
from bigtx.utils.hashing import hash64
from bigtx.utils.units import parse_range


class Places(NamedTuple):
    """The places of sequences; int64 arrays of one length."""

    source: np.ndarray
    epoch: np.ndarray
    block: np.ndarray
    row: np.ndarray


def permutation(count: int, *key: int) -> np.ndarray:
    """Return a permutation of range(count) that depends on the key only; int64."""
    hashes = np.empty(count, np.uint64)
    for begin in range(0, count, 1 << 16):  # In pieces that stay in the processor's cache.
        end = min(begin + (1 << 16), count)
        hashes[begin:end] = hash64(*key, np.arange(begin, end, dtype=np.uint64))
    return np.argsort(hashes)


def rows_of_blocks(tokens: np.ndarray, sequence_length: int) -> np.ndarray:
    """Return the number of rows of blocks with so many tokens: every token but a block's first is a label exactly once;
    int64.
    """
    rows = np.array(tokens, np.int64)
    rows += sequence_length - 2
    rows //= sequence_length
    return rows


class SourceOrder:
    """One source's part of the order.

    Args:
        name: the name of the source; the order of a source does not depend on the others.
        block_rows: [blocks] rows of each block.
    """

    def __init__(self, name: str, block_rows: np.ndarray) -> None:
        self.name = name
        self.key = xxhash.xxh3_64_intdigest(name.encode())
        self.block_rows = np.asarray(block_rows, np.uint32)
        self.num_rows = int(self.block_rows.sum(dtype=np.int64))
        assert self.num_rows > 0, "a source without rows is refused earlier"
        # A batch may cross the border of two epochs, so two are needed at a time.
        self._epoch = functools.lru_cache(maxsize=2)(lambda seed, epoch: EpochOrder(self, seed, epoch))

    def locate(self, index: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the epoch, block and row of the source's sequences `index` (int64, ascending, counted from the run's
        start).
        """
        epochs, places = np.divmod(index, self.num_rows)
        blocks, rows = np.empty_like(index), np.empty_like(index)
        for epoch, part in runs(epochs):
            blocks[part], rows[part] = self._epoch(seed, epoch).locate(places[part])
        return epochs, blocks, rows


class EpochOrder:
    """One epoch of one source: its blocks permuted, and the rows within each window of blocks."""

    def __init__(self, source: SourceOrder, seed: int, epoch: int) -> None:
        self._key = (seed, source.key, epoch)
        self._block_rows = source.block_rows
        self._blocks = permutation(len(source.block_rows), *self._key).astype(np.uint32)
        firsts = np.arange(0, len(self._blocks), WINDOW_BLOCKS)
        self._window_ends = np.cumsum(np.add.reduceat(self._block_rows[self._blocks], firsts, dtype=np.int64))
        self._window_rows = functools.lru_cache(maxsize=2)(self._permute_window)

    def locate(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the block and row at the places (int64, ascending) of the epoch."""
        blocks, rows = np.empty_like(places), np.empty_like(places)
        for window, part in runs(np.searchsorted(self._window_ends, places, side="right")):
            begin, window_blocks, window_rows = self._window_rows(window)
            blocks[part] = window_blocks[places[part] - begin]
            rows[part] = window_rows[places[part] - begin]
        return blocks, rows

    def _permute_window(self, window: int) -> tuple[int, np.ndarray, np.ndarray]:
        """Return the first place of a window, and the block and row at each of its places."""
        blocks = self._blocks[window * WINDOW_BLOCKS : (window + 1) * WINDOW_BLOCKS]
        ends = np.cumsum(self._block_rows[blocks], dtype=np.int64)
        shuffled = permutation(int(ends[-1]), *self._key, window)
        positions = np.searchsorted(ends, shuffled, side="right")
        begins = np.concatenate([[0], ends[:-1]])
        return int(self._window_ends[window] - ends[-1]), blocks[positions], shuffled - begins[positions]


class Order:
    """The order of a run over weighted sources.

    Args:
        sources: the sources, in an order that is the same each time.
        phases: the sources' weights, starting at the run's start (see `Mixture`).
        seed: the seed of the run.

    Raises:
        DataError: the phases cannot be mixed exactly.
    """

    def __init__(self, sources: list[SourceOrder], phases: list[Phase], seed: int) -> None:
        assert all(len(phase.weights) == len(sources) for phase in phases)
        self.sources = sources
        self.seed = seed
        self.mixture = Mixture(phases)

    def place(self, sequence: int) -> tuple[int, int, int, int]:
        """Return the source index, epoch, block and row of one sequence of the run."""
        source, epoch, block, row = (int(array[0]) for array in self.places(np.array([sequence])))
        return source, epoch, block, row

    def places(self, sequences: np.ndarray) -> Places:
        """Return the places of sequences of the run (int64, ascending)."""
        places = Places(*(np.empty(len(sequences), np.int64) for _ in Places._fields))
        for _, part in runs(sequences // MAX_SPAN):
            for source, slots, index in self.mixture.assign(sequences[part]):
                where = slots + part.start
                places.source[where] = source
                found = self.sources[source].locate(index, self.seed)
                places.epoch[where], places.block[where], places.row[where] = found
        return places


class SkippedWindows:
    """The remaining sequences of a run, by arithmetic.

    Args:
        ranges: the ranges of `data.skip`; the END of a range is the first sequence that is read again. They may
            overlap.

    Attributes:
        windows: (start, end) of each, ascending, without overlaps.
    """

    def __init__(self, ranges: Sequence[str] = ()) -> None:
        self.windows: list[tuple[int, int]] = []
        for start, end in sorted(map(parse_range, ranges)):
            if self.windows and start <= self.windows[-1][1]:
                start, end = self.windows[-1][0], max(end, self.windows.pop()[1])
            self.windows.append((start, end))
        lengths = np.array([end - start for start, end in self.windows], np.int64)
        # Windows are between reads: how many reads come before each, and how many sequences are in it and in earlier
        # ones.
        self._passed = np.concatenate([[0], np.cumsum(lengths)])
        self._reads = np.array([start for start, _ in self.windows], np.int64) - self._passed[:-1]

    def before(self, position: int) -> list[tuple[int, int]]:
        """Return the windows, or their parts, before a position."""
        return [(start, min(end, position)) for start, end in self.windows if start < position]

    def read_from(self, position: int, count: int) -> np.ndarray:
        """Return the first `count` sequences from a position on that are not skipped; int64."""
        reads = self._reads_before(position) + np.arange(count)
        return reads + self._passed[np.searchsorted(self._reads, reads, side="right")]

    def after(self, position: int, count: int) -> int:
        """Return the position after reading `count` sequences, at least one, from a position on."""
        last = self._reads_before(position) + count - 1
        return last + int(self._passed[np.searchsorted(self._reads, last, side="right")]) + 1

    def _reads_before(self, position: int) -> int:
        return position - sum(end - start for start, end in self.before(position))
