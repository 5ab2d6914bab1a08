"""Find the processes of a run: those that a launcher has started already, or those to start on this machine.

The first case that applies decides:

1. Kubernetes has started this pod as one of several (PyTorchJob, TrainJob): each starts the ranks of its pod.
2. RANK and WORLD_SIZE are set (deepspeed, torchrun, ...): this process is a rank.
3. mpirun has started the processes, or srun with several tasks on a node: each process is a rank.
4. srun has started one task on each of several nodes: each task starts the ranks of its node.
5. Otherwise all ranks start here. SLURM's variables in a batch script or an interactive shell do not change that, but
   bigtx refuses to start there in a job of several nodes, since the other nodes would be idle.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from bigtx.utils import hardware
from bigtx.utils.errors import LaunchError
from bigtx.utils.processes import is_launched, launcher_name, launcher_problem, num_nodes, parent_of, start_of

FIRST_PORT, NUM_PORTS = 20_000, 6_000
"""Pairs of ports below those that Linux assigns to clients, for the ranks of several machines and their supervisors."""
MPI = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
)
"""Variables with rank, size, local rank and local size: of Open MPI, and of MPICH and Intel MPI."""
_LARGEST_STEP = 0xFFFF_0000
"""The bound of steps that srun started; the batch script and an interactive shell have larger numbers."""


@dataclass(frozen=True)
class World:
    """The ranks to start.

    Attributes:
        num_local: the number of ranks on this machine, and on each of the others.
        num_nodes: the number of machines.
        node: this machine's number, from 0.
        address: the host of rank 0.
        port: the port of rank 0 at which the ranks connect; 0 for a free one of this machine.
        launcher: the launcher that started this process on each machine, for messages.
        hosts: the machines' names in their order; empty where the launcher does not name them.
    """

    num_local: int
    num_nodes: int = 1
    node: int = 0
    address: str = "127.0.0.1"
    port: int = 0
    launcher: str | None = None
    hosts: tuple[str, ...] = ()

    @property
    def link_port(self) -> int:
        """Return the port at which the machines' supervisors connect."""
        return self.port + 1

    @property
    def size(self) -> int:
        """Return the number of ranks on all machines together."""
        return self.num_nodes * self.num_local

    def environment(self, local_rank: int, port: int) -> dict[str, str]:
        """Return the variables that launchers set for each rank.

        Args:
            local_rank: the rank's number on this machine.
            port: the port of rank 0.
        """
        return {
            "RANK": str(self.node * self.num_local + local_rank),
            "WORLD_SIZE": str(self.size),
            "LOCAL_RANK": str(local_rank),
            "LOCAL_WORLD_SIZE": str(self.num_local),
            "MASTER_ADDR": self.address,
            "MASTER_PORT": str(port),
        }


def find_world(num_ranks: int | None, *, divides: int) -> World | None:
    """Return the ranks to start from this process; None where it is a rank itself.

    Args:
        num_ranks: the number of ranks that the user asks for on this machine.
        divides: the number of equal parts of the work; without GPUs, the default number of ranks divides it.

    Raises:
        LaunchError: the environment contradicts itself, or has fewer GPUs than `num_ranks`.
    """
    if pods := _pods(num_ranks, divides):
        return pods
    _take_mpi_rank()
    if problem := launcher_problem():
        raise LaunchError(problem)
    tasks, nodes = _number("SLURM_STEP_NUM_TASKS"), _number("SLURM_STEP_NUM_NODES")
    if is_launched():
        _refuse_count(num_ranks)
        if _is_srun_task() and (nodes or 1) > 1 and num_nodes() == 1:
            raise LaunchError(
                f"srun has started {nodes} copies of a run of one machine: {launcher_name()} knows only this node; "
                "give it the others (torchrun --nnodes, deepspeed --hostfile), or write `srun --ntasks-per-node=1 "
                "bigtx ...`, which starts the ranks itself"
            )
        return None
    if not _is_srun_task():
        _refuse_idle_nodes(num_ranks)
        return World(_num_local(num_ranks, divides))
    if tasks is None or nodes is None or tasks == 1:
        return World(_num_local(num_ranks, divides))
    hosts = host_names(os.environ["SLURM_STEP_NODELIST"])
    address = os.environ.get("MASTER_ADDR") or hosts[0]
    port = _number("MASTER_PORT") or _port_of_job()
    if tasks > nodes:
        _refuse_count(num_ranks)
        _take_srun_rank(tasks, address, port)
        return None
    return World(_num_local(num_ranks, divides), nodes, _number("SLURM_NODEID") or 0, address, port, "srun", hosts)


def host_names(names: str) -> tuple[str, ...]:
    """Return the hosts of a list in SLURM's short form, such as `node[03-07,12],login`.

    >>> host_names("node[09-11],login")
    ('node09', 'node10', 'node11', 'login')
    """
    return tuple(host for part in re.findall(r"(?:[^\[,]|\[[^\]]*\])+", names) for host in _with_numbers(part))


def _with_numbers(name: str) -> list[str]:
    """Return the hosts of a name that may contain ranges of numbers."""
    found = re.search(r"\[([^\]]*)\]", name)
    if found is None:
        return [name]
    before, after = name[: found.start()], _with_numbers(name[found.end() :])
    numbers: list[str] = []
    for span in found[1].split(","):
        first, _, last = span.partition("-")
        ends = (int(first), int(last)) if last else None
        numbers += [str(each).zfill(len(first)) for each in range(ends[0], ends[1] + 1)] if ends else [first]
    return [before + number + rest for number in numbers for rest in after]


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


