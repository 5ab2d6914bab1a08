"""Several ranks in threads of one process, for what needs of them no more than to agree."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any


class Together:
    """Ranks in threads of one process."""

    def __init__(self, world_size: int, *, timeout_seconds: float = 60.0) -> None:
        self.timeout_seconds = timeout_seconds
        self.world_size, self._values = world_size, [None] * world_size
        self._barrier = threading.Barrier(world_size, timeout=30)
        self._posted: dict[tuple[str, int], Any] = {}

    def run(self, act: Callable[[Any], Any]) -> list[Any]:
        """What each rank's act gives, or raises."""
        found: list[Any] = [None] * self.world_size

        def one(rank: int) -> None:
            ranks = SimpleNamespace(rank=rank, world_size=self.world_size, timeout_seconds=self.timeout_seconds)
            ranks.describe = lambda ranks: [f"rank {rank} on here" for rank in ranks]
            ranks.gather = lambda value: self._gather(rank, value)
            ranks.from_first = lambda value: self._gather(rank, value)[0]
            ranks.sum = lambda numbers: [sum(column) for column in zip(*self._gather(rank, numbers), strict=True)]
            ranks.post = lambda name, value: self._posted.update({(name, rank): json.loads(json.dumps(value))})
            ranks.posted = self._take_posted
            try:
                found[rank] = act(ranks)
            except Exception as error:
                found[rank] = error

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(self.world_size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return found

    def _take_posted(self, name: str) -> list[Any] | None:
        keys = [(name, rank) for rank in range(self.world_size)]
        if not all(key in self._posted for key in keys):
            return None
        return [self._posted.pop(key) for key in keys]

    def _gather(self, rank: int, value: Any) -> list[Any]:
        self._values[rank] = value
        self._barrier.wait()
        values = list(self._values)
        self._barrier.wait()
        return values
