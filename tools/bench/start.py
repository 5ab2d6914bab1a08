"""Measure how long a training takes to start, in each way to start one: seconds to its first line, to the progress bar
and to the end of the first step, and the processor time of all its processes up to the end of the run.

    python tools/bench/start.py [--rounds 5] [--only bigtx] [--json]

The program trains pretrain/small.yaml for one step on a small corpus that it makes, on a pseudo terminal. One round is
one start in each way, so that other load on the machine affects all ways equally; the figures are medians over the
rounds, and their ratios to the first way. After the first round, files are in the page cache.
"""

from __future__ import annotations

import argparse
import json
import os
import pty
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PYTHON = [sys.executable, "-m"]
MARKS = {
    "first line": re.compile(rb"(^|\n)bigtx: "),
    "bar": re.compile("(━|─|#|-) [01]/1".encode()),
    "first step": re.compile(rb" 1/1  loss"),
}
"""The text on the screen at each moment."""
FIGURES = (*MARKS, "processor")
SETTINGS = {
    "train.max_steps": "1",
    "train.log_every": "1 steps",
    "validation.max_sequences": "0",
    "validation.sample_prompts": "[]",
    "track.wandb": "off",
}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", metavar="WORD", default="", help="measure only the ways whose names contain this")
    parser.add_argument("--json", action="store_true", help="print every figure as JSON")
    options = parser.parse_args()
    chosen = {name: command for name, command in ways().items() if options.only in name}
    if not chosen or options.rounds < 1:
        parser.error(f"--only {options.only}: one of {', '.join(ways())}" if not chosen else "--rounds: at least 1")
    load_before = os.getloadavg()
    with tempfile.TemporaryDirectory(prefix="bigtx-start-") as scratch:
        corpus = make_corpus(Path(scratch))
        seconds: dict[str, dict[str, list[float]]] = {name: {figure: [] for figure in FIGURES} for name in chosen}
        for number in range(options.rounds):
            for name, command in chosen.items():
                run_dir = Path(scratch) / f"run-{number}-{name.replace(' ', '-')}"
                for figure, value in start(command, corpus, run_dir).items():
                    seconds[name][figure].append(value)
    report = {
        "cores": len(os.sched_getaffinity(0)),
        "load": [round(value, 2) for value in (load_before[0], os.getloadavg()[0])],
        "rounds": options.rounds,
        "seconds": seconds,
    }
    print(json.dumps(report, indent=2) if options.json else table(report))


def ways() -> dict[str, list[str]]:
    """Return the commands by name, up to the config's file."""
    found = {}
    if _runs([*PYTHON, "bigtx", "pretrain", "--help"]):
        for ranks in ("1", "2"):
            found[f"bigtx pretrain, {ranks} rank{'s' * (ranks != '1')}"] = [
                *(*PYTHON, "bigtx", "pretrain", "--ranks", ranks)
            ]
    found["python -m bigtx.pretrain"] = [*PYTHON, "bigtx.pretrain"]
    for ranks in ("1", "2"):
        found[f"deepspeed, {ranks} rank{'s' * (ranks != '1')}"] = [
            *(*PYTHON, "deepspeed.launcher.runner", "--num_accelerators", ranks),
            *("--master_port", str(random.randrange(20_000, 32_000)), "--module", "bigtx.pretrain"),
        ]
    found["torchrun, 2 ranks"] = [
        *(*PYTHON, "torch.distributed.run", "--nproc_per_node", "2", "-m", "bigtx.pretrain"),
    ]
    return found


def make_corpus(folder: Path) -> Path:
    """Prepare half a megabyte of random words."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 9))) for _ in range(3000)]
    text = folder / "words.txt"
    text.write_text("\n".join(" ".join(draw.choices(words, k=60)) for _ in range(1500)))
    bigtx, tokenizer, corpus = [*PYTHON, "bigtx"], folder / "tokenizer", folder / "corpus"
    inputs = f"input.paths={text}"
    for command in (
        [*bigtx, "tokenizer", "train", inputs, f"output={tokenizer}", "vocab_size=2k"],
        [*bigtx, "data", "prepare", inputs, f"tokenizer={tokenizer}", f"output={corpus}"],
    ):
        done = subprocess.run(command, env=with_clone(), capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{' '.join(command)}\nended with status {done.returncode}:\n{done.stdout}{done.stderr}")
    return corpus


def start(command: list[str], corpus: Path, run_dir: Path) -> dict[str, float]:
    """Train for one step, and record when each of `MARKS` is on the screen.

    Returns:
        Seconds since the command began, by mark, and of processor time.
    """
    settings = SETTINGS | {"run_dir": str(run_dir), "data.sources.words.path": str(corpus)}
    words = [*command, "pretrain/small.yaml", *(f"{key}={value}" for key, value in settings.items())]
    screen, end = pty.openpty()
    began, seconds, shown = time.monotonic(), {}, b""
    process = subprocess.Popen(words, env=with_clone(), stdin=subprocess.DEVNULL, stdout=end, stderr=end)
    os.close(end)
    while chunk := _read(screen):
        shown += chunk
        for mark, pattern in MARKS.items():
            if mark not in seconds and pattern.search(shown):
                seconds[mark] = time.monotonic() - began
    os.close(screen)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if status or seconds.keys() != MARKS.keys():
        sys.exit(f"{' '.join(words)}\nended with status {process.returncode} and showed:\n{shown.decode()}")
    return seconds | {"processor": usage.ru_utime + usage.ru_stime}


def table(report: dict[str, Any]) -> str:
    """Format the medians as a table of Markdown, with their ratios to the first way."""
    lines = [
        f"{report['cores']} cores, load {report['load'][0]} before and {report['load'][1]} after, medians of "
        f"{report['rounds']} interleaved rounds, in seconds",
        "",
        "| way | " + " | ".join(FIGURES) + " |",
        "|---|" + "---|" * len(FIGURES),
    ]
    first: dict[str, float] = {}
    for name, figures in report["seconds"].items():
        medians = {figure: statistics.median(values) for figure, values in figures.items()}
        first = first or medians
        cells = [f"{value:.2f} ({value / first[figure]:.2f})" for figure, value in medians.items()]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _read(screen: int) -> bytes:
    try:
        return os.read(screen, 65536)
    except OSError:  # Linux raises this when the last process with the terminal has ended.
        return b""


def _runs(command: list[str]) -> bool:
    return subprocess.run(command, env=with_clone(), capture_output=True).returncode == 0


def with_clone() -> dict[str, str]:
    """Return the user's environment, with this clone's bigtx and the tools of this Python's environment."""
    paths = {"PYTHONPATH": str(ROOT), "PATH": str(Path(sys.executable).parent)}
    joined = {name: os.pathsep.join(filter(None, [path, os.environ.get(name)])) for name, path in paths.items()}
    return os.environ | joined | {"TERM": "xterm", "CUDA_VISIBLE_DEVICES": ""}


if __name__ == "__main__":
    main()
