"""Trainings on GPUs as users start them: from text to a model that writes, and on from a checkpoint bit for bit."""

from __future__ import annotations

import json
import shutil
import sysconfig
from pathlib import Path

import pytest
import torch
from doors import BF16, ROOT, TINY, bigtx, losses, pretrain, read_lines

pytestmark = pytest.mark.gpu

STEPS = 200
PROMPT = "def read_lines(path):\n"


@pytest.fixture(scope="module")
def standard_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's corpus, from a smaller sample for the tokenizer."""
    folder = tmp_path_factory.mktemp("standard-library")
    text = [f"input.paths=[{sysconfig.get_path('stdlib')}]", "input.text_suffixes=[.py]"]
    text.append("input.exclude=['*/test/*', '*/tests/*', '*/site-packages/*', '*/dist-packages/*']")
    tokenizer = ["tokenizer", "train", "data/python-stdlib-tokenizer.yaml", *text, "max_bytes=4 MiB"]
    prepare = ["data", "prepare", "data/python-stdlib.yaml", *text, f"tokenizer={folder / 'tokenizer'}"]
    for command in ([*tokenizer, f"output={folder / 'tokenizer'}"], [*prepare, f"output={folder / 'data'}"]):
        done = bigtx(*command)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder / "data"


@pytest.fixture(scope="module")
def trained(standard_library: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's recipe, shortened, through the deepspeed launcher on every GPU that the batch can be divided by."""
    run_dir = tmp_path_factory.mktemp("trained") / "run"
    ranks = max(number for number in (1, 2, 4, 8, 16) if number <= torch.cuda.device_count())
    done = pretrain(
        str(ROOT / "configs/pretrain/python-stdlib.yaml"),
        f"data.sources.stdlib.path={standard_library}",
        f"run_dir={run_dir}",
        f"train.max_steps={STEPS}",
        f"train.micro_batch_size={min(8, 16 // ranks)}",
        "validation.max_sequences=256",
        f"validation.sample_prompts=[{json.dumps(PROMPT)}]",
        "engine.compile=true",
        ranks=ranks,
        launcher=True,
        gpus=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"deepspeed, {ranks} rank" in done.stdout, done.stdout
    return run_dir


def test_the_demo_learns(trained: Path) -> None:
    lines = read_lines(trained / "metrics.jsonl")
    trainings = [line for line in lines if "train/loss" in line]
    # On a CPU: 6.4 over the first 25 steps (a new model begins at ln(8192) = 9.0), 4.0 over the last, 3.8 on held-out
    # files.
    assert trainings[-1]["step"] == STEPS
    assert trainings[-1]["train/loss"] < min(4.6, trainings[0]["train/loss"] - 1.0)
    assert next(line for line in lines if "validation/stdlib/loss" in line)["validation/stdlib/loss"] < 4.4
    assert trainings[-1]["perf/memory_gib"] > 0.05 and trainings[-1]["train/skipped_steps"] == 0
    assert read_lines(trained / "samples.jsonl")
    environment = json.loads((trained / "environment.json").read_text(encoding="utf-8"))
    assert environment["gpus"] and environment["cuda"]


def test_generate_from_it_on_the_gpu(trained: Path) -> None:
    arguments = ["generate", str(trained), "--prompt", PROMPT, "--max-new-tokens", "40", "--seed", "3"]
    first, second = (bigtx(*arguments, "--device", "cuda", gpus=True) for _ in range(2))
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith(PROMPT) and len(first.stdout) > len(PROMPT) + 10
    assert second.stdout == first.stdout


def test_the_gpu_computes_what_the_cpu_computes(trained: Path) -> None:
    from bigtx.api import load

    on_gpu, on_cpu = load(trained, device="cuda"), load(trained, device="cpu")
    ids = on_cpu.tokenizer.encode(PROMPT * 20)
    expected, computed = on_cpu.logits(ids), on_gpu.logits(ids)
    # fp32 against bf16.
    assert (computed - expected).norm() < 0.03 * expected.norm()
    assert (computed.argmax(-1) == expected.argmax(-1)).float().mean() > 0.9


def test_plain_python_finds_the_gpu(corpus: Path, tmp_path: Path) -> None:
    done = pretrain(
        *TINY,
        *BF16,
        f"data.sources.a.path={corpus}",
        f"run_dir={tmp_path / 'run'}",
        "train.max_steps=9",
        "--dry-run",
        gpus=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "dry run: one step, loss" in done.stdout


@pytest.mark.parametrize("compiled", [False, True])
def test_started_again_it_repeats_the_losses_bit_for_bit(corpus: Path, tmp_path: Path, compiled: bool) -> None:
    straight, again = tmp_path / "straight", tmp_path / "again"
    settings = [
        *TINY,
        *BF16,
        f"data.sources.a.path={corpus}",
        "train.max_steps=40",
        "train.checkpoint_every=20 steps",
        "model.dropout=0.1",
        "optimizer.name=muon",
        "engine.deterministic=true",
        f"engine.compile={str(compiled).lower()}",
    ]
    done = pretrain(*settings, f"run_dir={straight}", gpus=True)
    assert done.returncode == 0, done.stdout + done.stderr
    shutil.copytree(straight, again)
    shutil.rmtree(again / "checkpoints" / "step-00000040")
    done = pretrain(*settings, f"run_dir={again}", gpus=True)
    assert done.returncode == 0 and "resumed from" in done.stdout, done.stdout + done.stderr
    assert losses(again) == losses(straight)
