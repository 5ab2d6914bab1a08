"""Validation within a run: what is made of sums of losses, and what samples are drawn by."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bigtx.config.schema import PretrainConfig
from bigtx.model.loss import Loss
from bigtx.pretraining.validation import Alone, Validation
from bigtx.train.state import RunState
from bigtx.utils.hashing import derive_seed


class Told:
    """A tracker that keeps what it is told."""

    def __init__(self) -> None:
        self.logged: dict[str, float] = {}
        self.lines: list[str] = []
        self.rows: list[dict[str, str]] = []
        self.sampled_at: list[tuple[int, int]] = []

    def log(self, step: int, tokens: int, metrics: dict[str, float]) -> None:
        self.logged |= {"step": step, "tokens": tokens, **metrics}

    def message(self, text: str) -> None:
        self.lines.append(text)

    def samples(self, step: int, tokens: int, rows: list[dict[str, str]]) -> None:
        self.rows += rows
        self.sampled_at.append((step, tokens))


def validation(sums: dict[str, tuple[float, int]], *, has_bytes: bool = True) -> Validation:
    """Sources whose losses are known, of 4 bytes a token each."""
    made = object.__new__(Validation)
    made.config = PretrainConfig(run_dir="unused", seed=5)
    made.config.validation.sample_prompts = []
    made.sources = {name: SimpleNamespace(name=name, manifest=SimpleNamespace(bytes_per_token=4.0)) for name in sums}  # type: ignore[misc]
    made.engine = SimpleNamespace(evaluate=lambda batches, task: sums[batches.name], module=nn.Dropout())  # type: ignore[assignment]
    made.ranks, made.tokenizer, made.task = SimpleNamespace(from_first="agree"), "tokenizer", "task"  # type: ignore[assignment]
    made.objective = SimpleNamespace(bits_per_byte=has_bytes)  # type: ignore[assignment]
    return made


def test_each_source_has_a_loss_per_label_a_perplexity_and_bits_per_byte() -> None:
    told = Told()
    sums = {"books": (8 * math.log(16), 8), "code": (30.0, 10)}
    assert not validation(sums).report(told, RunState(step=7, tokens=70))  # type: ignore[arg-type]
    assert told.logged == pytest.approx(
        {
            "step": 7,
            "tokens": 70,
            "validation/books/loss": math.log(16),
            "validation/books/perplexity": 16.0,
            "validation/books/bits_per_byte": 1.0,  # 4 bits a token of 4 bytes.
            "validation/code/loss": 3.0,
            "validation/code/perplexity": math.e**3,
            "validation/code/bits_per_byte": 3.0 / math.log(2) / 4,
        }
    )
    assert told.lines == [
        "validation at step 7: books loss 2.7726 (1.000 bits per byte), code loss 3.0000 (1.082 bits per byte)"
    ]


def test_where_labels_are_a_part_of_the_tokens_there_are_no_bits_per_byte() -> None:
    metrics = validation({"a": (2000.0, 1), "b": (0.0, 0)}, has_bytes=False).measure()
    assert set(metrics) == {f"validation/{name}/{what}" for name in "ab" for what in ("loss", "perplexity")}
    # Not an overflow, where a model has diverged; and no division by zero.
    assert metrics["validation/a/perplexity"] == pytest.approx(math.exp(700)) and metrics["validation/b/loss"] == 0.0


def test_samples_of_each_step_and_run_are_drawn_by_seeds_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []

    def write(model: nn.Module, tokenizer: Any, prompts: Sequence[str], **fields: Any) -> list[Any]:
        assert not model.training
        calls.append({"tokenizer": tokenizer, "prompts": prompts, **fields})
        return [SimpleNamespace(text=f"{prompt}!") for prompt in prompts[2]]

    monkeypatch.setattr("bigtx.model.write.write", write)
    monkeypatch.setattr("bigtx.model.write.plain_prompts", lambda config, tokenizer, texts: (config, tokenizer, texts))
    told, made = Told(), validation({})
    settings = made.config.validation
    settings.sample_prompts, settings.sample_tokens, settings.sample_temperature = ["a", "b"], 17, 0.25
    for seed, step in ((5, 1), (5, 1), (5, 2), (6, 1)):
        made.config.seed = seed
        made.engine.module.train()
        made.report(told, RunState(step=step, tokens=100 * step))  # type: ignore[arg-type]
    assert told.sampled_at == [(1, 100), (1, 100), (2, 200), (1, 100)]
    assert told.rows[:2] == [{"prompt": "a", "completion": "a!"}, {"prompt": "b", "completion": "b!"}]
    assert not told.logged and not told.lines
    first, again, later, other = (call["sampling"].seed for call in calls)
    assert first == again and len({first, later, other}) == 3
    assert first == derive_seed("sample", 5, 1), "a later release draws the same"
    assert calls[0]["max_new_tokens"] == 17 and calls[0]["sampling"].temperature == 0.25
    assert calls[0]["agree"] == "agree" and calls[0]["prompts"] == (made.config.model, "tokenizer", ["a", "b"])


@dataclass
class Numbers:
    """A batch whose losses are its numbers."""

    values: Tensor

    @property
    def num_labels(self) -> int:
        return len(self.values)

    def to(self, device: torch.device) -> Numbers:
        return self


class Identity:
    """A task whose loss differs from what it reports."""

    def loss(self, model: Any, batch: Numbers) -> Loss:
        losses = model(batch.values)
        return Loss(losses.sum() * 100, losses.sum())


def test_a_model_alone_sums_what_is_reported_without_dropout() -> None:
    model = nn.Sequential(nn.Linear(1, 1), nn.Dropout(0.9))
    with torch.no_grad():
        model[0].weight.fill_(2.0)
        model[0].bias.fill_(1.0)
    alone = Alone(model)  # type: ignore[arg-type]
    batches = [Numbers(torch.tensor([[1.0], [2.0]])), Numbers(torch.tensor([[3.0]]))]
    assert alone.evaluate(batches, Identity()) == (3.0 + 5.0 + 7.0, 3)
    assert alone.from_first("own") == "own" and (alone.rank, alone.world_size) == (0, 1)