def _refuse_idle_nodes(num_ranks: int | None) -> None:
    """Refuse to start on one node of a job of several nodes, unless the user names the number of ranks."""
    nodes = _number("SLURM_JOB_NUM_NODES") or 1
    if nodes > 1 and num_ranks is None:
        raise LaunchError(
            f"this SLURM job has {nodes} nodes, and bigtx was started on one of them; write `srun --ntasks-per-node=1 "
            "bigtx ...` to use all (slurm/pretrain.sbatch does), or name the ranks of this node, e.g. --ranks 1"
        )


def _pods(num_ranks: int | None, divides: int) -> World | None:
    """Return the ranks of this pod among those of several, as Kubeflow's operators describe them for torchrun."""
    names = ("PET_NNODES", "PET_NODE_RANK", "PET_MASTER_ADDR", "PET_MASTER_PORT")
    if "LOCAL_RANK" in os.environ or any(name not in os.environ for name in names):
        return None
    count, place, port = (_number(name) for name in (names[0], names[1], names[3]))
    if count is None or place is None or port is None or place >= count:
        given = ", ".join(f"{name}={os.environ[name]}" for name in names)
        raise LaunchError(f"the environment has {given}: bigtx needs a fixed number of pods and the number of this one")
    for name in ("RANK", "WORLD_SIZE"):
        os.environ.pop(name, None)  # They count pods, not the ranks in them.
    if num_ranks is None:
        num_ranks = _number("PET_NPROC_PER_NODE")
    return World(_num_local(num_ranks, divides), count, place, os.environ[names[2]], port, "Kubernetes")


def _take_mpi_rank() -> None:
    """Copy the rank that an MPI launcher gave this process into the variables that other launchers set.

    Raises:
        LaunchError: the processes are on several machines, and no variable names the host of rank 0.
    """
    found = next((names for names in MPI if all(_number(name) is not None for name in names)), None)
    if found is None or is_launched():
        return
    rank, size, local_rank, local_size = (os.environ[name] for name in found)
    if int(size) > int(local_size) and "MASTER_ADDR" not in os.environ:
        raise LaunchError(
            f"mpirun has started {size} ranks on several machines, and MASTER_ADDR does not say where rank 0 is; write "
            "mpirun -x MASTER_ADDR=FIRST_HOST ... (Open MPI) or mpirun -genv MASTER_ADDR FIRST_HOST ..."
        )
    os.environ.update(RANK=rank, WORLD_SIZE=size, LOCAL_RANK=local_rank, LOCAL_WORLD_SIZE=local_size)
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    # The ranks of one machine are children of one process, so its id gives each run another port.
    port = FIRST_PORT + 2 * (os.getppid() % NUM_PORTS) if size == local_size else FIRST_PORT
    os.environ.setdefault("MASTER_PORT", str(port))


def _is_srun_task() -> bool:
    """Return whether srun started this process or one above it. SLURM sets SLURM_PROCID in batch scripts too."""
    step = _number("SLURM_STEP_ID")
    return step is not None and step < _LARGEST_STEP and "SLURM_PROCID" in os.environ


def _take_srun_rank(tasks: int, address: str, port: int) -> None:
    """Copy this task's rank into the variables that other launchers set."""
    os.environ.update(
        RANK=os.environ["SLURM_PROCID"],
        LOCAL_RANK=os.environ["SLURM_LOCALID"],
        WORLD_SIZE=str(tasks),
        LOCAL_WORLD_SIZE=str(_tasks_of_node(os.environ.get("SLURM_STEP_TASKS_PER_NODE", "1"))),
        MASTER_ADDR=address,
        MASTER_PORT=str(port),
    )


def _tasks_of_node(text: str) -> int:
    """Return the number of tasks on this node from SLURM's short form, such as `4(x2),3`."""
    node = _number("SLURM_NODEID") or 0
    for part in text.split(","):
        count, _, times = part.partition("(x")
        node -= int(times.rstrip(")") or 1) if times else 1
        if node < 0:
            return int(count)
    return 1


def _port_of_job() -> int:
    """Return a port that is the same on all nodes and differs between jobs and steps."""
    job, step = _number("SLURM_JOB_ID") or 0, _number("SLURM_STEP_ID") or 0
    return FIRST_PORT + 2 * ((7 * job + step) % NUM_PORTS)


def _number(name: str) -> int | None:
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() else None


LAUNCHERS = (b"deepspeed", b"torchrun", b"torch.distributed")
"""Words by which the command line of a launcher is recognized."""
SECONDS_BETWEEN_LOOKS = 0.5


def watch_launchers() -> None:
    """Start a thread that sends this process SIGTERM once a launcher above it is gone."""
    launchers = {pid: start_of(pid) for pid in _launchers_above(os.getpid())}
    if launchers:
        threading.Thread(target=_watch, args=(launchers,), daemon=True).start()


def _watch(launchers: dict[int, str | None]) -> None:
    while all(start is not None and start_of(pid) == start for pid, start in launchers.items()):
        time.sleep(SECONDS_BETWEEN_LOOKS)
    os.kill(os.getpid(), signal.SIGTERM)


def _launchers_above(pid: int) -> list[int]:
    """Return the launchers directly above a process: its parent, the parent's parent, and so on."""
    found: list[int] = []
    while (pid := parent_of(pid)) > 1 and _is_launcher(pid):
        found.append(pid)
    return found


def _is_launcher(pid: int) -> bool:
    with contextlib.suppress(OSError):
        command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        # The program and the module that Python runs; what follows them are the run's own settings.
        return any(name in word for word in command[:4] for name in LAUNCHERS)
    return False
