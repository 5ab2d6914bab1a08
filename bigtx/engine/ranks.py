"""Connect the ranks of a run, and exchange small values between them.

The values go over a separate gloo group on the CPU, so that the exchange does not wait for the accelerator.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Store

from bigtx.utils.errors import BigtxError, LaunchError, say_from_any_rank
from bigtx.utils.hardware import node_of_core
from bigtx.utils.heartbeat import beat, kernel_stack_of, state_of, wait_for_ranks
from bigtx.utils.processes import STACKS_SIGNAL, hold_free_port, is_launched, start_of, stopped_at_once

T = TypeVar("T")

MEET_SECONDS = 50.0
"""How long a rank tries to reach rank 0."""

STORE_SECONDS = 5.0
"""How long rank 0's store may take to answer. It does not answer while rank 0 is stopped."""
GATHER_SECONDS = 3.0
"""How much later than the first rank the others may reach the time-out of the same collective."""
STACKS_SECONDS = 0.3
"""How long a rank that did not answer may take to write its stacks."""


class Ranks:
    """All ranks of the run.

    Attributes:
        rank: this process's number among all ranks.
        world_size: the number of ranks.
        local_rank: this process's number among the ranks of its machine.
        places: each rank's host, process and the process's start (`start_of`).
    """

    def __init__(self, *, timeout_seconds: float) -> None:
        """Join the other ranks; a process started alone becomes the only rank.

        Args:
            timeout_seconds: how long a collective of any process group waits for the other ranks.

        Raises:
            LaunchError: the ranks do not find each other, or two of them have the same GPU.
        """
        set_environment_of_single_process()
        import deepspeed

        from bigtx.engine.builds import leave_out_unused, take_turns

        use_own_device()
        leave_out_unused()
        take_turns()
        self.timeout_seconds = timeout_seconds
        timeout = timedelta(seconds=timeout_seconds)
        wait_in_every_group(timeout)
        try:
            with stopped_at_once():
                reach_first(MEET_SECONDS)
                deepspeed.init_distributed(timeout=timeout, verbose=False)
        except (dist.DistNetworkError, dist.DistStoreError) as error:
            place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            raise LaunchError(
                f"the ranks cannot meet at {place}: {str(error).splitlines()[0]}; if another run uses that port, "
                "start the run by `bigtx pretrain` or `bigtx finetune`, which take a free one, or name one to your "
                "launcher, e.g. deepspeed --master_port 29501 ..."
            ) from error
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.local_rank = int(os.environ["LOCAL_RANK"])
        self._group = dist.new_group(backend="gloo")
        gathered = self.gather((socket.gethostname(), own_gpu(), os.getpid(), start_of(os.getpid())))
        self.places: list[tuple[str, int, str | None]] = [(host, pid, start) for host, _, pid, start in gathered]
        if problem := shared_gpus([(host, gpu) for host, gpu, _, _ in gathered]):
            raise LaunchError(problem)
        self._share_cores(binds=deepspeed.get_accelerator().device_name() == "cpu")

    def _share_cores(self, *, binds: bool) -> None:
        """Divide the cores between the ranks that were given the same ones, as launchers that bind their ranks do.

        torch would start a thread for each core in every rank: with a GPU too, where an offloaded optimizer works.

        Args:
            binds: whether this rank keeps to its own cores; without this, the system has run two ranks on one of two
                cores for minutes. The threads that feed a GPU may use all of them.
        """
        if not hasattr(os, "sched_setaffinity"):
            return
        # Cores that share memory are next to each other in this order, so that a rank's cores are on one NUMA node.
        cores = sorted(os.sched_getaffinity(0), key=lambda core: (node_of_core(core), core))
        own = (socket.gethostname(), cores)
        peers = [rank for rank, other in enumerate(self.gather(own)) if other == own]
        size, place = len(cores) // len(peers), peers.index(self.rank)
        if binds and size and len(peers) > 1:
            os.sched_setaffinity(0, cores[place * size : (place + 1) * size])
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, size))

    def is_first_of_host(self, *, among: int) -> bool:
        """Return whether this is the first rank of its host, and its host one of the first so many.

        Args:
            among: the number of hosts.
        """
        firsts: dict[str, int] = {}
        for rank, (host, *_) in enumerate(self.places):
            firsts.setdefault(host, rank)
        return self.rank in list(firsts.values())[:among]

    def notes_on_devices(self) -> list[str]:
        """Return a note for each machine that has more GPUs than ranks. All ranks must call it."""
        visible = torch.cuda.device_count() if torch.cuda.is_available() else 0
        places = self.gather((socket.gethostname(), visible))
        ranks_of, seen = Counter(host for host, _ in places), dict(places)
        return [
            f"note: {count} of {seen[host]} GPUs of {host} {'is' if count == 1 else 'are'} used; `bigtx pretrain` and "
            "`bigtx finetune` use all of them without another launcher, or as many as --ranks says"
            for host, count in ranks_of.items()
            if count < seen[host]
        ]

    def sum(self, numbers: Sequence[int]) -> list[int]:
        """Return the element-wise sums over all ranks."""
        return self.begin_sum(numbers)()

    def begin_sum(self, numbers: Sequence[int]) -> Callable[[], list[int]]:
        """Begin to compute the element-wise sums over all ranks, in gloo's threads.

        Returns:
            A function that waits for the sums, and returns them.
        """
        tensor = torch.tensor(list(numbers), dtype=torch.int64)
        work = dist.all_reduce(tensor, group=self._group, async_op=True)

        def sums() -> list[int]:
            wait_for_ranks(work)
            beat()
            return tensor.tolist()

        return sums

    def gather(self, value: Any) -> list[Any]:
        """Return on every rank the values of all ranks, in the order of ranks. The values must be small."""
        gathered: list[Any] = [None] * self.world_size
        dist.all_gather_object(gathered, value, group=self._group)
        beat()
        return gathered

    def from_first(self, value: Any) -> Any:
        """Return rank 0's value on every rank."""
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self._group)
        beat()
        return values[0]

    def on_first(self, action: Callable[[], T]) -> T | None:
        """Call the action on rank 0. Returns its result there, None on the other ranks.

        Raises:
            BigtxError: on every rank, if the action raised it.
        """
        result, failure = None, None
        if self.rank == 0:
            try:
                result = action()
            except BigtxError as error:
                failure = error
        failure = self.from_first(failure)
        if failure is not None:
            raise failure
        return result

    def once(self, action: Callable[[], T]) -> T:
        """Call the action on rank 0, and return its result on every rank.

        Raises:
            BigtxError: on every rank, if the action raised it.
        """
        return self.from_first(self.on_first(action))

    def post(self, name: str, value: Any) -> None:
        """Leave a value of JSON's types for rank 0, which `posted` returns. Any thread may call it.

        Raises:
            RuntimeError: rank 0 is gone.
        """
        dist.distributed_c10d._get_default_store().set(f"bigtx/{name}/{self.rank}", json.dumps(value))

    def posted(self, name: str) -> list[Any] | None:
        """Return on rank 0 what all ranks have left under a name, in their order; None until all have. The values are
        then deleted.
        """
        store = dist.distributed_c10d._get_default_store()
        keys = [f"bigtx/{name}/{rank}" for rank in range(self.world_size)]
        if not store.check(keys):
            return None
        values = [json.loads(store.get(key)) for key in keys]
        for key in keys:
            store.delete_key(key)
        return values

    def is_first_to_fail(self) -> bool:
        """Return whether this rank is the first to ask; the first one reports the failure for all.

        The store of rank 0 decides. If rank 0 was killed or is stopped, one rank of each machine reports.
        """
        return self._ask_first(_is_first_to_fail, STORE_SECONDS, otherwise=self._reports_without_first())

    def silent(self) -> list[int] | None:
        """Return the ranks known not to answer; None where another rank reports them.

        Each rank calls it whose collective has reached its time-out.
        """

        def missing(store: Store) -> list[int] | None:
            store.set(f"bigtx/waited/{self.rank}", "")
            if not _is_first_to_fail(store):
                return None
            time.sleep(GATHER_SECONDS)
            return [rank for rank in range(self.world_size) if not store.check([f"bigtx/waited/{rank}"])]

        return self._ask_first(
            missing, STORE_SECONDS + GATHER_SECONDS, otherwise=[0] if self._reports_without_first() else None
        )

    def describe(self, ranks: Sequence[int]) -> list[str]:
        """Return ranks with their hosts, and whether a process of this host is stopped."""
        return [
            f"rank {rank} on {self.places[rank][0]}"
            + " (stopped: state T)" * (self._is_here(rank) and state_of(self.places[rank][1]) == "T")
            for rank in ranks
        ]

    def end_silent(self, ranks: Sequence[int], folder: Path) -> None:
        """Kill those of the ranks that are on this host, since the run is over, once their stacks are written.

        Args:
            folder: where the kernel's view of them is written; they write their own stacks to their logs.
        """
        for rank in filter(self._is_here, ranks):
            pid, file = self.places[rank][1], folder / f"rank-{rank:05d}.txt"
            with contextlib.suppress(OSError):
                os.kill(pid, STACKS_SIGNAL)
                time.sleep(STACKS_SECONDS)
                if not file.exists():
                    file.write_text(kernel_stack_of(pid))
                os.kill(pid, signal.SIGKILL)

    def _is_here(self, rank: int) -> bool:
        host, pid, start = self.places[rank]
        return host == socket.gethostname() and start is not None and start_of(pid) == start

    def _reports_without_first(self) -> bool:
        return self.rank == 1 or self.local_rank == 0

    @staticmethod
    def _ask_first(question: Callable[[Store], T], seconds: float, *, otherwise: T) -> T:
        """Return the answer of rank 0's store; `otherwise` if it is gone or late. torch would wait without an end."""
        answers: list[T] = []

        def ask() -> None:
            with contextlib.suppress(RuntimeError, ValueError):
                answers.append(question(dist.distributed_c10d._get_default_store()))

        thread = threading.Thread(target=ask, daemon=True)
        thread.start()
        thread.join(seconds)
        return answers[0] if answers else otherwise

    def barrier(self) -> None:
        """Wait for every rank."""
        dist.barrier(group=self._group)

    def close(self) -> None:
        """Leave the process groups."""
        dist.destroy_process_group()


