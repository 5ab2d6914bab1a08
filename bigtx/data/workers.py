"""Worker processes: functions over many items, here or in several processes, with results in the items' order."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

from bigtx.utils.errors import DataError

Item = TypeVar("Item")
Result = TypeVar("Result")

_POLL_SECONDS = 0.2
_ITEMS_AHEAD = 512
"""The number of items that are submitted ahead of the slowest one."""


class StoppedError(Exception):
    """Raised inside a worker whose results are not needed any more."""


class _Here:
    """The progress of this process: two counts that only it writes, and whether it is to end early."""

    def __init__(self) -> None:
        self.counters: Any = [0, 0]
        self.slot = 0
        self.is_stopping: Callable[[], bool] = lambda: False
        self.turn: AbstractContextManager[Any] = nullcontext()


_here = _Here()


def advance(text_bytes: int, tokens: int) -> None:
    """Count the finished work of this process, for the progress line.

    Raises:
        StoppedError: the job ends early, so the current work is not needed.
    """
    _here.counters[_here.slot] += text_bytes
    _here.counters[_here.slot + 1] += tokens
    if _here.is_stopping():
        raise StoppedError


def alone() -> AbstractContextManager[Any]:
    """Wait for the lock of work that only one process may do at a time; leaving the context releases it."""
    return _here.turn


class Workers:
    """Worker processes that run functions over items.

    Args:
        num_processes: the number of processes; 1 runs the functions in this process.
        set_up: called once in each process before its first item.
        watch: called at intervals while results are awaited, with the sums of the counts of `advance`.
    """

    def __init__(
        self, num_processes: int, set_up: Callable[[], None], watch: Callable[[int, int], None] = lambda *_: None
    ) -> None:
        self.num_processes = num_processes
        self._watch = watch
        self._pool: ProcessPoolExecutor | None = None
        self._pending: deque[Future[Any]] = deque()
        if num_processes == 1:
            self._counters: Any = [0, 0]
            _here.counters, _here.slot, _here.is_stopping = self._counters, 0, self._watch_here
            set_up()
            return
        context = multiprocessing.get_context("spawn")
        self._stopping, slots = context.Event(), context.SimpleQueue()
        # Each process writes its own two entries, so they need no lock.
        self._counters = context.Array("Q", 2 * num_processes, lock=False)
        for slot in range(num_processes):
            slots.put(2 * slot)
        arguments = (set_up, self._counters, slots, self._stopping, context.Lock())
        self._pool = ProcessPoolExecutor(num_processes, context, _start, arguments)

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool:
            self._stopping.set()
            self._pool.shutdown(cancel_futures=True)

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """Yield the function's results, in the order of the items.

        Raises:
            DataError: a process was killed.
        """
        if self._pool is None:
            yield from map(function, items)
            return
        try:
            for item in items:
                self._submit(function, item)
                if len(self._pending) >= _ITEMS_AHEAD:
                    yield self._first()
            while self._pending:
                yield self._first()
        except BrokenProcessPool as error:
            raise DataError(
                "A process was killed, most often because memory ran out. Run the same command again; it "
                f"continues from here, with fewer processes, e.g. num_processes={max(1, self.num_processes // 2)}."
            ) from error

    def _submit(self, function: Callable[[Item], Any], item: Item) -> None:
        assert self._pool is not None
        # Processes start at the first call, with the mask of this thread: Ctrl-C, which the terminal sends to all of
        # them, is for the parent alone.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        try:
            self._pending.append(self._pool.submit(function, item))
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def _first(self) -> Any:
        while not wait([self._pending[0]], _POLL_SECONDS).done:
            self._watch(sum(self._counters[0::2]), sum(self._counters[1::2]))
        return self._pending.popleft().result()

    def _watch_here(self) -> bool:
        self._watch(*self._counters)
        return False


def end_with_parent() -> None:
    """Make this process, one of multiprocessing's, end with its parent."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _start(set_up: Callable[[], None], counters: Any, slots: Any, stopping: Any, turn: Any) -> None:
    """Set up a process, which ends with its parent."""
    end_with_parent()
    _here.counters, _here.slot, _here.is_stopping = counters, slots.get(), stopping.is_set
    _here.turn = turn
    set_up()
