"""The process of one phase: it writes each finding at once as a line of JSON, so a crash loses nothing.

python tools/test_gpu/child.py PHASE CASE OUTPUT SCRATCH SECONDS [--dry-run]
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Job:
    """What a phase has to do, and where its findings go.

    Attributes:
        phase, case: see plan.py.
        output: the file of JSON lines.
        scratch: a folder for files that a later phase reads; it is deleted after the check.
        seconds: after this time the process is killed.
        is_dry: whether this is a dry run on the CPU, with tiny sizes.
        failures: what failed.
    """

    phase: str
    case: str
    output: Path
    scratch: Path
    seconds: float
    is_dry: bool
    failures: list[str] = field(default_factory=list)
    _began: float = field(default_factory=time.monotonic)

    def write(self, label: str, **facts: Any) -> None:
        """Add a finding to the file, and print it."""
        passed = round(time.monotonic() - self._began, 1)
        line = json.dumps({"phase": self.phase, "label": label, "at": passed, **_rounded(facts)}, default=str)
        with open(self.output, "a", encoding="utf-8") as file:
            file.write(line + "\n")
        print(line, flush=True)

    def has_time(self, seconds: float) -> bool:
        """Return whether so much time is left before the process is killed."""
        return self.seconds - (time.monotonic() - self._began) >= seconds

    @contextlib.contextmanager
    def attempt(self, label: str) -> Iterator[None]:
        """Record an error as a finding, so that the rest of the phase runs."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self.failures.append(label)
            self.write(label, error=f"{type(error).__name__}: {error}"[:1000])


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: _rounded(inner) for key, inner in value.items()}
    return [_rounded(inner) for inner in value] if isinstance(value, list | tuple) else value


def main() -> int:
    """Run one phase; the status is 1 if anything in it failed."""
    from test_gpu.plan import PHASES

    words = [word for word in sys.argv[1:] if word != "--dry-run"]
    phase, case, output, scratch, seconds = words
    job = Job(phase, case, Path(output), Path(scratch), float(seconds), "--dry-run" in sys.argv)
    module = next(other.module for other in PHASES if other.name == phase)
    with job.attempt(case or phase):
        getattr(importlib.import_module(f"test_gpu.{module}"), phase)(job)
    return int(bool(job.failures))


if __name__ == "__main__":
    sys.path[0] = str(ROOT)
    sys.path += [str(ROOT / "tools"), str(ROOT / "tools" / "bench")]
    os.chdir(ROOT)
    # Under this name the phases import the class that they are given.
    sys.exit(importlib.import_module("test_gpu.child").main())
