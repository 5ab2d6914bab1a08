"""This process's place among those of a run, as the launcher wrote it into the environment. Imports no torch.

A launcher sets the rank and the number of ranks together. One without the other is a leftover of another program, and
has no meaning: see `launcher_problem`. Calls to the Linux kernel for related processes follow.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
"""The signals that ask a run to stop; SIGHUP means that its terminal or the connection to it has closed."""
STACKS_SIGNAL = signal.SIGUSR2
"""The signal at which a rank writes the stacks of its threads."""


def stop_signals() -> tuple[signal.Signals, ...]:
    """Return those of `STOP_SIGNALS` that this process listens to: a SIGHUP that is ignored at the start, as `nohup`
    and `disown -h` have it, stays ignored.
    """
    ignores_hangup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return tuple(number for number in STOP_SIGNALS if number != signal.SIGHUP or not ignores_hangup)


LAUNCHED = ("RANK", "WORLD_SIZE")
"""Variables that every launcher sets."""
NUMBERS = (*LAUNCHED, "LOCAL_RANK", "MASTER_PORT")
MEETING = ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""Variables that the ranks need in addition, to connect."""


def is_launched() -> bool:
    """Return whether a launcher gave this process a place among others."""
    return all(os.environ.get(name, "").isdecimal() for name in LAUNCHED)


def rank() -> int:
    """Return this process's rank over all nodes; 0 without a launcher."""
    return int(os.environ["RANK"]) if is_launched() else 0


def world_size() -> int:
    """Return number of processes in the run; 1 without a launcher."""
    return int(os.environ["WORLD_SIZE"]) if is_launched() else 1


def local_rank() -> int:
    """Return this process's rank on its own node; 0 without a launcher."""
    local = os.environ.get("LOCAL_RANK", "")
    return int(local) if is_launched() and local.isdecimal() else 0


