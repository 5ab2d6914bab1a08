"""`make demo`: train a model from scratch, on text that every machine has.

The text is the source code of Python's standard library, without its tests. The demo trains a tokenizer, prepares
shards, trains a decoder, and compares the model's bits per byte of held-out files with those of `xz -9`. It prints each
command that it runs, so that you can type it yourself.
"""

from __future__ import annotations

import json
import lzma
import os
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from bigtx.utils.hardware import num_gpus

ROOT = Path(__file__).resolve().parent.parent
FOLDER = Path(os.environ.get("BIGTX_DEMO_FOLDER", "runs/demo"))
EXCLUDED = ["*/test/*", "*/tests/*", "*/idle_test/*", "*/site-packages/*", "*/__pycache__/*"]
PROMPT_LINES = 8


def main() -> int:
    """Run the demo; return an exit status."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    stdlib = sysconfig.get_paths()["stdlib"]
    source = [f"input.paths=[{stdlib}]", "input.text_suffixes=[.py]", f"input.exclude={json.dumps(EXCLUDED)}"]
    tokenizer, data = FOLDER / "tokenizer", FOLDER / "data"

    headline("1. A tokenizer of 8,192 pieces")
    if (tokenizer / "bigtx_tokenizer.json").exists():
        print(f"{tokenizer} exists already")
    else:
        run_bigtx("tokenizer", "train", "configs/data/python-stdlib-tokenizer.yaml", *source, f"output={tokenizer}")

    headline("2. Shards, with some files held out")
    run_bigtx("data", "prepare", "configs/data/python-stdlib.yaml", *source, f"tokenizer={tokenizer}", f"output={data}")

    headline("3. Training")
    run_dir = choose_run_dir()
    prompts = FOLDER / "prompts.yaml"
    held_out = texts_of(data, "validation")
    prompts.write_text(yaml.safe_dump({"validation": {"sample_prompts": choose_prompts(held_out)}}), encoding="utf-8")
    train(run_dir, prompts)

    headline("4. How good is it?")
    compare_with_xz(run_dir, held_out, texts_of(data, "train"))
    print(f"""
Everything is in {FOLDER}: the tokenizer, the shards, and the run with its config, metrics, samples and checkpoints.
Next:
    bigtx generate {run_dir} prompt='def read_lines(path):'
    bigtx data inspect {data}
    bigtx pretrain configs/pretrain/python-stdlib.yaml run_dir=runs/mine model.num_layers=8
    wandb sync {run_dir}/wandb/offline-run-*        # the run's charts, once you are logged in""")
    return 0


def headline(text: str) -> None:
    """Print the title of a step."""
    print(f"\n== {text}", flush=True)


def run_bigtx(*arguments: str) -> None:
    """Print and run a bigtx command; end the demo with its status if it fails."""
    print(f"$ bigtx {' '.join(shell_word(argument) for argument in arguments)}", flush=True)
    status = subprocess.run([sys.executable, "-m", "bigtx", *arguments], cwd=ROOT).returncode
    if status:
        raise SystemExit(status)


def shell_word(word: str) -> str:
    """Quote a word for a shell."""
    return f"'{word}'" if set(word) & set('[]* "') else word


def choose_run_dir() -> Path:
    """Return the newest run if it is not finished, to resume it; otherwise a new folder. Print which."""
    number = 1
    while (FOLDER / f"run-{number}").exists():
        number += 1
    previous, new = FOLDER / f"run-{number - 1}", FOLDER / f"run-{number}"
    if number > 1 and not is_finished(previous):
        print(f"{previous} is not finished: it resumes from its last checkpoint")
        return previous
    print(f"{previous} is finished: a new run starts in {new}" if number > 1 else f"a new run in {new}")
    return new


def is_finished(run_dir: Path) -> bool:
    """Return whether the latest start of the run ended with all steps done."""
    try:
        lines = (run_dir / "events.jsonl").read_text(encoding="utf-8").splitlines()
    except OSError:
        return False
    ends = [event for event in map(json.loads, lines) if event["kind"] == "end"]
    return bool(ends) and ends[-1]["status"] == "finished"


