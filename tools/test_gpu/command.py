"""Check what bigtx computes on this machine's GPU, and how fast; without a GPU, say so and end with status 0.

    python3 tools/test_gpu                              all phases; a table at the end
    python3 tools/test_gpu --only training,loss         some of them
    python3 tools/test_gpu --only tests -k parity       other words go to pytest
    python3 tools/test_gpu --dry-run                    every phase at tiny sizes on the CPU

Each phase runs in a process of its own with a time limit, so that no failure stops the next phase. Each finding is
written at once as a line of JSON. The command uses this Python with the wheels in wheelhouse/, if that folder exists
(see tools/wheelhouse), otherwise .venv. It needs no network and installs nothing outside a temporary folder.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from test_gpu.plan import DRY_SECONDS, LEAST_SECONDS, PHASES, SECONDS, TESTS, Phase
from test_gpu.table import lines_of

ROOT = Path(__file__).resolve().parents[2]
ASK_TORCH = "import torch; torch.cuda.is_available() or exit(f'torch {torch.__version__} sees no CUDA device')"
SHOWN_LINES = 5
"""The last lines of a failed phase's output that are shown."""
KILL_SECONDS = 10.0
"""How long a killed process may take to end."""


def list_gpus() -> list[str]:
    """List the GPUs that the driver reports, one line each."""
    if not shutil.which("nvidia-smi"):
        return []
    done = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True)
    return done.stdout.splitlines() if done.returncode == 0 else []


