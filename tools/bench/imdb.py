"""Train a classifier on the Large Movie Review Dataset from scratch; compare random weights and TF-IDF with it.

    python tools/bench/imdb.py aclImdb/train runs/imdb [--peers-python PYTHON] [--rates 5e-4 1e-3]

The folder has pos/, neg/ and unsup/. Each step is a command that a user could type:

1. (timed) a tokenizer and a corpus of unsup/, pretraining, then a fine-tuning for each learning rate, side by side; the
   one with the best validation accuracy is measured on the test reviews, once.
2. (not timed) the same fine-tunings of the same model from random weights.
3. TF-IDF with logistic regression on the same reviews, by a Python that has scikit-learn (imdb-peers.txt).

A step is skipped if its result exists, so the program can be stopped and started again; RUNS/times.json has the sums of
the times.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


class Steps:
    """A runner of commands that records the time of each."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._file = folder / "times.json"
        self.seconds: dict[str, float] = json.loads(self._file.read_text()) if self._file.exists() else {}

    def run(self, name: str, *commands: Sequence[str]) -> None:
        """Run commands side by side, with the cores divided among them, unless they have been completed before."""
        if f"{name} done" in self.seconds:
            return
        cores = sorted(os.sched_getaffinity(0))
        size = max(1, len(cores) // len(commands))
        begin, running = time.monotonic(), []
        for number, command in enumerate(commands):
            print(f"== {name}: {' '.join(command)}", flush=True)
            running.append(subprocess.Popen([sys.executable, *command], cwd=ROOT, env=_environment(size)))
            # Without binding, two processes sometimes shared one of two cores for minutes.
            first = number * size % len(cores)
            os.sched_setaffinity(running[-1].pid, cores[first : first + size])
        try:
            failed = [command for command, process in zip(commands, running, strict=True) if process.wait()]
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - begin
            self._file.write_text(json.dumps(self.seconds))
        if failed:
            raise SystemExit(f"{name} failed: {' '.join(failed[0])}")
        self.seconds[f"{name} done"] = 1.0
        self._file.write_text(json.dumps(self.seconds))

    def minutes(self, *prefixes: str) -> float:
        """Return the minutes of all commands whose names begin with a prefix."""
        return (
            sum(
                value
                for name, value in self.seconds.items()
                if name.startswith(prefixes) and not name.endswith(" done")
            )
            / 60
        )


def _environment(num_threads: int) -> dict[str, str]:
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    threads = {"OMP_NUM_THREADS": str(num_threads), "OMP_PROC_BIND": "close", "OMP_PLACES": "cores"}
    return os.environ | threads | {"PYTHONPATH": paths}


def fine_tune(steps: Steps, arm: str, options: argparse.Namespace) -> dict[str, Any]:
    """Fine-tune with each learning rate; return the results of the one with the best validation accuracy."""
    runs = options.runs
    start = [f"base={runs / 'pretrained'}"]
    if arm == "scratch":
        start = [f"tokenizer={runs / 'tokenizer'}", options.pretrain]
    run_dirs = [runs / f"{arm}-{rate}" for rate in options.rates]
    steps.run(
        arm,
        *(
            [
                "bigtx/finetune.py",
                *_model_of(start),
                options.finetune,
                f"data.train={options.folder}",
                f"run_dir={run_dir}",
                f"optimizer.learning_rate={rate}",
                "validation.test=false",
                *options.set,
            ]
            for rate, run_dir in zip(options.rates, run_dirs, strict=True)
        ),
    )
    found = {
        run_dir: json.loads((run_dir / "results.json").read_text())["validation"]["accuracy"] for run_dir in run_dirs
    }
    best = max(found, key=lambda run_dir: found[run_dir])
    steps.run(
        f"{arm} test", ["-m", "bigtx", "evaluate", str(best), "--split", "test", "--output", str(best / "test.json")]
    )
    result = json.loads((best / "test.json").read_text())
    return {"run": best.name, "validation": found[best], "test": result["metrics"]["accuracy"], "all": found}


def _model_of(start: list[str]) -> list[str]:
    """Return a recipe's section `model` as settings; its other sections are not for fine-tuning."""
    if len(start) == 1:
        return start
    from bigtx.config.load import load
    from bigtx.config.schema import ModelConfig, PretrainConfig

    model, plain = load(PretrainConfig, [start[1]], check=False).model, ModelConfig()
    changed = {name: value for name, value in vars(model).items() if value != getattr(plain, name)}
    return [start[0], *(f"model.{name}={str(value).lower()}" for name, value in changed.items())]


def main() -> None:
    """Run the missing steps and print the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="aclImdb/train")
    parser.add_argument("runs", type=Path, help="where all goes")
    parser.add_argument("--pretrain", default="configs/pretrain/imdb-decoder.yaml")
    parser.add_argument("--finetune", default="configs/finetune/imdb.yaml")
    parser.add_argument("--rates", nargs="+", default=["5e-4", "1e-3"])
    parser.add_argument("--set", nargs="*", default=["track.wandb=off"], help="more settings of the fine-tunings")
    parser.add_argument("--vocab-size", default="12k")
    parser.add_argument("--peers-python", help="a Python with scikit-learn")
    options = parser.parse_args()
    options.folder, options.runs = options.folder.resolve(), options.runs.resolve()
    steps, runs, texts = Steps(options.runs), options.runs, f"input.paths={options.folder / 'unsup'}"
    tokenizer, corpus = f"{runs / 'tokenizer'}", f"{runs / 'corpus'}"
    steps.run(
        "prepare tokenizer",
        ["-m", "bigtx", "tokenizer", "train", texts, f"output={tokenizer}", f"vocab_size={options.vocab_size}"],
    )
    prepare = ["-m", "bigtx", "data", "prepare", texts, f"tokenizer={tokenizer}", f"output={corpus}"]
    steps.run("prepare corpus", [*prepare, "validation_fraction=0.01"])
    pretrain = ["bigtx/pretrain.py", options.pretrain, f"data.sources.reviews.path={corpus}"]
    steps.run("pretrain", [*pretrain, f"run_dir={runs / 'pretrained'}", "track.wandb=off"])
    ours = fine_tune(steps, "tuned", options)
    minutes = steps.minutes("prepare", "pretrain", "tuned")
    print(f"pretrained, then tuned: {ours}; {minutes:.1f} minutes for all of it", flush=True)
    scratch = fine_tune(steps, "scratch", options)
    print(f"from random weights: {scratch}; {100 * (ours['test'] - scratch['test']):.2f} points below", flush=True)
    if options.peers_python:
        peers = subprocess.run(
            [options.peers_python, str(Path(__file__).with_name("imdb_peers.py")), str(options.folder)],
            check=True,
            capture_output=True,
            text=True,
        )
        print(f"TF-IDF with logistic regression: {peers.stdout.strip()}")


if __name__ == "__main__":
    main()
