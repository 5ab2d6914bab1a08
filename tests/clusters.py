"""A real SLURM cluster of some nodes, by tests/slurm/cluster."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from doors import ROOT, environment

SCRIPT = ROOT / "tests" / "slurm" / "cluster"
ACTIVE = ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "REQUEUED", "SUSPENDED")
"""States of jobs that have not ended."""


class Cluster:
    """The cluster, as its users see it from the login host.

    Attributes:
        folder: where jobs are submitted, and their logs are.
    """

    def __init__(self, state: Path, num_nodes: int = 2, **variables: str) -> None:
        self.state = state
        self.folder = state
        self.names = [f"n{node + 1}" for node in range(num_nodes)]
        own = {"CLUSTER": str(state), "NODES": str(num_nodes), "BIGTX_HOME": str(ROOT), "BIGTX_MAX_CRASHES": "1"}
        # It imports torch once more on each node; its own tests turn it on.
        self.environment = environment(**own, BIGTX_PREFLIGHT="off") | variables
        # Nothing of the scheduler or launcher that these tests may run under.
        for name in [name for name in self.environment if name.startswith(("SLURM_", "SBATCH_", "SRUN_"))]:
            del self.environment[name]
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Cluster:
        self._process = subprocess.Popen([SCRIPT, "serve"], env=self.environment, stdin=subprocess.DEVNULL)
        self.wait_for(lambda: self.nodes("idle") == self.names, timeout=60)
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def run(self, *command: str, status: int | None = 0, **variables: str) -> str:
        """A command on the login host, to its end; returns what it printed."""
        done = subprocess.run(
            [SCRIPT, "exec", *command],
            capture_output=True,
            text=True,
            timeout=300,
            cwd=self.folder,
            env=self.environment | variables,
        )
        assert status is None or done.returncode == status, done.stdout + done.stderr
        return done.stdout + done.stderr

    def nodes(self, state: str) -> list[str]:
        """The nodes in a state."""
        return sorted(self.run("sinfo", "-h", "-N", "-t", state, "-o", "%N", status=None).split())

    def submit(self, *words: str, **variables: str) -> int:
        """Submit a job; returns its number."""
        return int(self.run("sbatch", "--parsable", *words, **variables).split(";")[0])

    def job(self, number: int | str) -> dict[str, str]:
        """What SLURM knows of a job."""
        text = self.run("scontrol", "show", "job", "-o", str(number))
        return dict(word.split("=", 1) for word in text.split() if "=" in word)

    def wait_for_end(self, number: int | str, timeout: float = 240) -> dict[str, str]:
        """Wait until a job is neither queued nor running."""
        self.wait_for(lambda: self.has_ended(number), timeout)
        return self.job(number)

    def has_ended(self, number: int | str) -> bool:
        """Whether a job is neither queued nor running."""
        return self.job(number)["JobState"] not in ACTIVE

    def wait_for(self, condition: Callable[[], Any], timeout: float = 240, number: int | str | None = None) -> Any:
        """Wait until a condition holds; fails with the jobs' logs when the time is over, or the given job has ended."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if result := condition():
                return result
            if number is not None and self.has_ended(number):
                break
            time.sleep(0.1)
        raise AssertionError(f"never happened; {'' if number is None else self.job(number)}\n{self.logs()}")

    def logs(self) -> str:
        """All that the jobs of the current folder have said."""
        return "".join(f"== {path.name}\n{path.read_text()}" for path in sorted(self.folder.glob("slurm-*.log")))

    def crash(self, node: int) -> None:
        """Take away a node's power."""
        self.do("crash", str(node))

    def start(self, node: int) -> None:
        """Start a node again, and wait until SLURM knows it."""
        self.do("start", str(node))
        self.wait_for(lambda: f"n{node}" in self.nodes("idle"))

    def do(self, *words: str) -> None:
        """Do something to a node: see tests/slurm/cluster."""
        subprocess.run([SCRIPT, *words], env=self.environment, check=True, stdin=subprocess.DEVNULL)
