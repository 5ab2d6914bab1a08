"""What a supervisor prints about a rank that failed: where, when and how, the end of its log, and what to do."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections import deque
from pathlib import Path
from typing import Any

from bigtx.config.runs import newest_checkpoint
from bigtx.utils import processes
from bigtx.utils.hardware import host_name
from bigtx.utils.heartbeat import Beat, Phase

LOG_LINES = 20
"""How many lines of a failed rank's log are shown."""


def explain_end(number: int, status: int, facts: dict[str, Any], run_dir: Path, beat: Beat | None, kills: int) -> str:
    """Return a message about a failed rank.

    Args:
        number: the rank.
        status: its exit status, or minus the signal that ended it.
        facts: what it reported; see `bigtx.utils.log.report`.
        run_dir: the run folder.
        beat: its last heartbeat; None where that is unknown.
        kills: how many processes the kernel had ended for want of memory when the run began.
    """
    step = facts.get("step") or _last_step(run_dir)
    who = f"rank {number} on {host_name()}"
    when = f"after step {step:,}" if step else "before the first step"
    if status < 0:
        doing = f" ({beat.phase.words})" if beat and beat.phase != Phase.STARTING else ""
        lines = [f"LaunchError: {who} was ended {when}{doing} by {_signal_name(-status)}{_why_killed(-status, kills)}"]
    else:
        lines = [f"{who} failed {when}: {facts.get('error', f'it ended with status {status}')}"]
    path = Path(facts.get("log", run_dir / "logs" / f"rank-{number:05d}.log"))
    if tail := _last_lines(path):
        lines += [f"The last lines of {path}:", *(f"  {line}" for line in tail)]
    if step:
        lines.append(how_to_resume(run_dir))
    return "\n".join(lines)


def how_to_resume(run_dir: Path) -> str:
    """Return a sentence that says from which checkpoint the same command resumes."""
    newest = newest_checkpoint(run_dir)
    if newest is None:
        return "No checkpoint was saved: the same command starts at the first step."
    return f"The same command resumes from the last checkpoint, {newest.name}."


def read_facts(pipe: int) -> dict[str, Any]:
    """Return the facts that a rank reported before it ended."""
    os.set_blocking(pipe, False)
    facts: dict[str, Any] = {}
    with open(pipe, "rb", closefd=True) as stream, contextlib.suppress(OSError, ValueError):
        for line in (stream.read() or b"").splitlines():
            facts |= json.loads(line)
    return facts


def _why_killed(number: int, kills: int) -> str:
    is_memory = number == signal.SIGKILL and processes.out_of_memory_kills() > kills
    return ", because this machine's memory ran out" if is_memory else ""


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _last_lines(path: Path) -> list[str]:
    with contextlib.suppress(OSError), path.open(encoding="utf-8", errors="replace") as stream:
        return [line.rstrip("\n") for line in deque(stream, LOG_LINES)]
    return []


def _last_step(run_dir: Path) -> int:
    """Return the last step in a run's metrics; 0 without one."""
    step = 0
    with contextlib.suppress(OSError), (run_dir / "metrics.jsonl").open("rb") as stream:
        for line in deque(stream, 5):
            with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError):
                step = int(json.loads(line)["step"])
    return step