def texts_of(data: Path, split: str) -> list[str]:
    """Decode the documents of a split from its shards: the tokenizer is lossless, so these are the files' texts."""
    import numpy as np
    import webdataset

    from bigtx.tokenizer.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(data / "tokenizer")
    shards = sorted(str(path) for path in (data / split).glob("*.tar"))
    blocks = webdataset.WebDataset(shards, shardshuffle=False).decode()
    tokens = np.concatenate([block["tokens.npy"] for block in blocks])
    ends = np.flatnonzero(tokens == tokenizer.end_id)
    return [tokenizer.decode(document.tolist()) for document in np.split(tokens, ends + 1) if len(document)]


def choose_prompts(texts: Sequence[str], count: int = 3) -> list[str]:
    """Return the lines of held-out files that begin with their first function or class."""
    prompts = []
    for text in sorted(texts, key=len, reverse=True):
        lines = text.splitlines()
        start = next((number for number, line in enumerate(lines) if line.startswith(("def ", "class "))), None)
        if start is not None and len(lines) > start + PROMPT_LINES:
            prompts.append("\n".join(lines[start : start + PROMPT_LINES]) + "\n")
        if len(prompts) == count:
            break
    return prompts


def train(run_dir: Path, prompts: Path) -> None:
    """Run `bigtx pretrain`, and print the time, the load and the memory that it took."""
    ranks = num_gpus() or 2
    arguments = [
        "pretrain",
        "configs/pretrain/python-stdlib.yaml",
        str(prompts.resolve()),
        f"run_dir={run_dir.resolve()}",
        f"data.sources.stdlib.path={(FOLDER / 'data').resolve()}",
        f"train.micro_batch_size={max(1, min(8, 16 // ranks))}",
        "--ranks",
        str(ranks),
    ]
    print(f"$ bigtx {' '.join(arguments)}", flush=True)
    load, begin = os.getloadavg()[0], time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", "bigtx", *arguments], cwd=ROOT)
    memory = PeakMemory(process.pid)
    try:
        status = process.wait()
    except KeyboardInterrupt:
        process.wait()
        print("interrupted; `make demo` resumes from the checkpoint", file=sys.stderr)
        raise SystemExit(130) from None
    seconds = time.monotonic() - begin
    print(
        f"training took {seconds / 60:.1f} minutes (load average {load:.1f} before, {os.getloadavg()[0]:.1f} after, "
        f"{os.cpu_count()} cores); peak memory of all its processes {memory.peak_gib():.2f} GiB"
    )
    if status:
        print(f"training ended with status {status}; `make demo` resumes from its last checkpoint", file=sys.stderr)
        raise SystemExit(status)


class PeakMemory:
    """A sampler of the summed proportional set size of a process and its descendants, until they end."""

    def __init__(self, pid: int) -> None:
        self._pid, self._peak_kib = pid, 0
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def peak_gib(self) -> float:
        """Return the largest sum so far, in GiB."""
        return self._peak_kib / 2**20

    def _watch(self) -> None:
        import psutil  # type: ignore[import-untyped]

        while True:
            try:
                process = psutil.Process(self._pid)
                family = [process, *process.children(recursive=True)]
            except psutil.Error:
                return
            self._peak_kib = max(self._peak_kib, sum(pss_kib(member.pid) for member in family))
            time.sleep(1)


def pss_kib(pid: int) -> int:
    """Read a process's proportional set size in KiB; 0 if the system does not report it."""
    try:
        with open(f"/proc/{pid}/smaps_rollup", encoding="ascii") as lines:
            return next((int(line.split()[1]) for line in lines if line.startswith("Pss:")), 0)
    except OSError:
        return 0


def compare_with_xz(run_dir: Path, held_out: Sequence[str], train_texts: Sequence[str]) -> None:
    """Print the bits per byte of the held-out files: the model's, from the run's last validation, and xz's."""
    metrics = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    measured: dict[str, Any] = next(line for line in reversed(metrics) if "validation/stdlib/bits_per_byte" in line)
    test, trained = "".join(held_out).encode(), "".join(train_texts).encode()
    alone = len(lzma.compress(test, preset=9)) * 8 / len(test)
    primed = (len(lzma.compress(trained + test, preset=9)) - len(lzma.compress(trained, preset=9))) * 8 / len(test)
    print(f"""{len(held_out)} held-out files, {len(test):,} bytes (trained on {len(trained):,}); bits per byte:
    this model                          {measured["validation/stdlib/bits_per_byte"]:.3f}
    xz -9 of the files                  {alone:.3f}
    xz -9 primed with the training text {primed:.3f}   (it copies long repeats; the model has a window of one row)""")


if __name__ == "__main__":
    sys.exit(main())