def _is_first_to_fail(store: Store) -> bool:
    return store.add("bigtx/failures", 1) == 1


def wait_in_every_group(timeout: timedelta) -> None:
    """Make this the time-out of every process group that is created afterwards.

    DeepSpeed creates its own groups, some of them late, without a time-out. They would have torch's default, 30 minutes
    for gloo and 10 for NCCL. `torch.distributed` reads these names each time it creates a group.
    """
    dist.distributed_c10d.default_pg_timeout = timeout
    dist.distributed_c10d.default_pg_nccl_timeout = timeout  # type: ignore[attr-defined]


def set_environment_of_single_process() -> None:
    """Set the variables that a launcher would have set, for a process that was started without one."""
    if is_launched():
        return
    with hold_free_port() as held:
        port = held.getsockname()[1]
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))


def reach_first(seconds: float) -> None:
    """Wait until rank 0's address answers. torch alone would wait as long as `engine.timeout`.

    Args:
        seconds: how long to wait at most.

    Raises:
        LaunchError: the address does not answer in time.
    """
    address, port, rank = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), os.environ["RANK"]
    if rank == "0":
        return
    deadline = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((address, port), timeout=max(0.1, min(5.0, deadline - time.monotonic()))).close()
            return
        except OSError as error:
            if time.monotonic() >= deadline:
                raised = LaunchError(
                    f"rank {rank} on {socket.gethostname()} does not reach rank 0 at {address}:{port}: "
                    f"{error.strerror or error}. Read the messages of rank 0, or give its machine and a free port to "
                    "the launcher (MASTER_ADDR and MASTER_PORT, the same for all ranks)"
                )
                say_from_any_rank(raised)
                raise raised from error
        time.sleep(0.2)


