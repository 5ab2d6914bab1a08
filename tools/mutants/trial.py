"""Try a mutant: a fork of a process that has imported the slow packages runs the tests with it."""

from __future__ import annotations

import contextlib
import importlib
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import forks
import hook
import pytest
from operators import Mutant

HEAVY = (
    "numpy",
    "torch",
    "torch.distributed",
    "deepspeed",
    "omegaconf",
    "sentencepiece",
    "yaml",
    "hypothesis",
    "safetensors",
    "tokenizers",
    "transformers",
    "wandb",
)
OUT_OF_TIME = "the time for the tests is over"
MARK = "BIGTX_MUTANTS_TRIAL"
"""A variable in the environment of every process of a trial."""


@dataclass
class Trial:
    """A mutant whose tests run in a process.

    Attributes:
        limit: seconds after which the mutant counts as detected, because something hangs.
        left_out: the number of tests of the line that are not run for lack of time.
    """

    mutant: Mutant
    tests: list[str]
    limit: float
    left_out: int
    pid: int
    folder: Path
    started: float


class _First:
    """The pytest plugin that records which test failed, and starts no test after the time for the tests is over."""

    def __init__(self, file: Path, budget: float) -> None:
        self._file, self._budget = file, budget

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        """Stop the session if the time for the tests is over; pytest calls this for each test."""
        # This is processor time, including ended children, so other load of the machine has no effect.
        if sum(os.times()[:4]) > self._budget:
            item.session.shouldstop = OUT_OF_TIME
        return (yield)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Record the first failure; pytest calls this for each report."""
        self._record(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Record the first test file that cannot be imported; pytest calls this for each file."""
        self._record(report)

    def _record(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        if report.failed and not self._file.exists():
            self._file.write_text(report.nodeid, encoding="utf-8")


def warm_up() -> None:
    """Import packages that all tests need and that are not mutated."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for name in HEAVY:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    assert not any(name.partition(".")[0] == "bigtx" for name in sys.modules)


def begin(
    mutant: Mutant, source: bytes, tests: list[str], *, limit: float, budget: float, markers: str, left_out: int
) -> Trial:
    """Start the tests with the mutant, in a separate process. It and its forks leave this function only by SystemExit.

    Args:
        mutant: the mutant.
        source: the source of its file without the change.
        tests: names of tests or of test files.
        limit: seconds after which the process is ended.
        budget: seconds of processor time after which no more tests start.
        markers: the selection of tests, as for pytest's -m.
        left_out: the number of tests that are not run for lack of time.
    """
    folder = Path(tempfile.mkdtemp(prefix="m-"))
    (folder / "mutated.py").write_bytes(mutant.apply(source))
    pid = os.fork()
    if not pid:
        try:
            _run(mutant, tests, folder, budget, markers)
        except Exception:
            os._exit(70)
    return Trial(mutant, tests, limit, left_out, pid, folder, time.monotonic())


def _run(mutant: Mutant, tests: list[str], folder: Path, budget: float, markers: str) -> None:
    os.setsid()
    output = os.open(folder / "output", os.O_WRONLY | os.O_CREAT)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    module = mutant.path.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
    mutated = [module, str(Path(mutant.path).absolute()), str(folder / "mutated.py")]
    os.environ |= {hook.MUTANT: "\n".join(mutated), MARK: folder.name, "TMPDIR": str(folder)}
    tempfile.tempdir = None
    hook.install()
    forks.fork_server()  # For the commands that tests start: it ends by SystemExit, as they do.
    words = ["-x", "-q", "-m", markers, "-p", "no:cacheprovider", "-p", "no:xdist", f"--basetemp={folder}/t", *tests]
    code = pytest.main(words, plugins=[_First(folder / "noticed", budget + sum(os.times()[:4]))])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(int(code))


def end(trial: Trial) -> dict[str, Any] | None:
    """Return the trial's result; None if it is still running. Ends all of its processes and deletes its files."""
    seconds = time.monotonic() - trial.started
    pid, status = os.waitpid(trial.pid, os.WNOHANG)
    if not pid and seconds < trial.limit:
        return None
    kill_all(trial)
    if not pid:
        os.waitpid(trial.pid, 0)
    code = os.waitstatus_to_exitcode(status) if pid else None
    noticed = trial.folder / "noticed"
    by = noticed.read_text(encoding="utf-8") if noticed.exists() else ""
    output = trial.folder / "output"
    text = output.read_text(encoding="utf-8", errors="replace")[-2000:] if output.exists() else ""
    shutil.rmtree(trial.folder, ignore_errors=True)
    result: dict[str, Any] = {"seconds": round(seconds, 1), "tests": len(trial.tests), "left_out": trial.left_out}
    if code is None:
        return result | {"status": "noticed", "by": "time limit"}
    if code == pytest.ExitCode.OK or OUT_OF_TIME in text:
        return result | {"status": "survived", "left_out": result["left_out"] + (code != pytest.ExitCode.OK)}
    is_no_test = code == pytest.ExitCode.USAGE_ERROR and "while loading conftest" not in text
    if not by and (is_no_test or code == pytest.ExitCode.NO_TESTS_COLLECTED):
        return result | {"status": "error", "by": text}
    return result | {"status": "noticed", "by": by or f"status {code}"}


def kill_all(trial: Trial) -> None:
    """End every process of a trial, in all sessions."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(trial.pid, signal.SIGKILL)
    wanted = f"{MARK}={trial.folder.name}".encode()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                if wanted in (entry / "environ").read_bytes().split(b"\0"):
                    os.kill(int(entry.name), signal.SIGKILL)
