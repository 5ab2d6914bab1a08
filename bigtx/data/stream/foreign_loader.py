"""The batches of a run on foreign shards: rows that worker processes tokenize, dealt in turn."""

from __future__ import annotations

import atexit
import dataclasses
import itertools
import multiprocessing
import queue
import signal
import threading
import traceback
from collections import deque
from collections.abc import Iterator
from typing import Any, cast

import numpy as np

from bigtx.config.schema import DataConfig
from bigtx.data.corpus.blocks import BlockReader
from bigtx.data.stream.foreign import Row, RowStream, num_workers
from bigtx.data.stream.loader import Division, RowLoader
from bigtx.data.stream.order import Places
from bigtx.data.stream.rows import Batch, read_rows
from bigtx.data.workers import end_with_parent
from bigtx.utils.errors import BigtxError, DataError
from bigtx.utils.processes import STOP_SIGNALS

_PARCEL_ROWS = 16
"""Rows that a worker sends at once."""
_PARCELS_AHEAD = 4
_POLL_SECONDS = 1.0


class ForeignLoader(RowLoader):
    """The steps of a run on foreign shards.

    Its state is the number of sequences consumed too, but to return to a position it reads everything before it again.
    With another number of ranks or workers the shards are split differently, and the order changes.

    Args:
        data: the config, with its section `foreign` and how rows are cut.
        The others are those of `RowLoader`.

    Raises:
        DataError: a shard is refused; raised by `next`.
    """

    def _open(self, data: DataConfig, division: Division, seed: int, start_sequence: int) -> None:
        length, world_size = self._form.sequence_length, division.world_size
        workers = num_workers(data.foreign, world_size)
        stream = RowStream(data.foreign, length, seed, division.rank, world_size, 0, workers)
        self._workers = _Workers(stream, skip_rows=start_sequence // world_size)

    def close(self) -> None:
        """End the processes and the reading thread."""
        self._workers.close()
        super().close()

    def _micro_batches(self, start_sequence: int) -> Iterator[Batch]:
        rows, division, size = self._workers.rows(), self._division, self._division.micro_batch_size
        zeros = np.zeros(size, np.int64)
        places = Places(zeros, zeros, np.arange(size), zeros)
        for step_start in itertools.count(start_sequence, division.global_batch_size):
            first = step_start + division.rank * division.rows_of_step
            for begin in range(first, first + division.rows_of_step, size):
                reader = cast(BlockReader, _RowReader([next(rows) for _ in range(size)]))
                yield self._prepare(read_rows([reader], places, np.arange(begin, begin + size), size, self._form))


@dataclasses.dataclass(frozen=True)
class _RowReader:
    """A reader whose blocks have one row each."""

    rows: list[Row]

    def block(self, number: int) -> Row:
        return self.rows[number]


class _Workers:
    """Processes that each fill a queue.

    Torch's workers are not used: they send data by /dev/shm, which is small in containers, and one that ends by a
    signal raises an error at any point of the trainer.

    Args:
        stream: the stream of worker 0; the others differ in the number.
        skip_rows: the rows of this rank that were used already.
    """

    def __init__(self, stream: RowStream, *, skip_rows: int) -> None:
        context = multiprocessing.get_context("spawn")
        count = stream.num_workers
        self._closed = threading.Event()
        self._queues: list[Any] = [context.Queue(_PARCELS_AHEAD) for _ in range(count)]
        self._first = skip_rows % count
        self._processes = []
        # The terminal, or SLURM, sends its signals to all processes of a job; only the trainer handles them, which
        # may still need rows for its last step.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        try:
            for number, parcels in enumerate(self._queues):
                skip = (skip_rows - number + count - 1) // count
                of_worker = dataclasses.replace(stream, worker=number)
                process = context.Process(target=_work, args=(of_worker, skip, parcels), daemon=True)
                process.start()
                self._processes.append(process)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        # Before multiprocessing's own exit handler, which would wait for processes that ignore SIGTERM.
        atexit.register(self.close)

    def rows(self) -> Iterator[Row]:
        """Yield the rows of all workers, in turn.

        Raises:
            DataError: a shard is refused, or a process was killed.
        """
        ready: list[deque[Row]] = [deque() for _ in self._queues]
        number = self._first
        while not self._closed.is_set():
            if not ready[number]:
                ready[number].extend(self._take(number))
                continue
            yield ready[number].popleft()
            number = (number + 1) % len(ready)

    def close(self) -> None:
        """End the processes; more calls do nothing."""
        self._closed.set()
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        atexit.unregister(self.close)

    def _take(self, number: int) -> list[Row]:
        process = self._processes[number]
        while not self._closed.is_set():
            is_alive = process.is_alive()
            try:
                parcel = self._queues[number].get(timeout=_POLL_SECONDS)
            except queue.Empty:
                if is_alive or self._closed.is_set():
                    continue
                raise DataError(
                    f"A process that tokenizes data.foreign ended with status {process.exitcode}, most often "
                    "because memory ran out; lower data.foreign.num_workers or data.foreign.shuffle_buffer."
                ) from None
            if isinstance(parcel, BaseException):
                raise parcel
            return list(parcel)
        return []


def _work(stream: RowStream, skip: int, parcels: Any) -> None:
    """Fill a queue with lists of rows; an error is the last thing in it."""
    end_with_parent()
    stream.announce()
    try:
        parcel: list[Row] = []
        for number, row in enumerate(stream.rows()):
            if number < skip:
                continue
            parcel.append(row)
            if len(parcel) == _PARCEL_ROWS:
                parcels.put(parcel)
                parcel = []
    except BigtxError as error:
        parcels.put(parcel)
        parcels.put(error)
    except Exception:
        parcels.put(RuntimeError(traceback.format_exc()))
