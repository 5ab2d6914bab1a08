"""Measure what checkpoints cost a training: throughput, stalls, the time until they are durable, size, memory, resume.

    python tools/bench/checkpoint.py [--windows 7] [--window-steps 200] [--every 50] [--json] [KEY=VALUE ...]

The program trains pretrain/small.yaml, scaled to 13M parameters, on the standard library's source code: one rank on the
CPU with two threads, or on one GPU. The windows of one run alternate between saving and not saving, so that other load
on the machine affects both equally; the loss of throughput is the ratio of their medians, and, where the machine's
speed changes for minutes, the median of the ratios of neighbours. A second run saves
synchronously (`train.async_checkpoints=false`), for comparison. Then the first run is resumed, with its files in the
page cache. A short run, in which freed memory is returned at once, shows by how much saves let memory grow.
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from throughput import prepare_corpus, run

from bigtx.config.load import load
from bigtx.config.schema import PretrainConfig
from bigtx.engine.checkpoint import list_checkpoints, read_manifest
from bigtx.model.size import count_parameters
from bigtx.pretraining.run import pretrain
from bigtx.train import loop
from bigtx.train.context import RunContext
from bigtx.train.state import Cadence, RunState
from bigtx.utils.hardware import keep_freed_memory

SCALED = [
    "model.hidden_size=320",
    "model.num_layers=8",
    "model.num_heads=5",
    "model.mlp_size=1280",
    "train.global_batch_size=4",
    "train.micro_batch_size=4",
    "train.log_every=10 steps",
    "validation.every=100M steps",
    "validation.max_sequences=0",
    "validation.sample_prompts=[]",
    "track.wandb=off",
]
"""Settings on top of pretrain/small.yaml: about 13M parameters, and steps of about half a second on two cores."""


class Windows(Cadence):
    """A cadence of saves that is off in every second window of steps, and the clock of the windows.

    Attributes:
        seconds: of each window that ended, in order; the first one is a warm-up.
    """

    def __init__(self, window_steps: int, every: int) -> None:
        self._window_steps, self._save_every = window_steps, every
        self._began = time.monotonic()
        self.seconds: list[float] = []

    def due(self, state: RunState, elapsed_seconds: float) -> bool:
        """Return whether this step is saved. The last save of a window has time to become durable within it."""
        window, step = divmod(state.step - 1, self._window_steps)
        is_saving = window > 0 and window % 2 == 0
        if step == self._window_steps - 1:
            now = time.monotonic()
            self.seconds.append(now - self._began)
            self._began = now
        return is_saving and step % self._save_every == 0


class FirstSaves(Cadence):
    """A cadence of saves at steps 20, 25, ..., and the most memory of this process without saves and with them.

    Attributes:
        peaks: resident bytes: the most in steps 10 to 20, before the first save, and the most after it.
    """

    def __init__(self) -> None:
        self.peaks = [0, 0]

    def due(self, state: RunState, elapsed_seconds: float) -> bool:
        """Return whether this step is saved."""
        if state.step in (10, 20):
            self.peaks[0] = peak_bytes()
            Path("/proc/self/clear_refs").write_text("5")  # The peak begins again.
        elif state.step > 20:
            self.peaks[1] = peak_bytes()
        return state.step >= 20 and state.step % 5 == 0


def peak_bytes() -> int:
    """Return the most memory that this process had in use since the peak was reset."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) << 10


def train(settings: list[str], saves: Cadence, keep: Callable[[], None]) -> Cadence:
    """Train a run whose saves follow the cadence. Call this in a process of its own: a run takes its output over.

    Args:
        keep: what the run calls in place of `keep_freed_memory`.
    """
    config = load(PretrainConfig, settings)

    def choose(every: str, *, tokens: int = 0) -> Cadence:
        return saves if every == config.train.checkpoint_every else Cadence(every, tokens=tokens)

    with (
        mock.patch.object(loop, "Cadence", choose),
        mock.patch.object(loop, "keep_freed_memory", keep),
        RunContext(config) as context,
    ):
        pretrain(context)
    return saves


def return_freed_memory() -> None:
    """Do nothing: the allocator then returns large pieces to the system."""


