"""A real SLURM cluster of several nodes, by tests/slurm/cluster."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from doors import ROOT, environment

SCRIPT = ROOT / "tests" / "slurm" / "cluster"
ACTIVE = ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "REQUEUED", "SIGNALING", "SUSPENDED")
"""States of jobs that have not ended."""


class Cluster:
    """The cluster, as its users see it from the login host.

    Attributes:
        names: the nodes.
        folder: where jobs are submitted, and their logs are.
        crashed: nodes without power.
    """

    def __init__(self, state: Path, num_nodes: int = 2, **variables: str) -> None:
        self.state = state
        self.names = [f"n{number}" for number in range(1, num_nodes + 1)]
        self.folder = state
        self.crashed: set[int] = set()
        own = {"CLUSTER": str(state), "NODES": str(num_nodes), "BIGTX_HOME": str(ROOT), "BIGTX_MAX_CRASHES": "2"}
        # The look at the nodes imports torch once more on each of them; its own tests turn it on.
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

    def popen(self, *command: str) -> subprocess.Popen[bytes]:
        """A command on the login host that goes on; what it prints is among the logs."""
        with (self.folder / "slurm-login.log").open("ab") as log:
            return subprocess.Popen(
                [SCRIPT, "exec", *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.folder,
                env=self.environment,
            )

    def nodes(self, state: str) -> list[str]:
        """The nodes in a state."""
        return sorted(self.run("sinfo", "-h", "-N", "-t", state, "-o", "%N", status=None).split())

    def submit(self, *words: str, **variables: str) -> int:
        """Submit a job; returns its number."""
        return int(self.run("sbatch", "--parsable", *words, **variables).split(";")[0])

    def job(self, number: int | str) -> dict[str, str]:
        """What SLURM knows of a job."""
        # On a machine with much else to do SLURM's controller leaves some questions unanswered.
        show = ("scontrol", "show", "job", "-o", str(number))
        text = self.wait_for(lambda: "JobId=" in (said := self.run(*show, status=None)) and said, timeout=60)
        return dict(word.split("=", 1) for word in text.split() if "=" in word)

    def nodes_of(self, number: int | str) -> list[str]:
        """The nodes that a job has, or had."""
        return self.run("scontrol", "show", "hostnames", self.job(number)["NodeList"]).split()

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
        self.crashed.add(node)

    def start(self, node: int) -> None:
        """Start a node again, and wait until SLURM knows it; a job may have it at once."""
        self.do("start", str(node))
        self.crashed.discard(node)
        self.wait_for(lambda: f"n{node}" in self.nodes("idle,mixed,allocated"))

    def do(self, *words: str) -> None:
        """Do something to a node: see tests/slurm/cluster."""
        subprocess.run([SCRIPT, *words], env=self.environment, check=True, stdin=subprocess.DEVNULL)
