"""The sources of a run, opened and checked, and the global order of their sequences: pure arithmetic, no state.

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
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import xxhash

from bigtx.config.schema import DataConfig, SourceConfig
from bigtx.data.corpus.blocks import WINDOW_BLOCKS
from bigtx.data.corpus.manifest import Manifest
from bigtx.data.storage.places import Cache, as_place
from bigtx.data.stream.mixture import MAX_SPAN, Mixture, Phase, runs
from bigtx.utils.errors import DataError
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


@dataclass(frozen=True)
class Source:
    """One corpus of a mixture, opened."""

    name: str
    config: SourceConfig
    manifest: Manifest


def open_sources(data: DataConfig) -> list[Source]:
    """Open the training split of each source with a weight in some phase, sorted by name.

    So the order of a config file has no effect.

    Raises:
        DataError: a source is missing, unfinished or damaged; one message lists all of them.
    """
    cache = Cache(data.cache_dir, data.cache_size)
    opened, problems = [], []
    for name, config in sorted(data.sources.items()):
        if not config.weight and not any(phase.weights.get(name) for phase in data.phases.values()):
            continue
        try:
            opened.append(Source(name, config, Manifest.load(as_place(config.path, cache) / "train")))
        except DataError as error:
            problems.append(f"data.sources.{name}: {error}")
    if not opened and not problems:
        problems.append(
            "data.sources names no source with a weight above 0; give one as data.sources.NAME.path=FOLDER, "
            "with a folder written by `bigtx data prepare`."
        )
    if problems:
        raise DataError("\n".join(problems))
    return opened


def make_order(data: DataConfig, sources: list[Source], *, sequence_length: int, seed: int) -> Order:
    """Return the global order of a run over opened sources.

    Raises:
        DataError: the phases cannot be mixed exactly.
    """
    rows = [rows_of_blocks(source.manifest.blocks["tokens"], sequence_length) for source in sources]
    parts = [SourceOrder(source.name, block_rows) for source, block_rows in zip(sources, rows, strict=True)]
    phases = [Phase(0, [source.config.weight for source in sources])]
    for phase in sorted(data.phases.values(), key=lambda phase: phase.start or 0):
        start = -(-(phase.start or 0) // sequence_length)
        weights = [phase.weights.get(source.name, source.config.weight) for source in sources]
        phases.append(Phase(start, weights))
    return Order(parts, phases, seed)


def rows_read(data: DataConfig, order: Order, num_sequences: int) -> list[int]:
    """Return how many rows of each source a run of `num_sequences` sequences reads, without those of data.skip."""
    if num_sequences == 0:
        return [0] * len(order.sources)
    skipped = SkippedWindows(data.skip)
    end = skipped.after(0, num_sequences)
    bounds = [(0, end), *((stop, start) for start, stop in skipped.before(end))]
    counts = [np.subtract(order.mixture.counts(stop), order.mixture.counts(start)) for start, stop in bounds]
    return [int(count) for count in np.sum(counts, axis=0)]


def epochs(data: DataConfig, sources: list[Source], *, sequence_length: int, num_sequences: int) -> list[float]:
    """Return how often a run of `num_sequences` sequences reads each of the sources."""
    order = make_order(data, sources, sequence_length=sequence_length, seed=0)
    read = rows_read(data, order, num_sequences)
    return [count / part.num_rows for part, count in zip(order.sources, read, strict=True)]


def check_sources(data: DataConfig, *, sequence_length: int, num_sequences: int | None = None) -> list[Source]:
    """Open the training split of all sources and refuse those that cannot be used for training.

    Args:
        sequence_length: tokens T of a row.
        num_sequences: sequences that the run reads, for `max_epochs`; None disables the check of repetition.

    Raises:
        DataError: a source is missing or damaged, has no row, has another tokenizer, or would repeat too often.
    """
    sources = open_sources(data)
    expected = sources[0].manifest.tokenizer_fingerprint
    problems = [
        f"data.sources.{source.name}: {source.manifest.folder} has {source.manifest.num_tokens} tokens, "
        "too few for one row. Prepare more text."
        for source in sources
        if not rows_of_blocks(source.manifest.blocks["tokens"], sequence_length).any()
    ]
    problems += [
        f"data.sources.{source.name}: {source.manifest.folder} was tokenized with another tokenizer "
        f"(fingerprint {source.manifest.tokenizer_fingerprint[:12]}) than this run uses ({expected[:12]}). "
        "Prepare it again with the run's tokenizer."
        for source in sources
        if source.manifest.tokenizer_fingerprint != expected
    ]
    if not problems and num_sequences is not None:
        problems += _too_many_epochs(data, sources, sequence_length, num_sequences)
    if problems:
        raise DataError("\n".join(problems))
    return sources


def _too_many_epochs(data: DataConfig, sources: list[Source], sequence_length: int, num_sequences: int) -> list[str]:
    order = make_order(data, sources, sequence_length=sequence_length, seed=0)
    problems = []
    for source, part, count in zip(sources, order.sources, rows_read(data, order, num_sequences), strict=True):
        limit = source.config.max_epochs
        if limit is not None and count > limit * part.num_rows:
            problems.append(
                f"data.sources.{source.name}: the run would read {count:,} rows of it, {count / part.num_rows:.2f} "
                f"epochs of {part.num_rows:,} rows, but max_epochs allows {limit:g}. Train for fewer steps, lower its "
                "weight, add data, or raise max_epochs."
            )
    return problems
