"""Measure the all-reduces of pairs of machines, by gloo or NCCL, even when some machines do not answer.

Each pair has its own process group, and its result goes through the store of the first machine. Nothing waits for all
machines, so a machine that hangs costs its partners only the time of a round.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store

from bigtx.utils import processes

START_SECONDS = 120.0
"""How long ranks wait for each other before the first round: importing torch may take a while."""
ROUND_SECONDS = 15.0
"""A pair that takes longer gives no answer."""
MEASURE_SECONDS = 1.0
"""How long the repetitions of a pair should take; the time of the first all-reduce decides their number and size."""
MOST_BYTES = {"cpu": 16 << 20, "cuda": 64 << 20}
_LEAST_BYTES, _MOST_REPEATS = 1 << 20, 5


class Meeting:
    """The ranks of all machines, connected through the store of the first one.

    Args:
        num_nodes: the number of machines.
        node: this machine's number.
    """

    def __init__(self, num_nodes: int, node: int) -> None:
        self._node, self._num_nodes = node, num_nodes
        self._rank, self._local_rank = processes.rank(), processes.local_rank()
        self._num_local = processes.world_size() // num_nodes
        self._device = torch.device("cuda", self._local_rank) if torch.cuda.is_available() else torch.device("cpu")
        self._store = dist.TCPStore(  # type: ignore[attr-defined]
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=self._rank == 0,
            timeout=timedelta(seconds=START_SECONDS),
            wait_for_workers=False,
        )

    def measure(self, rounds: Sequence[Sequence[tuple[int, int]]]) -> dict[tuple[int, int], float]:
        """Take part in all rounds.

        Args:
            rounds: for each round the pairs of machines; all ranks of both machines measure together.

        Returns:
            Bytes per second of this machine's pairs, as NCCL's tests count them (bus bandwidth: for n ranks, the size
            of the tensor times 2 (n - 1) / n, divided by the time). 0 for a pair that gave no answer.
        """
        if self._store.add("ready", 1) == processes.world_size():
            self._store.set("go", "")
        with contextlib.suppress(RuntimeError):  # A missing machine does not answer its partners later.
            self._store.wait(["go"], timedelta(seconds=START_SECONDS))
        begin, speeds = time.monotonic(), {}
        for turn, pairs in enumerate(rounds):
            for pair in (each for each in pairs if self._node in each):
                left = begin + (turn + 1) * ROUND_SECONDS - time.monotonic()
                try:
                    speeds[pair] = self._speed(pair, timedelta(seconds=max(1.0, left)))
                except RuntimeError:
                    speeds[pair] = 0.0
        return speeds

    def report(self, facts: Mapping[str, Any]) -> None:
        """Send this machine's report to the first one."""
        self._store.set(f"report/{self._node}", json.dumps(facts))

    def reports(self, seconds: float) -> dict[int, dict[str, Any]]:
        """Return on the first machine the reports that arrived in time, by the machines' numbers."""
        keys = [f"report/{node}" for node in range(self._num_nodes)]
        with contextlib.suppress(RuntimeError):
            self._store.wait(keys, timedelta(seconds=seconds))
        return {node: json.loads(self._store.get(key)) for node, key in enumerate(keys) if self._store.check([key])}

    def _speed(self, pair: tuple[int, int], timeout: timedelta) -> float:
        """Measure the bytes per second between two machines.

        Raises:
            RuntimeError: the other one does not answer in time.
        """
        place = self._num_local * pair.index(self._node) + self._local_rank
        store = PrefixStore(f"pair/{pair[0]}-{pair[1]}", self._store)
        group = _group(store, place, 2 * self._num_local, timeout, self._device)
        self._seconds(group, 4)
        # All ranks choose size and repetitions by the slowest rank's time.
        taken = torch.tensor([self._seconds(group, _LEAST_BYTES)], device=self._device)
        group.allreduce([taken], op=dist.ReduceOp.MAX).wait()
        seconds = taken.item()
        growth = max(1.0, MEASURE_SECONDS / _MOST_REPEATS / seconds)
        num_bytes = int(min(MOST_BYTES[self._device.type], growth * _LEAST_BYTES))
        repeats = int(min(_MOST_REPEATS, max(1, MEASURE_SECONDS / seconds)))
        times = [self._seconds(group, num_bytes) for _ in range(repeats)]
        size = 2 * self._num_local
        return 2 * (size - 1) / size * num_bytes / statistics.median(times)

    def _seconds(self, group: Any, num_bytes: int) -> float:
        tensor = torch.zeros(-(-num_bytes // 4), dtype=torch.float32, device=self._device)
        self._wait_for_device()
        begin = time.perf_counter()
        group.allreduce([tensor]).wait()
        self._wait_for_device()
        return time.perf_counter() - begin

    def _wait_for_device(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def _group(store: Store, rank: int, size: int, timeout: timedelta, device: torch.device) -> Any:
    if device.type == "cpu":
        return dist.ProcessGroupGloo(store, rank, size, timeout)
    os.environ["TORCH_NCCL_BLOCKING_WAIT"] = "1"  # So that `wait` raises when the time is over.
    torch.cuda.set_device(device)
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timeout
    return dist.ProcessGroupNCCL(store, rank, size, options)
