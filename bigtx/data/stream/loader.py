"""The batches of a run: the global order, divided over ranks and micro batches, read ahead by a thread.

Each optimizer step takes the next `global_batch_size` sequences of the global order, except those to skip. Rank r of R
reads the r-th of R equal, contiguous slices, in micro batches. So the next sequence's number is the whole state,
and the sequences of a step do not depend on the number of ranks or the micro batch.
"""

from __future__ import annotations

import queue
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch

from bigtx.config.schema import DataConfig
from bigtx.data.corpus.blocks import BlockReader, RemoteBlockReader, open_reader
from bigtx.data.corpus.manifest import Manifest
from bigtx.data.storage.places import Place, as_place
from bigtx.data.stream.mixture import MAX_SPAN
from bigtx.data.stream.order import Places, SkippedWindows, check_sources, make_order, rows_of_blocks
from bigtx.data.stream.rows import Batch, Prepare, RowFormat, as_they_are, read_rows

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


BATCHES_AHEAD = 16
"""Batches of a validation whose blocks are passed to the reader in advance."""
LOCATED_ROWS = 1024
"""Rows of one rank that are located at once, unless a step has more."""


@dataclass(frozen=True, kw_only=True)
class Division:
    """The division of each global batch over ranks and micro batches.

    Attributes:
        global_batch_size: sequences of a step over all ranks.
        micro_batch_size: rows B of a batch.
        rank, world_size: the slice of each global batch to read.
    """

    global_batch_size: int
    micro_batch_size: int
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        # The config is refused where the ranks do not divide the batch, and `micro_batch_size_of` divides their share.
        assert self.global_batch_size % (self.world_size * self.micro_batch_size) == 0, self

    @property
    def rows_of_step(self) -> int:
        """Return the sequences that a rank reads in a step."""
        return self.global_batch_size // self.world_size


class StepLoader(ABC):
    """An endless iterator over optimizer steps: each item is the list of this rank's micro batches.

    Attributes:
        next_sequence: the next sequence of the global order: the state to save.
        wait_seconds: the time that `next` has waited for data.
    """

    def __init__(self, division: Division, start_sequence: int, prefetch_batches: int) -> None:
        """Args:
        start_sequence: the first sequence of the global order to read.
        prefetch_batches: how many micro batches are read ahead, in a thread; 0: none.
        """
        self.next_sequence = start_sequence
        self.wait_seconds = 0.0
        self._division = division
        self._num_micro_batches = division.rows_of_step // division.micro_batch_size
        batches = self._micro_batches(start_sequence)
        self._prefetcher = Prefetcher(batches, prefetch_batches) if prefetch_batches else None
        self._batches = self._prefetcher or batches

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> list[Batch]:
        begin = time.perf_counter()
        micro_batches = [next(self._batches) for _ in range(self._num_micro_batches)]
        self.wait_seconds += time.perf_counter() - begin
        self.next_sequence = self._sequence_after_step()
        return micro_batches

    @abstractmethod
    def num_tokens(self, micro_batches: list[Batch]) -> int:
        """Return the number of input tokens of a step on this rank."""

    @abstractmethod
    def _micro_batches(self, start_sequence: int) -> Iterator[Batch]:
        """Yield this rank's micro batches of all steps from start_sequence on."""

    def _sequence_after_step(self) -> int:
        """Return the next sequence after those of a step."""
        return self.next_sequence + self._division.global_batch_size

    def close(self) -> None:
        """End the reading thread."""
        if self._prefetcher:
            self._prefetcher.close()


class RowLoader(StepLoader):
    """The steps of a run on rows of text; a subclass opens the data.

    Args:
        data: the config of the mixture.
        sequence_length: tokens T of a row.
        seed: the seed of the run.
        start_sequence: the first sequence of the global order to read.
        pad_id: the id that fills short rows.
        prepare: the objective's function of the rows.

    Raises:
        DataError: the data cannot be used; from `next`: a part of it is damaged.
    """

    def __init__(
        self,
        data: DataConfig,
        division: Division,
        *,
        sequence_length: int,
        seed: int,
        start_sequence: int,
        pad_id: int,
        prepare: Prepare = as_they_are,
    ) -> None:
        self._form = RowFormat(sequence_length=sequence_length, pad_id=pad_id, document_mask=data.document_mask)
        self._prepare = prepare
        self._open(data, division, seed, start_sequence)
        super().__init__(division, start_sequence, data.prefetch_batches)

    def num_tokens(self, micro_batches: list[Batch]) -> int:
        """Return the number of whole rows."""
        return len(micro_batches) * self._division.micro_batch_size * self._form.sequence_length

    @abstractmethod
    def _open(self, data: DataConfig, division: Division, seed: int, start_sequence: int) -> None:
        """Open the data."""


