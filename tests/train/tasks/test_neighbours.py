"""A row's loss does not depend on the rows beside it, in training with dropout and with a mixture of experts too."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from sounds import RATE, sayings, write_tokenizer

from bigtx.config.schema import (
    AudioConfig,
    ClassifyConfig,
    ExpertsConfig,
    FinetuneConfig,
    LoraConfig,
    ModelConfig,
    SftConfig,
    TokenizerTrainConfig,
    TranscribeConfig,
)
from bigtx.data.recordings import AudioPlace
from bigtx.data.records.record import Record
from bigtx.finetuning.tasks import task_type
from bigtx.model.experts import routing_loss
from bigtx.model.transformer import Transformer
from bigtx.tokenizer.tokenizer import Tokenizer
from bigtx.tokenizer.train import train

TEXTS = ["red apple tree and green apple tree, the house of stone, who are you, I am the river. " * 3] * 20
EXPERTS = ExpertsConfig(num_experts=4, num_active=2, expert_size=16, shared_size=16)
NUMBERS = [40, 41, 42, 43, 44, 45, 46, 47]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train(TokenizerTrainConfig(vocab_size=420), TEXTS)


def text(number: int) -> str:
    """The longer, the higher the number."""
    return "who are you, the river? " * (1 + number) + "stone"[: number % 5]


def fields(task: str, number: int) -> dict[str, Any]:
    prompt, answer = text(number), text(7 - number)
    return {
        "classify": {"text": prompt, "label": f"class {number % 2}"},
        "sft": {"prompt": prompt, "response": answer},
        "preference": {"prompt": prompt, "chosen": answer, "rejected": "the tree" + answer[:9]},
        "translate": {"source": prompt, "target": answer},
        "distill": {"text": prompt},
    }[task]


CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "classify": ("classify", {"shape": "encoder"}, {"classify": ClassifyConfig(balance=True)}),
    "sft": ("sft", {"experts": EXPERTS, "lora": LoraConfig(rank=2, dropout=0.3)}, {}),
    "packed": ("sft", {"experts": EXPERTS}, {"sft": SftConfig(packing=True, row_length=200)}),
    "preference": ("preference", {"experts": EXPERTS}, {}),
    "translate": ("translate", {"shape": "encoder_decoder", "positions": "relative"}, {}),
    "translate, one stack": ("translate", {"experts": EXPERTS, "prefix_attention": True}, {}),
    "distill": ("distill", {}, {}),
}
"""Task, what the model is beside the usual, and the settings."""


def examples_of(case: str, tokenizer: Tokenizer) -> tuple[Any, list[Any]]:
    """The task, and eight examples of many lengths."""
    name, model, settings = CASES[case]
    size = ModelConfig(
        vocab_size=420, hidden_size=32, num_layers=2, num_heads=2, max_sequence_length=512, init_std=0.2, dropout=0.3
    )
    config = FinetuneConfig(task=name, model=dataclasses.replace(size, **model), **settings)  # type: ignore[arg-type]
    records = [Record(fields(name, number), "records.jsonl", number) for number in range(8)]
    kind = task_type(name)
    task: Any = kind(kind.resolve(config, tokenizer, records), tokenizer)
    examples = [task.encode(record) for record in records]
    task.begin(examples)
    return task, task.pack(examples)


def check(task: Any, examples: list[Any]) -> None:
    """Losses and gradients of all rows at once are those of a few at a time, and others for other rows."""
    model = Transformer(task.config.model).train()
    model.init_weights(1)
    for name, parameter in model.named_parameters():
        if name.endswith("adapter.b"):
            torch.nn.init.constant_(parameter, 0.1)
    shares = torch.tensor([0.4, 0.3, 0.2, 0.1])

    def sums(size: int, first: int = 0) -> list[torch.Tensor]:
        model.zero_grad()
        total = torch.zeros(())
        for start in range(0, len(examples), size):
            numbers = [first + number for number in NUMBERS[start : start + size]]
            loss = task.loss(model, task.collate(examples[start : start + size], numbers[: len(examples) - start]))
            assert (loss.routing is not None) == (task.config.model.experts.num_experts > 0)
            part = loss.loss_sum
            if loss.routing is not None:
                part = part + routing_loss(loss.routing, shares, dataclasses.replace(EXPERTS, balance_loss=1.0))
            part.backward()
            total += part.detach()
        return [total, *(parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None)]

    together = sums(len(examples))
    assert together[0].isfinite() and len(together) > 10
    torch.testing.assert_close(sums(2), together, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sums(1), together, rtol=1e-4, atol=1e-4)
    assert (sums(2, first=100)[0] - together[0]).abs() > 1e-3


@pytest.mark.parametrize("case", CASES)
def test_micro_batches_change_rounding_alone(case: str, tokenizer: Tokenizer) -> None:
    check(*examples_of(case, tokenizer))


def recordings(method: Any, tmp_path: Path) -> tuple[Any, list[Any]]:
    """The task, and eight examples, with masks of SpecAugment too."""
    tokenizer = Tokenizer.load(write_tokenizer(tmp_path))
    model = ModelConfig(
        shape="encoder" if method == "ctc" else "encoder_decoder",
        hidden_size=32,
        num_layers=1,
        num_heads=2,
        max_sequence_length=128,
        vocab_size=tokenizer.vocab_size,
        init_std=0.2,
        dropout=0.3,
        audio=AudioConfig(num_mel_bins=16, sample_rate=RATE, strides=[2]),
    )
    config = FinetuneConfig(task="transcribe", model=model, transcribe=TranscribeConfig(method=method, noise_db=20.0))
    kind = task_type("transcribe")
    task: Any = kind(kind.resolve(config, tokenizer, []), tokenizer)
    records = []
    for number, (content, said) in enumerate(sayings(8)):
        place = AudioPlace(f"{number}.wav", "nowhere", 0, len(content), content)
        records.append(Record({"audio": place, "text": said}, place.name, 0))
    examples = [task.encode(record) for record in records]
    assert len({example.length for example in examples}) > 1
    return task, examples


@pytest.mark.parametrize("method", ["ctc", "seq2seq"])
def test_micro_batches_of_recordings_change_rounding_alone(method: str, tmp_path: Path) -> None:
    check(*recordings(method, tmp_path))