def train_in_a_process(settings: list[str], saves: Cadence, keep: Callable[[], None] = keep_freed_memory) -> Any:
    """Train in a process of its own and return the cadence at the end; see `train`."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(train, settings, saves, keep).result()


def memory_of_saves(settings: list[str]) -> int:
    """Return the bytes by which saves let the memory of a training grow.

    Freed tensors are returned to the system at once. Otherwise the allocator of the C library keeps and splits them,
    and memory grows for many steps, with and without saves, by more than a checkpoint.
    """
    with mock.patch.dict(os.environ, MALLOC_MMAP_THRESHOLD_="65536"):
        before, after = train_in_a_process(settings, FirstSaves(), return_freed_memory).peaks
    return after - before


def saves_of(run_dir: Path) -> list[dict[str, float]]:
    """Return the metrics of each save of a run."""
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [record for record in map(json.loads, lines) if "checkpoint/stall_seconds" in record]


def medians(saves: list[dict[str, float]]) -> dict[str, float]:
    """Return the median of each metric of saves."""
    names = ("stall_seconds", "wait_seconds", "durable_seconds")
    return {name: statistics.median(save[f"checkpoint/{name}"] for save in saves) for name in names}


def seconds_to_resume(settings: list[str], run_dir: Path, steps: int) -> float:
    """Return the seconds from the command that resumes a run to the end of its first new step."""
    metrics = run_dir / "metrics.jsonl"
    words = [*settings, f"train.max_steps={steps + 1}", "train.log_every=1 steps", "allow_changes=[train.max_steps]"]
    before, began = metrics.stat().st_size, time.monotonic()
    command = [sys.executable, "-m", "bigtx", "pretrain", *words]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None and metrics.stat().st_size == before:
            time.sleep(0.01)
        seconds = time.monotonic() - began
        _, errors = process.communicate()
    if process.returncode:
        sys.exit(f"the run was not resumed:\n{errors[-2000:]}")
    return seconds


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Train, resume, and summarize."""
    corpus = prepare_corpus(folder)
    steps = options.window_steps * (2 * options.windows + 1)
    run_dir = folder / "run"
    common = ["pretrain/small.yaml", f"data.sources.library.path={corpus}", *SCALED, *options.settings]
    settings = [*common, f"run_dir={run_dir}", "train.checkpoint_every=99M steps", f"train.max_steps={steps}"]
    windows = train_in_a_process(settings, Windows(options.window_steps, options.every))
    timed, saves = windows.seconds[1:], saves_of(run_dir)[:-1]  # The last save is the end of the run.
    without, with_saves = (statistics.median(timed[place::2]) for place in (0, 1))

    synchronous = folder / "synchronous"
    few = [f"run_dir={synchronous}", "train.checkpoint_every=5 steps", "train.max_steps=50"]
    run([sys.executable, "-m", "bigtx", "pretrain", *common, *few, "train.async_checkpoints=false"], folder / "run.log")

    cadence = ["train.checkpoint_every=99M steps", "train.max_steps=50"]
    growth = memory_of_saves([*common, f"run_dir={folder / 'memory'}", *cadence])

    newest = list_checkpoints(run_dir)[0]
    manifest = read_manifest(newest)
    num_bytes = sum(entry["size"] for entry in manifest["files"].values())
    num_parameters = count_parameters(load(PretrainConfig, [str(run_dir / "config.yaml")], check=False).model).total
    in_background, stalled = medians(saves), medians(saves_of(synchronous))
    return {
        "parameters": num_parameters,
        "bytes_per_parameter": num_bytes / num_parameters,
        "step_seconds": without / options.window_steps,
        "windows": options.windows,
        "window_steps": options.window_steps,
        "saves": len(saves),
        "throughput_loss": with_saves / without - 1,
        "throughput_loss_of_pairs": statistics.median(b / a for a, b in zip(timed[::2], timed[1::2], strict=True)) - 1,
        "stall_seconds": in_background["stall_seconds"],
        "synchronous_stall_seconds": stalled["stall_seconds"],
        "stall_ratio": in_background["stall_seconds"] / stalled["stall_seconds"],
        "durable_seconds": in_background["durable_seconds"],
        "memory_growth_of_saved": growth / num_bytes,
        "seconds_to_resume": seconds_to_resume(settings, run_dir, steps),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=7, help="windows with saves, and as many without (default 7)")
    parser.add_argument("--window-steps", type=int, default=200, help="steps of a window (default 200)")
    parser.add_argument("--every", type=int, default=50, help="steps between saves (default 50)")
    parser.add_argument("--json", action="store_true", help="print every figure as JSON")
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="settings of the runs")
    options = parser.parse_args()
    if options.windows < 1 or not 1 <= options.every < options.window_steps:
        parser.error("--windows must be at least 1, and --every less than --window-steps")
    load_before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="bigtx-checkpoint-") as folder:
        figures = measure(options, Path(folder))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {os.cpu_count()} cores"
    loads = [round(load_before, 1), round(os.getloadavg()[0], 1)]
    result = {"date": datetime.date.today().isoformat(), "device": device, "load": loads, **figures}
    if options.json:
        print(json.dumps(result))
        return
    for name, value in result.items():
        print(f"{name:28}{value:.4g}" if isinstance(value, float) else f"{name:28}{value}")


if __name__ == "__main__":
    main()
