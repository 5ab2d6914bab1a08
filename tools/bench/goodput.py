"""Measure goodput: the share of the wall time in which a training that is often killed makes steps that count.

    python tools/bench/goodput.py [--every 200] [--kills 3] [--json]
    python tools/bench/goodput.py --quick                  30 steps of a small model between two kills

The program trains a decoder with two ranks on a small corpus that it makes. Each time that the run has made `--every`
more steps, all of its processes are ended by kill -9, and the same command resumes it. Goodput is the time of the steps
that count, each counted once, over the time from the first command to the end of the last one. The table says where the
other seconds went: the phases of the starts (from the events `start_up` of the run), steps that were lost with a kill
and made again, and the rest, which is mostly the stalls of checkpoints and the end of the run.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from start import make_corpus, with_clone

MODEL = {"model.hidden_size": "320", "model.num_layers": "4", "model.num_heads": "5", "train.sequence_length": "256"}
"""A step takes about half a second on two cores."""
QUICK = {"model.hidden_size": "128", "model.num_layers": "2", "model.num_heads": "2", "train.sequence_length": "128"}
SETTINGS = {
    "train.global_batch_size": "8",
    "train.micro_batch_size": "4",
    "train.log_every": "1 steps",
    "validation.max_sequences": "0",
    "validation.sample_prompts": "[]",
    "track.wandb": "off",
    "engine.precision": "fp32",
}
RANKS = 2
POLL_SECONDS = 0.02


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=int, help="steps between two kills (default 200; 30 with --quick)")
    parser.add_argument("--kills", type=int, help="how many (default 3; 2 with --quick)")
    parser.add_argument("--save-every", type=int, help="steps between two checkpoints (default: a tenth of --every)")
    parser.add_argument("--quick", action="store_true", help="a smaller model, fewer steps")
    parser.add_argument("--json", action="store_true", help="print all figures as JSON")
    options = parser.parse_args()
    every = options.every or (30 if options.quick else 200)
    kills = options.kills if options.kills is not None else (2 if options.quick else 3)
    model = (QUICK if options.quick else MODEL) | {"model.max_sequence_length": "256"}
    save_every = options.save_every or max(1, every // 10)
    steps = {"train.max_steps": str(every * (kills + 1)), "train.checkpoint_every": f"{save_every} steps"}
    load_before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="bigtx-goodput-") as scratch:
        corpus = {"data.sources.words.path": str(make_corpus(Path(scratch)))}
        run_dir = Path(scratch) / "run"
        settings = SETTINGS | model | steps | corpus | {"run_dir": str(run_dir)}
        warm_up(settings | {"run_dir": f"{scratch}/warm", "train.max_steps": "1"})
        report = measure(settings, run_dir, every, kills)
    report["every"], report["save_every"] = every, save_every
    report["cores"] = len(os.sched_getaffinity(0))
    report["load"] = [round(value, 1) for value in (load_before, os.getloadavg()[0])]
    print(json.dumps(report, indent=2) if options.json else table(report))


def command(settings: Mapping[str, str]) -> list[str]:
    """Return the command line of the training."""
    words = [f"{key}={value}" for key, value in settings.items()]
    return [sys.executable, "-m", "bigtx", "pretrain", *words, "--ranks", str(RANKS)]


def warm_up(settings: Mapping[str, str]) -> None:
    """Train one step, so that the files of all packages are in the page cache."""
    subprocess.run(command(settings), env=with_clone(), check=True, stdout=subprocess.DEVNULL)


def measure(settings: Mapping[str, str], run_dir: Path, every: int, kills: int) -> dict[str, Any]:
    """Run the training with its kills.

    Returns:
        `wall`, the seconds from the first command to the end of the last; `productive`, those of the steps that count;
        `resume`, for each start the seconds from its command to the end of its first step; and `seconds`, where the
        others went.
    """
    attempts: list[dict[int, float]] = []
    began = time.monotonic()
    for number in range(kills + 1):
        process = subprocess.Popen(
            command(settings), env=with_clone(), stdout=subprocess.DEVNULL, start_new_session=True
        )
        while process.poll() is None and (number == kills or _last_step(run_dir) < every * (number + 1)):
            time.sleep(POLL_SECONDS)
        if number < kills:
            os.killpg(process.pid, signal.SIGKILL)
        if process.wait() != (0 if number == kills else -signal.SIGKILL):
            sys.exit(f"the training ended with status {process.returncode}")
        attempts.append({line["step"]: line["perf/step_seconds"] for line in _lines(run_dir / "metrics.jsonl")})
    wall = time.monotonic() - began
    phases = [event["seconds"] for event in _lines(run_dir / "events.jsonl") if event["kind"] == "start_up"]
    return account(attempts, phases, wall)


def account(attempts: list[dict[int, float]], starts: list[dict[str, float]], wall: float) -> dict[str, Any]:
    """Return where the seconds of a run went.

    Args:
        attempts: for each start of the run, the seconds of the steps in metrics.jsonl at its end. Steps that a kill
            cost are there again at the end of the next start, with other seconds.
        starts: for each start, the seconds of its phases; the last one is the first step.
        wall: seconds of the whole run.
    """
    final = attempts[-1]
    productive = sum(final.values())
    seconds: dict[str, float] = defaultdict(float)
    for phases in starts:
        for phase, value in phases.items():
            seconds[f"start: {phase}"] += value
    # The first step of each start is a step that counts; only what it took longer is a cost.
    usual = statistics.median(final.values())
    seconds["start: first_step"] = max(0.0, seconds["start: first_step"] - usual * len(starts))
    seconds["steps made again"] = sum(
        value for before, after in pairwise(attempts) for step, value in before.items() if after.get(step) != value
    )
    seconds["checkpoints, ends and the rest"] = max(0.0, wall - productive - sum(seconds.values()))
    return {
        "wall": round(wall, 1),
        "productive": round(productive, 1),
        "goodput": round(productive / wall, 4),
        "steps": len(final),
        "step": round(usual, 3),
        "kills": len(attempts) - 1,
        "resume": [round(sum(phases.values()), 1) for phases in starts],
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
    }


def table(report: Mapping[str, Any]) -> str:
    """Format a report as a table of Markdown."""
    lines = [
        f"{report['steps']} steps of {report['step']} s, a checkpoint every {report['save_every']} steps, "
        f"{report['kills']} times kill -9 after {report['every']} steps; {report['cores']} cores, load "
        f"{report['load'][0]} before and {report['load'][1]} after",
        "",
        f"goodput {report['goodput']:.1%}: {report['productive']} of {report['wall']} s; from the command to the end "
        f"of the first step {', '.join(f'{value:.1f}' for value in report['resume'])} s",
        "",
        "| where the other seconds went | s | share |",
        "|---|---|---|",
    ]
    lines += [f"| {name} | {value:.1f} | {value / report['wall']:.1%} |" for name, value in report["seconds"].items()]
    return "\n".join(lines)


def _last_step(run_dir: Path) -> int:
    return max((line["step"] for line in _lines(run_dir / "metrics.jsonl")), default=0)


def _lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a JSON-lines file, without a last line that is still being written."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


if __name__ == "__main__":
    main()
