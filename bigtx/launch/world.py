"""Which processes make up a run: those that a launcher has started already, or those to start on this machine.

In this order, the first that holds:

1. RANK and WORLD_SIZE are set (deepspeed, torchrun, ...): this process is a rank.
2. srun has started several tasks on a node: each is a rank.
3. srun has started one task on each of several nodes: each starts the ranks of its node.
4. Otherwise all ranks are started here. SLURM's variables in a batch script or an interactive shell do not change that.
"""

from __future__ import annotations

import os
import re
import socket
from dataclasses import dataclass

from bigtx.utils import hardware
from bigtx.utils.errors import LaunchError
from bigtx.utils.processes import is_launched, launcher_problem

FIRST_PORT, NUM_PORTS = 20_000, 12_000
"""Ports below those that Linux gives to clients, for ranks of several machines."""
_LARGEST_STEP = 0xFFFF_0000
"""SLURM's numbers of steps that srun did not start (the batch script, an interactive shell) are larger."""


@dataclass(frozen=True)
class World:
    """The ranks to start.

    Attributes:
        num_local: ranks on this machine, and on each of the others.
        num_nodes, node: machines, and this one's place among them.
        address: where rank 0 is.
        port: where the ranks meet; 0 for a free one of this machine.
    """

    num_local: int
    num_nodes: int = 1
    node: int = 0
    address: str = "127.0.0.1"
    port: int = 0

    @property
    def size(self) -> int:
        """Ranks on all machines together."""
        return self.num_nodes * self.num_local


def find_world(num_ranks: int | None, *, divides: int) -> World | None:
    """The ranks to start from this process; None where it is a rank itself.

    Args:
        num_ranks: that the user asks for on this machine.
        divides: how many ranks could share the work; without GPUs, no default exceeds what divides it.

    Raises:
        LaunchError: the environment contradicts itself, or has fewer GPUs than `num_ranks`.
    """
    if problem := launcher_problem():
        raise LaunchError(problem)
    if is_launched():
        _refuse_count(num_ranks)
        return None
    tasks, nodes = _number("SLURM_STEP_NUM_TASKS"), _number("SLURM_STEP_NUM_NODES")
    if not _is_srun_task() or tasks is None or nodes is None or tasks == 1:
        return World(_num_local(num_ranks, divides))
    address = os.environ.get("MASTER_ADDR") or first_host(os.environ["SLURM_STEP_NODELIST"])
    port = _number("MASTER_PORT") or _port_of_job()
    if tasks > nodes:
        _refuse_count(num_ranks)
        _take_srun_rank(tasks, address, port)
        return None
    return World(_num_local(num_ranks, divides), nodes, _number("SLURM_NODEID") or 0, address, port)


def first_host(names: str) -> str:
    """The first host of SLURM's short form, such as `node[03-07,12],login`.

    >>> first_host("node[03-07,12],login")
    'node03'
    """
    found = re.match(r"([^\[,]*)(?:\[(\w+)[^\]]*\]([^,]*))?", names)
    assert found is not None
    return "".join(part or "" for part in found.groups())


def _num_local(num_ranks: int | None, divides: int) -> int:
    num_gpus = hardware.num_gpus()
    if num_ranks is None:
        groups = hardware.num_core_groups()
        return num_gpus or next(count for count in range(groups, 0, -1) if divides % count == 0)
    if num_gpus and num_ranks > num_gpus:
        raise LaunchError(
            f"--ranks {num_ranks}: this machine shows {num_gpus} GPUs, and each rank needs one of its own; ask for at "
            "most that many, or show more of them (CUDA_VISIBLE_DEVICES)"
        )
    return num_ranks


def _refuse_count(num_ranks: int | None) -> None:
    if num_ranks is not None:
        raise LaunchError(
            f"--ranks {num_ranks}: another launcher has started the ranks already; leave --ranks out, or start "
            "`bigtx` without that launcher"
        )


def _is_srun_task() -> bool:
    """Whether srun started this process or one above it. SLURM sets SLURM_PROCID in batch scripts too."""
    step = _number("SLURM_STEP_ID")
    return step is not None and step < _LARGEST_STEP and "SLURM_PROCID" in os.environ


def _take_srun_rank(tasks: int, address: str, port: int) -> None:
    """Write this task's place into the variables that launchers set."""
    os.environ.update(
        RANK=os.environ["SLURM_PROCID"],
        LOCAL_RANK=os.environ["SLURM_LOCALID"],
        WORLD_SIZE=str(tasks),
        LOCAL_WORLD_SIZE=str(_tasks_of_node(os.environ.get("SLURM_STEP_TASKS_PER_NODE", "1"))),
        MASTER_ADDR=address,
        MASTER_PORT=str(port),
    )


def _tasks_of_node(text: str) -> int:
    """This node's number in SLURM's short form, such as `4(x2),3`."""
    node = _number("SLURM_NODEID") or 0
    for part in text.split(","):
        count, _, times = part.partition("(x")
        node -= int(times.rstrip(")") or 1) if times else 1
        if node < 0:
            return int(count)
    return 1


def _port_of_job() -> int:
    """The same on all nodes, and another for each job and step."""
    job, step = _number("SLURM_JOB_ID") or 0, _number("SLURM_STEP_ID") or 0
    return FIRST_PORT + (7 * job + step) % NUM_PORTS


def _number(name: str) -> int | None:
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() else None


def hold_free_port() -> socket.socket:
    """A socket on a free port of this machine, which nobody else is given while the socket is open.

    It does not listen, so that rank 0 can take the port.
    """
    held = socket.socket()
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.bind(("127.0.0.1", 0))
    return held