class TrainLoader(RowLoader):
    """The steps of a run on prepared corpora: `check_sources` refuses those that cannot be used."""

    def _open(self, data: DataConfig, division: Division, seed: int, start_sequence: int) -> None:
        sources = check_sources(data, sequence_length=self._form.sequence_length)
        self._readers = [open_reader(source.manifest) for source in sources]
        self._skipped = SkippedWindows(data.skip)
        self._order = make_order(data, sources, sequence_length=self._form.sequence_length, seed=seed)

    def _sequence_after_step(self) -> int:
        return self._skipped.after(self.next_sequence, self._division.global_batch_size)

    def close(self) -> None:
        """End the reading thread."""
        for reader in self._readers:
            reader.close()
        super().close()

    def _micro_batches(self, start_sequence: int) -> Iterator[Batch]:
        division, size = self._division, self._division.micro_batch_size
        located = ((sequences, self._order.places(sequences)) for sequences in self._slices(start_sequence))
        ahead = rows_ahead(division.rows_of_step, division.world_size, self._form.sequence_length)
        for sequences, places in tell_ahead(located, self._readers, ahead):
            for begin in range(0, len(sequences), size):
                part = slice(begin, begin + size)
                of_batch = Places(*(array[part] for array in places))
                yield self._prepare(read_rows(self._readers, of_batch, sequences[part], size, self._form))

    def _slices(self, position: int) -> Iterator[np.ndarray]:
        """Yield this rank's sequences, of as many steps at a time as is quick to locate together."""
        division, own = self._division, self._division.rows_of_step
        num_steps = max(1, min(LOCATED_ROWS // own, MAX_SPAN // division.global_batch_size))
        while True:
            steps = self._skipped.read_from(position, num_steps * division.global_batch_size)
            position = int(steps[-1]) + 1
            yield steps.reshape(num_steps, division.world_size, own)[:, division.rank].ravel()


class Prefetcher:
    """An iterator that runs another one in a thread, up to `depth` items ahead.

    An error of the iterator is raised by `next` unchanged, after the items before it.
    """

    def __init__(self, items: Iterator[Batch], depth: int) -> None:
        self._items = items
        # Two simple queues, for items and for free slots, need half the time of one bounded queue.
        self._ready: queue.SimpleQueue[Batch | BaseException] = queue.SimpleQueue()
        self._room: queue.SimpleQueue[None] = queue.SimpleQueue()
        for _ in range(depth):
            self._room.put(None)
        self._stopping = threading.Event()
        # A new thread starts on CUDA device 0, and pinning memory from there would open a context on it.
        self._device = torch.cuda.current_device() if torch.cuda.is_available() else None
        self._thread = threading.Thread(target=self._run, name="bigtx-prefetch", daemon=True)
        self._thread.start()

    def __iter__(self) -> Prefetcher:
        return self

    def __next__(self) -> Batch:
        if self._stopping.is_set():
            raise StopIteration
        item = self._ready.get()
        if isinstance(item, BaseException):
            self.close()
            raise item
        self._room.put(None)
        return item

    def close(self) -> None:
        """End the thread and wait for it; more calls do nothing."""
        self._stopping.set()
        self._room.put(None)
        self._thread.join()

    def _run(self) -> None:
        try:
            if self._device is not None:
                torch.cuda.set_device(self._device)
            for item in self._items:
                self._room.get()
                if self._stopping.is_set():
                    return
                self._ready.put(item)
            self._ready.put(StopIteration())
        except BaseException as error:
            self._ready.put(error)


class ValidationBatches(Sequence[Batch]):
    """This rank's batches of rows of a corpus's validation split: at even distances over the whole split, in order.

    Every rank has the same number of batches, so that collectives match; rows beyond the end are padding without
    labels.

    Args:
        path: the folder or URL of the corpus, as in `data.sources.NAME.path`.
        max_sequences: the most rows over all ranks.
        prepare: the objective's function of the rows.

    Raises:
        DataError: the corpus has no complete validation split.

    Attributes:
        manifest: the manifest of the split; `bytes_per_token` converts a loss per token to one per byte.
        num_sequences: rows over all ranks, padding not counted.
    """

    def __init__(
        self,
        path: str | Place,
        form: RowFormat,
        *,
        micro_batch_size: int,
        max_sequences: int,
        rank: int,
        world_size: int,
        prepare: Prepare = as_they_are,
    ) -> None:
        self.manifest = Manifest.load(as_place(path) / "validation")
        # The rows up to the end of each block.
        self._ends = np.cumsum(rows_of_blocks(self.manifest.blocks["tokens"], form.sequence_length))
        self.num_sequences = min(max_sequences, int(self._ends[-1]))
        self._reader, self._form, self._prepare = open_reader(self.manifest), form, prepare
        self._size, self._rank, self._world_size = micro_batch_size, rank, world_size

    def __len__(self) -> int:
        return -(-self.num_sequences // (self._size * self._world_size))

    def __getitem__(self, index: int) -> Batch:  # type: ignore[override]
        if not 0 <= index < len(self):
            raise IndexError(index)
        for coming in range(index, min(index + BATCHES_AHEAD, len(self))):
            self._reader.expect(self._locate(coming)[1].block.tolist())
        numbers, places = self._locate(index)
        return self._prepare(read_rows([self._reader], places, numbers, self._size, self._form))

    def _locate(self, index: int) -> tuple[np.ndarray, Places]:
        """Return the numbers of a batch's rows among all that are read, and their places."""
        first = (index * self._world_size + self._rank) * self._size
        numbers = np.arange(first, min(first + self._size, self.num_sequences))
        rows = numbers * int(self._ends[-1]) // self.num_sequences
        blocks = np.searchsorted(self._ends, rows, side="right")
        before = np.where(blocks > 0, self._ends[blocks - 1], 0)
        return numbers, Places(np.zeros_like(rows), np.zeros_like(rows), blocks, rows - before)
