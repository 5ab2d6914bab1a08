"""Starting bigtx as its users do: real commands, real launchers, real signals."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import forks
import pytest

from bigtx.engine.checkpoint import list_checkpoints

ROOT = Path(__file__).resolve().parent.parent
TINY = [
    "model.hidden_size=64",
    "model.num_layers=2",
    "model.num_heads=2",
    "train.sequence_length=64",
    "train.global_batch_size=8",
    "train.micro_batch_size=4",
    "train.log_every=1 steps",
    "validation.max_sequences=8",
    "validation.every=1000 steps",
    "optimizer.learning_rate=1e-3",
    "engine.precision=fp32",
    "engine.timeout=2 min",
    "track.wandb=off",
]
"""A model and a rhythm for tests. Most processors compute bf16 more slowly than fp32."""
BF16 = ["engine.precision=bf16", "train.micro_batch_size=2"]
"""The default precision, with more micro batches."""
CONTAINER = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--kill-child", "--mount-proc"]
"""Runs a command in its own namespace of process ids, as a container of this host does."""
Mount = Callable[[Path, str], None]
"""Mounts a tmpfs with options on a folder: see the fixture `mount`."""


def environment(*, gpus: bool = False, **changes: str) -> dict[str, str]:
    """The environment of a user without an accelerator, or with all that this machine has."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    hidden = {} if gpus else {"CUDA_VISIBLE_DEVICES": ""}
    return os.environ | {"PATH": path, "OMP_NUM_THREADS": "1"} | hidden | changes


def bigtx(
    *arguments: str, cwd: Path | None = None, gpus: bool = False, **changes: str
) -> subprocess.CompletedProcess[str]:
    """`bigtx ARGUMENTS`, to its end."""
    # The clone's bigtx, beside packages that the tests themselves were given in this way.
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return forks.run(
        [sys.executable, "-m", "bigtx", *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=cwd,
        env=environment(gpus=gpus, **{"PYTHONPATH": paths, **changes}),
    )


def as_json(
    capsys: pytest.CaptureFixture[str], command: Callable[[Sequence[str]], int | None], words: Sequence[str]
) -> Any:
    """What a command prints with `--json`, where standard output holds nothing else."""
    capsys.readouterr()
    assert not command([*words, "--json"])
    return json.loads(capsys.readouterr().out)


def free_port() -> int:
    """A free port of this machine, and the next one is free too."""
    while True:
        with socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            port: int = first.getsockname()[1]
            try:
                second.bind(("127.0.0.1", port + 1))
            except OSError:
                continue
            return port


def pretrain_command(arguments: Sequence[str], ranks: int, *, launcher: bool = False) -> list[str]:
    """The command line of a training: bigtx itself starts the ranks, or the deepspeed launcher if asked for."""
    script = str(ROOT / "bigtx" / "pretrain.py")
    if not launcher:
        return [sys.executable, script, *arguments, f"--ranks={ranks}"]
    return [
        sys.executable,
        "-m",
        "deepspeed.launcher.runner",
        "--num_accelerators",
        str(ranks),
        "--master_port",
        str(free_port()),
        script,
        *arguments,
    ]


def pretrain(
    *arguments: str, ranks: int = 1, launcher: bool = False, cwd: Path | None = None, gpus: bool = False
) -> subprocess.CompletedProcess[str]:
    """A training, to its end."""
    return forks.run(
        pretrain_command(arguments, ranks, launcher=launcher),
        capture_output=True,
        text=True,
        timeout=600,
        cwd=cwd,
        env=environment(gpus=gpus),
    )


def start_pretrain(*arguments: str, ranks: int, launcher: bool = False) -> subprocess.Popen[str]:
    """A training in a session (and process group) of its own, like a terminal's foreground job."""
    return forks.start(
        pretrain_command(arguments, ranks, launcher=launcher),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=environment(),
    )


def wait_for(condition: Callable[[], Any], process: subprocess.Popen[str], timeout: float = 300) -> Any:
    """Wait until the condition holds while the process lives; fail with its output if it does not."""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        result = condition()
        if result:
            return result
        if process.poll() is not None:
            break
        time.sleep(0.05)
    process.kill()
    out, err = process.communicate()
    raise AssertionError(f"never happened; status {process.returncode}\n{out[-3000:]}\n{err[-3000:]}")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file; a last line that is still being written is left out."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1] if line]


def last_step(run_dir: Path) -> int:
    """The newest step in a run's metrics."""
    lines = read_lines(run_dir / "metrics.jsonl")
    return int(lines[-1]["step"]) if lines else 0


def has_saved(run_dir: Path, step: int) -> bool:
    """Whether a run has reached a step and has a checkpoint. It trains while a checkpoint is written."""
    return last_step(run_dir) >= step and bool(list_checkpoints(run_dir))


def losses(run_dir: Path) -> dict[int, float]:
    """Each step's training loss; fails if a step stands there twice."""
    found: dict[int, float] = {}
    for line in read_lines(run_dir / "metrics.jsonl"):
        assert line["step"] not in found, f"step {line['step']} twice"
        if "train/loss" in line:  # A checkpoint becomes durable at a step that may log nothing else.
            found[line["step"]] = line["train/loss"]
    return found


def rank_pids(run_dir: Path) -> list[int]:
    """The processes of a run that have none of its processes below them: launchers and supervisors are left out."""
    of_run = {pid: parent for pid, parent in _processes() if _names(pid, run_dir)}
    return sorted(of_run.keys() - of_run.values())


def supervisor_pid(run_dir: Path) -> int:
    """The process above the ranks."""
    parents = dict(_processes())
    return parents[rank_pids(run_dir)[0]]


def all_pids(run_dir: Path) -> list[int]:
    """Every process whose command line names the run folder."""
    return [pid for pid, _ in _processes() if _names(pid, run_dir)]


def _processes() -> list[tuple[int, int]]:
    """Every process's id and its parent's."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
                if state not in "ZX":
                    found.append((int(entry.name), int(parent)))
    return found


def _names(pid: int, run_dir: Path) -> bool:
    """Whether a process's command line names a run folder, as a setting or alone."""
    return not {f"run_dir={run_dir}".encode(), str(run_dir).encode()}.isdisjoint(_command_of(pid))


def _command_of(pid: int) -> list[bytes]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return []


def same_weights(run_dir: Path, other: Path) -> None:
    """Both runs' last checkpoints hold the same bytes."""
    first, second = max((run_dir / "checkpoints").iterdir()), max((other / "checkpoints").iterdir())
    hashes = [
        {name: file["sha256"] for name, file in json.loads((path / "manifest.json").read_text())["files"].items()}
        for path in (first, second)
    ]
    assert hashes[0] == hashes[1]


def kill_run(process: subprocess.Popen[str], run_dir: Path) -> None:
    """Kill (-9) a training in a session of its own, with all ranks, and wait until none of its processes is left."""
    pids = all_pids(run_dir)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    for pid in rank_pids(run_dir):  # Of other process groups.
        os.kill(pid, signal.SIGKILL)
    while {pid for pid, _ in _processes()}.intersection(pids):
        time.sleep(0.01)  # Until they are gone, the kernel has not freed their locks.


def tmpfs(folder: Path, options: str, stack: ExitStack) -> bool:
    """Mount a tmpfs on a folder until the stack closes. Returns False where this user may not mount file systems."""
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        return False
    # Lazily: W&B's processes may run a moment longer.
    stack.callback(subprocess.run, ["umount", "--lazy", str(folder)], check=True)
    return True