def num_nodes() -> int:
    """Return number of machines, if the launcher says how many ranks each has; else 1."""
    local = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or ""
    return -(-world_size() // int(local)) if is_launched() and local.isdecimal() and int(local) else 1


def launcher_problem() -> str | None:
    """Return why the environment is neither that of a launcher nor that of a process started alone, as a sentence; None
    if it is one of the two.
    """
    given = [name for name in LAUNCHED if name in os.environ]
    if not given or (given == ["WORLD_SIZE"] and os.environ["WORLD_SIZE"] == "1"):
        return None
    here = " and ".join(f"{name}={os.environ[name]}" for name in given)
    start = "start the ranks by deepspeed or torchrun, or unset " + " ".join(given) + " and let bigtx start them"
    missing = [name for name in (*LAUNCHED, *MEETING) if name not in os.environ]
    if missing:
        return f"the environment holds {here}, which a launcher sets, but not {', '.join(missing)}; {start}"
    for name in NUMBERS:
        if not os.environ[name].isdecimal():
            return f"the environment holds {name}={os.environ[name]}, which is not a number; {start}"
    if rank() >= world_size():
        return f"the environment holds {here}: ranks go from 0 to {world_size() - 1}; {start}"
    return None


_is_supervised = False
_launcher: str | None = None


def set_supervised(launcher: str | None = None) -> None:
    """Note that this process is a rank that `bigtx` itself started.

    Args:
        launcher: the program that started `bigtx` on each machine, in words.
    """
    global _is_supervised, _launcher
    _is_supervised, _launcher = True, launcher


def is_supervised() -> bool:
    """Return whether `bigtx` itself started this rank, and supervises it."""
    return _is_supervised


def slurm_place() -> dict[str, str | None]:
    """Return this process's SLURM job, and how often it was requeued: `slurm_job` (None outside SLURM),
    `slurm_restart`.
    """
    job = os.environ.get("SLURM_JOB_ID")
    return {"slurm_job": job, "slurm_restart": os.environ.get("SLURM_RESTART_COUNT", "0")}


def share_cores() -> None:
    """Make OpenMP's threads sleep soon when they wait; call this before torch is imported.

    By default they spin for milliseconds, and where other programs want the same cores, that takes most of the time:
    on two busy cores, passes of a small network were 4 to 14 times slower. A value in the environment has precedence.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # About 20 microseconds.


def extend_segments() -> None:
    """Have CUDA's allocator extend its segments of memory; call this before torch is imported.

    By default a freed segment can be used again only for tensors that fit into it, so batches of many lengths need more
    memory than the largest of them. A value in the environment has precedence.
    """
    if not os.environ.keys() & {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"}:
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


def launcher_name() -> str | None:
    """Return the program that started the run, for people; None for `bigtx` itself, or plain Python."""
    if _is_supervised or not is_launched():
        return _launcher
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return "torchrun"
    # Set by deepspeed/launcher/launch.py and by no other launcher.
    if "CROSS_RANK" in os.environ and "LOCAL_SIZE" in os.environ:
        return "deepspeed"
    if os.environ["RANK"] == os.environ.get("SLURM_PROCID") and "SLURM_STEP_ID" in os.environ:
        return "srun"
    if os.environ["RANK"] in (os.environ.get("OMPI_COMM_WORLD_RANK"), os.environ.get("PMI_RANK")):
        return "mpirun"
    return "a launcher that set RANK and WORLD_SIZE"


def start_of(pid: int) -> str | None:
    """Return when a process of this host started: the boot's id and clock ticks since then; None if it is gone.

    With it an id names a process permanently: ids are reused.
    """
    try:
        fields = _stat(pid)
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None
    return None if fields[0] in "ZX" else f"{boot}/{fields[19]}"


def age_of_command() -> float:
    """Return the seconds since the command of this process started: its supervisor, if it has one."""
    pid = os.getppid() if is_supervised() else os.getpid()
    return time.clock_gettime(time.CLOCK_BOOTTIME) - int(_stat(pid)[19]) / os.sysconf("SC_CLK_TCK")


def parent_of(pid: int) -> int:
    """Return the id of a process's parent; 0 if the process is gone, or has none."""
    try:
        return int(_stat(pid)[1])
    except OSError:
        return 0


def _stat(pid: int) -> list[str]:
    """Return fields 3 (state) and following of proc(5): the name before them, in parentheses, may hold anything."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def hold_free_port() -> socket.socket:
    """Return a socket on a free port of this machine, which no other program gets while the socket is open.

    It does not listen, so that rank 0 can take the port.
    """
    held = socket.socket()
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.bind(("127.0.0.1", 0))
    return held


@contextlib.contextmanager
def stopped_at_once() -> Iterator[None]:
    """Make requests to stop end the process at once, for C++ code that waits and runs no Python handler."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_DFL) for number in stop_signals()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
"""Options of prctl(2)."""


def end_with_parent(number: signal.Signals, parent: int) -> None:
    """Have the kernel send this process a signal when its parent ends.

    Args:
        number: the signal.
        parent: the process id that the parent must have now; the signal is sent at once where the parent is gone.
    """
    _prctl(_PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:
        os.kill(os.getpid(), number)


def adopt_orphans() -> None:
    """Make this process the parent of all processes below it whose own parent ends."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def descendants() -> list[int]:
    """Return the processes below this one.

    Processes that began their own session, as daemons do, and their children are left out.
    """
    session = os.getsid(0)
    found: list[int] = []
    waiting = [os.getpid()]
    while waiting:
        below = [pid for pid in children(waiting.pop()) if _session_of(pid) == session]
        found += below
        waiting += below
    return found


def set_name(name: str) -> None:
    """Name this process for ps and top; the kernel keeps 15 bytes."""
    with contextlib.suppress(OSError):
        Path("/proc/self/comm").write_text(name)


def out_of_memory_kills() -> int:
    """Count the processes that the kernel ended when memory ran out, in this container or since the machine started."""
    counts = (number_in(path, "oom_kill") for path in ("/sys/fs/cgroup/memory.events", "/proc/vmstat"))
    return next((count for count in counts if count is not None), 0)


def number_in(path: str, name: str) -> int | None:
    """Return the number that follows a name in a file of the kernel; None if the file or the name is missing."""
    with contextlib.suppress(OSError, ValueError):
        lines = (line.split() for line in Path(path).read_text().splitlines())
        return next((int(words[1]) for words in lines if words[0] == name), None)
    return None


def _session_of(pid: int) -> int | None:
    with contextlib.suppress(OSError):
        return os.getsid(pid)
    return None


def children(pid: int) -> list[int]:
    """Return the processes that a process has started and that are running."""
    found: list[int] = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found += [int(child) for child in path.read_text().split()]
    return found


def _prctl(option: int, value: int) -> None:
    with contextlib.suppress(AttributeError, OSError, TypeError):  # Another system, or another C library.
        ctypes.CDLL(None).prctl(option, ctypes.c_ulong(value), 0, 0, 0)
