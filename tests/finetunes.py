"""Fine-tuning as its users do it: tiny bases, tiny records in every kind of file, and the command."""

from __future__ import annotations

import csv
import io
import json
import random
import subprocess
import sys
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import forks
from doors import ROOT, TINY, environment, has_saved, kill_run, pretrain, wait_for

SHAPES: dict[str, list[str]] = {
    "decoder": [],
    "encoder": ["objective.name=masked", "model.shape=encoder", "model.norm=layer", "model.embedding_norm=true"],
}
"""Settings of a tiny base."""
RHYTHM = [
    "train.global_batch_size=8",
    "train.micro_batch_size=4",
    "train.log_every=1 steps",
    "optimizer.learning_rate=3e-3",
    "engine.precision=fp32",
    "engine.timeout=2 min",
    "track.wandb=off",
]
"""Of a tiny fine-tuning; what tests change comes after it."""
WORDS = [f"{a}{b}{c}" for a in "bdklmnprst" for b in "aeiou" for c in ("", "n", "r", "st")]
"""Those of the `corpus` of the tests."""


def base_arguments(corpus: Path, run_dir: Path, *changes: str, steps: int = 4) -> list[str]:
    """What the command of a tiny pretraining is given."""
    return [
        *TINY,
        "engine.precision=fp32",
        "model.max_sequence_length=64",
        f"data.sources.a.path={corpus}",
        f"run_dir={run_dir}",
        f"train.max_steps={steps}",
        "track.wandb=off",
        *changes,
    ]


def make_base(corpus: Path, run_dir: Path, *changes: str, steps: int = 4) -> Path:
    """A tiny pretrained run."""
    done = pretrain(*base_arguments(corpus, run_dir, *changes, steps=steps))
    assert done.returncode == 0, done.stdout + done.stderr
    return run_dir


def labelled(count: int, *, classes: Sequence[str] = ("joy", "woe"), seed: int = 1) -> list[dict[str, Any]]:
    """Texts whose class shows in their words, {"text", "label"}; the classes in turns."""
    generator, size = random.Random(seed), len(WORDS) // len(classes)
    records = []
    for number in range(count):
        place = number % len(classes)
        own = WORDS[place * size : (place + 1) * size]
        words = [
            generator.choice(own if generator.random() < 0.6 else WORDS) for _ in range(generator.randrange(6, 16))
        ]
        records.append({"text": " ".join(words) + ".", "label": classes[place]})
    return records


def write_jsonl(path: Path, records: Sequence[dict[str, Any]]) -> Path:
    """A JSON line for each record."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def write_table(path: Path, records: Sequence[dict[str, Any]]) -> Path:
    """A .csv or .tsv, as the suffix says."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(records[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(records)
    return path


def write_folders(path: Path, records: Sequence[dict[str, Any]]) -> Path:
    """A folder a class, with a file for each text."""
    for number, record in enumerate(records):
        file = path / record["label"] / f"{number}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(record["text"], encoding="utf-8")
    return path


def write_samples(path: Path, samples: Sequence[dict[str, bytes | str]]) -> Path:
    """A webdataset shard: of each sample the contents of its members by suffix."""
    with tarfile.open(path, "w") as archive:
        for number, sample in enumerate(samples):
            for suffix, content in sample.items():
                raw = content if isinstance(content, bytes) else content.encode()
                member = tarfile.TarInfo(f"{number:05d}.{suffix}")
                member.size = len(raw)
                archive.addfile(member, io.BytesIO(raw))
    return path


def finetune_command(arguments: Sequence[str], ranks: int = 1) -> list[str]:
    """The command line."""
    return [sys.executable, str(ROOT / "bigtx" / "finetune.py"), *arguments, f"--ranks={ranks}"]


def finetune(*arguments: str, ranks: int = 1, gpus: bool = False) -> subprocess.CompletedProcess[str]:
    """A fine-tuning, to its end."""
    return forks.run(
        finetune_command([*RHYTHM, *arguments], ranks),
        capture_output=True,
        text=True,
        timeout=600,
        env=environment(gpus=gpus),
    )


def finetuned(*arguments: str, ranks: int = 1) -> str:
    """A fine-tuning that must end well; returns what it said."""
    done = finetune(*arguments, ranks=ranks)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def start_finetune(*arguments: str, ranks: int = 1) -> subprocess.Popen[str]:
    """A fine-tuning in a session (and process group) of its own, like a terminal's foreground job."""
    return forks.start(
        finetune_command([*RHYTHM, *arguments], ranks),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=environment(),
    )


def kill_at(run_dir: Path, step: int, *arguments: str, ranks: int = 1) -> None:
    """Begin a fine-tuning and kill all its processes (-9) once it has a checkpoint and its metrics a step."""
    with started(run_dir, *arguments, ranks=ranks) as process:
        wait_for(lambda: has_saved(run_dir, step), process)


@contextmanager
def started(run_dir: Path, *arguments: str, ranks: int = 1) -> Iterator[subprocess.Popen[str]]:
    """A fine-tuning that is killed (-9) at the end of the block, if it still lives."""
    process = start_finetune(*arguments, ranks=ranks)
    try:
        yield process
    finally:
        kill_run(process, run_dir)


def results(run_dir: Path) -> dict[str, Any]:
    """What the run measured at its end."""
    return json.loads((run_dir / "results.json").read_text(encoding="utf-8"))