def choose_python(wheels: list[Path], site: Path) -> tuple[str, dict[str, str]]:
    """Choose the interpreter and its environment; install the wheels, if any, into `site`."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    if not wheels:
        venv = ROOT / ".venv" / "bin"
        python = str(venv / "python") if (venv / "python").exists() else sys.executable
        return python, environment | {"PATH": f"{venv}{os.pathsep}{os.environ['PATH']}"}
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
    # Two warnings do not apply: the scripts will be on the PATH, and root writes only to a temporary folder.
    pip += ["--no-warn-script-location", "--root-user-action=ignore", "--target", str(site)]
    subprocess.run([*pip, *map(str, wheels)], check=True)
    return sys.executable, environment | {
        "PYTHONPATH": f"{site}{os.pathsep}{ROOT}",
        "PATH": f"{site / 'bin'}{os.pathsep}{os.environ['PATH']}",
    }


def problem_of(python: str, environment: dict[str, str], *, is_dry: bool) -> str | None:
    """Return why this Python cannot run the phases, in words; None if it can."""
    ask = "import torch" if is_dry else ASK_TORCH
    asked = subprocess.run([python, "-c", ask], env=environment, capture_output=True, text=True)
    if asked.returncode == 0:
        return None
    reason = (asked.stderr.strip().splitlines() or ["no reason given"])[-1]
    if is_dry:
        return f"{python} cannot import torch: {reason}; run `make env`, or use a Python that has torch"
    return f"The driver lists a GPU, but {python} cannot use it through torch: {reason}"


@dataclass
class Check:
    """One check of the machine.

    Attributes:
        python, environment: the interpreter of the phases and its variables.
        output: the file of JSON lines; the phases' own output is next to it.
        scratch: a folder for files of the phases.
        deadline: when everything must be over, by the monotonic clock.
        is_dry: see `--dry-run`.
        pytest_words: further words for pytest.
    """

    python: str
    environment: dict[str, str]
    output: Path
    scratch: Path
    deadline: float
    is_dry: bool
    pytest_words: list[str]

    def run(self, phases: Sequence[Phase]) -> bool:
        """Run phases one after another. Returns whether all passed."""
        statuses = [self._run_case(phase, case) for phase in phases for case in phase.cases(self.is_dry)]
        return all(status == "passed" for status in statuses)

    def _run_case(self, phase: Phase, case: str) -> str:
        left, began = self.deadline - time.monotonic(), time.monotonic()
        if left < LEAST_SECONDS:
            return self._end(phase, case, "skipped", 0.0, error="no time is left; name the phase with --only")
        name = f"{phase.name} {case}".strip()
        print(f"{name} ...", flush=True)
        with open(self.output.with_suffix(".log"), "ab") as log:
            log.write(f"\n=== {name}\n".encode())
            log.flush()
            length = log.tell()
            # A slow CPU is not a mistake in a phase.
            seconds = left if self.is_dry else min(phase.seconds, left)
            status = self._wait(self._command(phase, case, seconds), log, seconds)
        error = "" if status == "passed" else self._last_lines(length)
        return self._end(phase, case, status, time.monotonic() - began, error=error)

    def _command(self, phase: Phase, case: str, seconds: float) -> list[str]:
        if phase.name == TESTS:
            each = f"--timeout={min(120, int(seconds))}"
            return [self.python, "-m", "pytest", "tests/gpu", "-q", each, *self.pytest_words]
        program = str(Path(__file__).with_name("child.py"))
        words = [phase.name, case, str(self.output), str(self.scratch), str(seconds)]
        return [self.python, program, *words, *["--dry-run"] * self.is_dry]

    def _wait(self, command: list[str], log: IO[bytes], seconds: float) -> str:
        """Run a command in a process group of its own, and end the whole group if it takes too long."""
        streams: dict[str, Any] = {"stdout": log, "stderr": log, "stdin": subprocess.DEVNULL}
        process = subprocess.Popen(command, cwd=ROOT, env=self.environment, start_new_session=True, **streams)
        try:
            return "passed" if process.wait(seconds) == 0 else "failed"
        except subprocess.TimeoutExpired:
            return f"ended after {seconds:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            # A process that waits for a broken driver does not end; the next phase must not wait for it.
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(KILL_SECONDS)

    def _end(self, phase: Phase, case: str, status: str, seconds: float, *, error: str) -> str:
        write(
            self.output,
            {"phase": phase.name, "case": case, "status": status, "seconds": round(seconds, 1), "error": error},
        )
        if status != "passed":
            print(f"{phase.name} {case}: {status}\n{error}".strip(), file=sys.stderr, flush=True)
        return status

    def _last_lines(self, earlier: int) -> str:
        with open(self.output.with_suffix(".log"), "rb") as log:
            log.seek(earlier)
            return "\n".join(log.read().decode(errors="replace").splitlines()[-SHOWN_LINES:])


def write(output: Path, facts: dict[str, Any]) -> None:
    """Add a line to the file of findings."""
    with open(output, "a", encoding="utf-8") as file:
        file.write(json.dumps(facts) + "\n")


def parse_arguments() -> tuple[argparse.Namespace, list[str]]:
    """Return the options, and the words for pytest."""
    phases = "\n".join(f"  {phase.name:18}{phase.what}" for phase in PHASES)
    parser = argparse.ArgumentParser(
        description=f"{__doc__}\nphases:\n{phases}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = Path(os.environ.get("OUT") or ROOT / "runs") / "gpu-check.jsonl"
    add = parser.add_argument
    add("--only", metavar="PHASES", help="the phases to run, divided by commas")
    add("--seconds", type=float, help=f"the time for all of them ({SECONDS:.0f}; in a dry run {DRY_SECONDS:.0f})")
    add("--out", type=Path, default=default, metavar="FILE", help="or output=FILE: JSON lines (%(default)s)")
    add("--wheelhouse", type=Path, default=ROOT / "wheelhouse", help="folder of wheels (%(default)s)")
    add("--dry-run", action="store_true", help="run the phases at tiny sizes on the CPU")
    words = [f"--out={word.removeprefix('output=')}" if word.startswith("output=") else word for word in sys.argv[1:]]
    options, others = parser.parse_known_args(words)
    names = options.only.split(",") if options.only else [phase.name for phase in PHASES]
    if unknown := set(names) - {phase.name for phase in PHASES}:
        parser.error(f"no phase is named {', '.join(sorted(unknown))}; write some of the names that --help lists")
    if others and TESTS not in names:
        parser.error(f"{' '.join(others)}: words for pytest have no effect without the phase {TESTS}")
    needed = {phase.needs for phase in PHASES if phase.name in names}
    options.phases = [phase for phase in PHASES if phase.name in names or phase.name in needed]
    options.out = options.out.absolute()
    options.seconds = options.seconds or (DRY_SECONDS if options.dry_run else SECONDS)
    return options, others


def main() -> int:
    """Run the phases and print the table. The status is 1 if one did not pass."""
    options, pytest_words = parse_arguments()
    deadline = time.monotonic() + options.seconds
    gpus = list_gpus()
    if not gpus and not options.dry_run:
        print("No CUDA GPU on this machine: nothing was run.")
        return 0
    print("\n".join(gpus) if not options.dry_run else "dry run on the CPU")
    with tempfile.TemporaryDirectory(prefix="bigtx-gpu-", ignore_cleanup_errors=True) as temporary:
        site, scratch = Path(temporary) / "site", Path(temporary) / "scratch"
        scratch.mkdir()
        python, environment = choose_python(sorted(options.wheelhouse.glob("*.whl")), site)
        if options.dry_run:
            environment["CUDA_VISIBLE_DEVICES"] = ""
        if problem := problem_of(python, environment, is_dry=options.dry_run):
            print(problem, file=sys.stderr)
            return 1
        options.out.parent.mkdir(parents=True, exist_ok=True)
        write(options.out, {"began": datetime.datetime.now().isoformat(timespec="seconds"), "dry_run": options.dry_run})
        check = Check(python, environment, options.out, scratch, deadline, options.dry_run, pytest_words)
        try:
            return 0 if check.run(options.phases) else 1
        finally:
            print(*lines_of(options.out.read_text(encoding="utf-8")), f"\nall findings: {options.out}", sep="\n")
