"""Objectives through the door of pretraining: they learn, and resume to the last bit."""

from __future__ import annotations

import math
import random
from pathlib import Path

import pytest
from doors import (
    TINY,
    bigtx,
    has_saved,
    kill_run,
    losses,
    pretrain,
    read_lines,
    same_weights,
    start_pretrain,
    wait_for,
)

MODELS = {
    "masked": [
        "objective.name=masked",
        "model.shape=encoder",
        "model.norm=layer",
        "model.embedding_norm=true",
        "model.head_transform=true",
        "model.head_bias=true",
        "model.tie_embeddings=true",
    ],
    "span_corruption": [
        "objective.name=span_corruption",
        "model.shape=encoder_decoder",
        "model.positions=relative",
        "model.attention_scale=1",
        "model.tie_embeddings=true",
        "model.logit_scale=0.125",
    ],
    "fill_in_middle": ["objective.name=fill_in_middle"],
    "prefix of a decoder": ["objective.name=prefix", "model.prefix_attention=true"],
    "prefix of an encoder-decoder": ["objective.name=prefix", "model.shape=encoder_decoder"],
}


def run_of(corpus: Path, run_dir: Path, kind: str, *changes: str) -> list[str]:
    return [
        *TINY,
        *MODELS[kind],
        f"data.sources.a.path={corpus}",
        f"run_dir={run_dir}",
        "train.max_steps=40",
        "train.checkpoint_every=7 steps",
        "optimizer.learning_rate=3e-3",
        "track.wandb=off",
        *changes,
    ]


def fell(run_dir: Path) -> bool:
    """Whether the loss went below its start, which is that of a guess; a tiny model learns spans slowly."""
    found = losses(run_dir)
    return sum(found[step] for step in range(36, 41)) / 5 < 0.93 * found[1]


@pytest.mark.dist
@pytest.mark.parametrize("kind", ["masked", pytest.param("span_corruption", marks=pytest.mark.slow)])
def test_two_ranks_learn_and_a_killed_run_loses_nothing(corpus: Path, tmp_path: Path, kind: str) -> None:
    straight, run_dir, stop_at = tmp_path / "straight", tmp_path / "run", random.randrange(8, 16)
    done = pretrain(*run_of(corpus, straight, kind), ranks=2)
    assert done.returncode == 0, done.stdout + done.stderr
    assert fell(straight)
    process = start_pretrain(*run_of(corpus, run_dir, kind), ranks=2)
    wait_for(lambda: has_saved(run_dir, stop_at), process)
    kill_run(process, run_dir)
    done = pretrain(*run_of(corpus, run_dir, kind), ranks=2)
    assert done.returncode == 0, done.stdout + done.stderr
    assert losses(run_dir) == losses(straight), f"killed at step {stop_at}"
    same_weights(run_dir, straight)


@pytest.mark.slow
@pytest.mark.parametrize("document_mask", ["false", "true"])
@pytest.mark.parametrize("kind", MODELS)
def test_every_objective_learns(corpus: Path, tmp_path: Path, kind: str, document_mask: str) -> None:
    run_dir = tmp_path / "run"
    prompts = [] if kind == "masked" else ["validation.sample_prompts=['def ']"]
    done = pretrain(*run_of(corpus, run_dir, kind, f"data.document_mask={document_mask}", *prompts))
    assert done.returncode == 0, done.stdout + done.stderr
    assert fell(run_dir)
    last = [line for line in read_lines(run_dir / "metrics.jsonl") if "validation/a/loss" in line][-1]
    assert math.isfinite(last["validation/a/loss"])
    assert ("validation/a/bits_per_byte" in last) is False
    generated = bigtx("generate", str(run_dir), "--prompt", "def ", "--max-new-tokens", "8", "--temperature", "0")
    if kind == "masked":
        assert generated.returncode == 2 and "an encoder cannot write texts" in generated.stderr
    else:
        assert generated.returncode == 0, generated.stderr


def test_what_does_not_fit_is_said_before_anything_starts(corpus: Path, tmp_path: Path) -> None:
    source, run_dir = f"data.sources.a.path={corpus}", f"run_dir={tmp_path / 'run'}"
    steps = "train.max_steps=2"
    for changes, expected in (
        (["objective.name=masked"], "is not possible for model.shape=decoder; write causal or fill_in_middle"),
        (["model.shape=encoder"], "is not possible for model.shape=encoder; write masked"),
        (["model.prefix_attention=true"], "write prefix"),
        ([*MODELS["masked"], "validation.sample_prompts=[a]"], "an encoder (model.shape) generates no text"),
        (["model.num_decoder_layers=2"], "has no effect without model.shape=encoder_decoder"),
    ):
        done = pretrain(source, run_dir, steps, *changes)
        assert done.returncode == 2 and expected in done.stderr and "Traceback" not in done.stderr, done.stderr
    many = ["model.shape=encoder_decoder", "objective.name=span_corruption", "objective.noise_density=0.5"]
    done = pretrain(*TINY, source, run_dir, steps, *many, "train.sequence_length=1000", "objective.mean_span_length=1")
    assert done.returncode == 2 and "raise objective.mean_span_length" in done.stderr, done.stderr