def own_gpu() -> str | None:
    """Return an id of this process's GPU that no other GPU has; None without a GPU."""
    return (
        str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid) if torch.cuda.is_available() else None
    )


def shared_gpus(places: Sequence[tuple[str, str | None]]) -> str | None:
    """Return a message about ranks that have the same GPU; None if each has its own.

    Args:
        places: each rank's host and GPU.
    """
    ranks_of: dict[tuple[str, str | None], list[int]] = {}
    for rank, place in enumerate(places):
        ranks_of.setdefault(place, []).append(rank)
    for (host, gpu), ranks in ranks_of.items():
        if gpu is not None and len(ranks) > 1:
            return (
                f"ranks {', '.join(map(str, ranks))} on {host} have the same GPU ({gpu}); start one rank for each GPU: "
                "`bigtx pretrain` and `bigtx finetune` do it by themselves, and srun with --ntasks-per-node=1"
            )
    return None


def use_own_device() -> None:
    """Select the accelerator of this process's local rank, if there are accelerators.

    By default each process would use the first accelerator. A launcher may show each process only its own one, as `srun
    --gpus-per-task=1` does; then the first one is right for every local rank. `shared_gpus` finds ranks that were shown
    the same one.

    Raises:
        LaunchError: this machine has more processes than accelerators that they can see.
    """
    import deepspeed

    accelerator = deepspeed.get_accelerator()
    if accelerator.device_name() == "cpu":
        return
    local_rank, count = int(os.environ.get("LOCAL_RANK", "0")), accelerator.device_count()
    if count == 1 and local_rank > 0:
        local_rank, os.environ["LOCAL_RANK"] = 0, "0"  # DeepSpeed reads the device from it.
    if local_rank >= count:
        raise LaunchError(
            f"local rank {local_rank} has no device of its own: this machine shows {count} to it; start at most that "
            "many ranks on it (bigtx --ranks, deepspeed --num_gpus), or show it more (CUDA_VISIBLE_DEVICES)"
        )
    accelerator.set_device(local_rank)
