"""Measure tokens per second and MFU of training on this machine, with the commands that a user runs; print JSON.

    python tools/bench/throughput.py [--model decoder-350m] [--steps 30] [engine.zero_stage=2 ...]

The program trains decoders of configs/model from scratch, on all GPUs or, without a GPU, a tiny one on the CPU. The
text is the standard library's source code: it needs no download, and throughput does not depend on the text. The
figures are medians over the steps after the warm-up, as the run logs them. MFU is `flops_per_token` times tokens per
second divided by the devices' peak; if the peak is unknown, there is no MFU.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

import torch

from bigtx.config.load import load
from bigtx.config.schema import PretrainConfig
from bigtx.model.size import count_parameters, flops_per_token

ROOT = Path(__file__).resolve().parents[2]
VOCAB_SIZE = 50_304
"""The vocabulary of the model: the tokenizer trained here is smaller, but the size of the head determines the speed."""

MICRO_BATCH_TOKENS = {"decoder-125m": 65_536, "decoder-350m": 32_768, "decoder-1.3b": 16_384}
"""Micro batches that fit 80 GB without activation checkpointing and keep a GPU busy."""

FLOPS_FORMULA = "6 * (parameters of the blocks and the head) + 12 * layers * attention width * sequence length"


def run(command: list[str], log: Path) -> None:
    """Run a command of bigtx from the repository's root; its output goes to `log`, and to the screen if it fails."""
    with log.open("ab") as file:
        done = subprocess.run(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\nended with status {done.returncode}:\n{log.read_text()[-4000:]}")


def prepare_corpus(folder: Path) -> Path:
    """Train a small tokenizer on the standard library and prepare its text into shards."""
    library = sysconfig.get_path("stdlib")
    text = [f"input.paths=[{library}]", "input.text_suffixes=[.py]"]
    text.append("input.exclude=['*/site-packages/*', '*/dist-packages/*', '*/test/*', '*/tests/*']")
    bigtx = [sys.executable, "-m", "bigtx"]
    tokenizer, corpus, log = folder / "tokenizer", folder / "corpus", folder / "prepare.log"
    run([*bigtx, "tokenizer", "train", *text, f"output={tokenizer}", "vocab_size=4k", "max_bytes=4 MiB"], log)
    run([*bigtx, "data", "prepare", *text, f"tokenizer={tokenizer}", f"output={corpus}"], log)
    return corpus


def settings_of(model: str, options: argparse.Namespace, on_gpu: bool) -> list[str]:
    """Return the settings of a model's run, with those of the command line last."""
    micro_batch_size = options.micro_batch_size
    if micro_batch_size is None:
        micro_batch_size = max(1, MICRO_BATCH_TOKENS.get(model, 4096) // options.sequence_length)
    return [
        f"model/{model}.yaml",
        f"model.vocab_size={VOCAB_SIZE}",
        f"train.sequence_length={options.sequence_length}",
        f"train.micro_batch_size={micro_batch_size}",
        f"train.global_batch_size={micro_batch_size * options.accumulation * options.ranks}",
        f"train.max_steps={options.steps}",
        "train.log_every=1 steps",
        "train.checkpoint_every=1M steps",
        "validation.max_sequences=0",
        f"engine.compile={str(on_gpu).lower()}",
        "track.wandb=off",
        *options.overrides,
    ]


def measure(settings: list[str], corpus: Path, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Train and summarize what the run logged."""
    run_dir = folder / "run"
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", str(options.ranks)]
    where = [f"run_dir={run_dir}", f"data.sources.library.path={corpus}"]
    run([*launcher, "bigtx/pretrain.py", *settings, *where], folder / "run.log")
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    logged = [record for record in map(json.loads, lines) if "perf/tokens_per_second" in record][options.warmup :]
    names = ("perf/tokens_per_second", "perf/mfu", "perf/step_seconds", "perf/memory_gib", "perf/data_wait_fraction")
    figures = {name: statistics.median(record[name] for record in logged) for name in names if name in logged[-1]}
    config = load(PretrainConfig, [str(run_dir / "config.yaml")], check=False)
    flops = flops_per_token(config.model, config.train.sequence_length)
    shutil.rmtree(run_dir)
    return {
        "parameters": count_parameters(config.model).total,
        "flops_per_token": flops,
        "model_flops_per_second": flops * figures["perf/tokens_per_second"],
        **figures,
        "steps_counted": len(logged),
        "settings": settings,
    }


def parse_arguments(on_gpu: bool) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = list(MICRO_BATCH_TOKENS) if on_gpu else ["decoder-1m"]
    parser.add_argument(
        "--model", action="append", metavar="NAME", help=f"a size of configs/model; may be repeated. {default}"
    )
    parser.add_argument("--sequence-length", type=int, default=2048 if on_gpu else 128, help="tokens of a row")
    parser.add_argument("--micro-batch-size", type=int, help="rows of a forward pass on one rank (by the model)")
    parser.add_argument("--accumulation", type=int, default=4 if on_gpu else 1, help="forward passes of a step")
    parser.add_argument("--steps", type=int, default=30, help="of each run")
    parser.add_argument("--warmup", type=int, default=10, help="first steps that do not count (compilation)")
    parser.add_argument("--ranks", type=int, default=torch.cuda.device_count() if on_gpu else 2, help="processes")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings of the runs")
    options = parser.parse_args()
    options.model = options.model or default
    if options.steps <= options.warmup:
        parser.error(f"--steps must be more than the {options.warmup} of --warmup")
    return options


def main() -> None:
    """Measure each model and print one JSON object."""
    on_gpu = torch.cuda.is_available()
    options = parse_arguments(on_gpu)
    result: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name() if on_gpu else f"CPU, {os.cpu_count()} cores",
        "ranks": options.ranks,
        "torch": torch.__version__,
        "flops_per_token": FLOPS_FORMULA,
        "models": {},
    }
    with tempfile.TemporaryDirectory(prefix="bigtx-bench-") as temporary:
        folder = Path(temporary)
        corpus = prepare_corpus(folder)
        for model in options.model:
            result["models"][model] = measure(settings_of(model, options, on_gpu), corpus, folder, options)
            # The results so far are not lost if a later model fails.
            print(f"{model}: {json.dumps(result['models'][model])}", file=sys.stderr, flush=True)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
