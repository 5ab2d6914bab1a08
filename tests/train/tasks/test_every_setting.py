"""Every setting of a task changes what the task makes of the same records: batches, losses, predictions, metrics."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from sounds import RATE, sayings, write_tokenizer

from bigtx.config.schema import AudioConfig, FieldsConfig, FinetuneConfig, ModelConfig, TokenizerTrainConfig
from bigtx.config.settings import leaves
from bigtx.data.recordings import AudioPlace
from bigtx.data.records.record import BadRecordError, Record
from bigtx.finetuning.tasks import task_type
from bigtx.model.transformer import Transformer
from bigtx.tokenizer.tokenizer import Tokenizer
from bigtx.tokenizer.train import train
from bigtx.utils.errors import DataError

TEXTS = ["red apple tree and green apple tree, the house of stone, who are you, I am the river. " * 3] * 20
MODEL = ModelConfig(
    vocab_size=420, hidden_size=32, num_layers=1, num_heads=2, max_sequence_length=128, init_std=0.3, init="normal"
)
SHAPES = {"classify": "encoder", "translate": "encoder_decoder", "transcribe": "encoder_decoder"}
PLAIN = {"chat.format": "plain"}
SHORT = {"chat.max_new_tokens": 8}
PACKED = SHORT | {"sft.packing": True}
CASES: list[tuple[str, str, Any, dict[str, Any]]] = [
    ("classify", "classify.classes", ["river", "house"], {}),
    ("classify", "classify.pooling", "first", {}),
    ("classify", "classify.truncate", "start", {"data.max_length": 8}),
    ("classify", "classify.balance", True, {}),
    ("classify", "classify.label_smoothing", 0.2, {}),
    ("classify", "data.max_length", 8, {}),
    ("preference", "chat.format", "plain", {}),
    ("preference", "chat.separator", " house ", PLAIN),
    ("sft", "chat.max_new_tokens", 2, {}),
    ("sft", "chat.temperature", 5.0, SHORT),
    ("sft", "sft.answers", "last", SHORT),
    ("sft", "sft.packing", True, SHORT),
    ("sft", "sft.row_length", 50, PACKED),
    ("preference", "preference.beta", 0.5, {}),
    ("preference", "preference.label_smoothing", 0.2, {}),
    ("transcribe", "transcribe.method", "ctc", {}),
    ("transcribe", "transcribe.normalize", "words", {}),
    ("transcribe", "transcribe.max_seconds", 0.1, {}),
    ("transcribe", "transcribe.num_frequency_masks", 0, {}),
    ("transcribe", "transcribe.max_frequency_mask", 0.9, {}),
    ("transcribe", "transcribe.num_time_masks", 0, {}),
    ("transcribe", "transcribe.max_time_mask", 0.9, {}),
    ("transcribe", "transcribe.speed_change", 0.2, {}),
    ("transcribe", "transcribe.noise_db", 3.0, {}),
    ("transcribe", "transcribe.label_smoothing", 0.2, {}),
    ("transcribe", "transcribe.num_beams", 3, {}),
    ("transcribe", "transcribe.length_penalty", 5.0, {"transcribe.num_beams": 3}),
    ("transcribe", "transcribe.cache_size", 10, {}),
    ("translate", "translate.prefix", "the river: ", {}),
    ("translate", "translate.label_smoothing", 0.4, {}),
    ("translate", "translate.num_beams", 1, {}),
    ("translate", "translate.length_penalty", 9.0, {}),
    ("translate", "translate.max_ratio", 0.5, {}),
    ("translate", "translate.max_added", 1, {}),
]
"""A task, a value of a setting other than its default, and what else has to be set for it to matter."""
ELSEWHERE = {"preference.max_equal"}
"""Decides whether a run starts: see test_review.py."""
CHAT = [
    {"role": "user", "content": "who are you"},
    {"role": "assistant", "content": "I am the river"},
    {"role": "user", "content": "the house"},
    {"role": "assistant", "content": "stone"},
]


def record(task: str, number: int) -> Record:
    if task == "transcribe":
        content, said = sayings(3)[number]
        place = AudioPlace(f"{number}.wav", "nowhere", 0, len(content), content)
        return Record({"audio": place, "text": f"{said.upper()}!"}, place.name, 0)
    text = "the house of stone and the red apple tree " * (1 + number)
    fields = {
        "classify": {"text": text, "label": "river" if number else "house"},
        "sft": {"messages": CHAT[: 4 if number else 2]},
        "preference": {"prompt": text, "chosen": "red apple", "rejected": "the green tree"},
        "translate": {"source": text, "target": "the river " * (2 - number) + "house"},
        "distill": {"text": text},
    }[task]
    return Record(fields, "records.jsonl", number)


def config_of(task: str, settings: dict[str, Any], vocab_size: int) -> FinetuneConfig:
    shape = "encoder" if settings.get("transcribe.method") == "ctc" else SHAPES.get(task, "decoder")
    audio = AudioConfig(num_mel_bins=16, sample_rate=RATE, strides=[2]) if task == "transcribe" else AudioConfig()
    model = dataclasses.replace(MODEL, shape=shape, vocab_size=vocab_size, audio=audio)  # type: ignore[arg-type]
    config = FinetuneConfig(task=task, model=model)  # type: ignore[arg-type]
    for key, value in settings.items():
        name, _, inner = key.partition(".")
        changed = dataclasses.replace(getattr(config, name), **{inner: value})
        config = dataclasses.replace(config, **{name: changed})
    return config


def behaviour(task_name: str, settings: dict[str, Any], tokenizer: Tokenizer) -> dict[str, Any]:
    """All that a task makes of three records."""
    kind, records = task_type(task_name), [record(task_name, number) for number in range(3)]
    task: Any = kind(kind.resolve(config_of(task_name, settings, tokenizer.vocab_size), tokenizer, records), tokenizer)
    examples = [task.encode(each) for each in records]
    if task.needs_reference:
        examples = [task.with_reference(each, (-9.0, -8.0)) for each in examples]
    task.begin(examples)
    rows = task.pack(examples)
    model = Transformer(task.config.model).eval()
    model.init_weights(1)
    loss = task.loss(model, task.collate(rows, list(range(len(rows)))))
    predictions = task.predict(model, examples, torch.device("cpu"))
    kept = getattr(getattr(task, "speech", None), "cache", None)
    return {
        "rows": len(rows),
        "lengths": [(each.length, each.num_cut) for each in examples],
        "loss": (loss.loss_sum.item(), loss.reported_sum.item()),
        "predictions": predictions,
        "metrics": task.metrics(predictions),
        "answers": [task.answer(each) for each in records],
        "kept in memory": None if kept is None else len(kept.held),
    }


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    of_texts = train(TokenizerTrainConfig(vocab_size=420), TEXTS)
    of_sounds = Tokenizer.load(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))
    return {task: of_sounds if task == "transcribe" else of_texts for task in (*SHAPES, "sft", "preference", "distill")}


@pytest.mark.parametrize(("task", "key", "value", "context"), CASES, ids=[case[1] for case in CASES])
def test_it_changes_what_the_task_makes(
    tokenizers: dict[str, Tokenizer], task: str, key: str, value: Any, context: dict[str, Any]
) -> None:
    tokenizer = tokenizers[task]
    before = behaviour(task, context, tokenizer)
    assert before == behaviour(task, context, tokenizer), "nothing is drawn anew"
    assert before != behaviour(task, context | {key: value}, tokenizer)


def test_every_setting_is_tried() -> None:
    tasks = ("classify", "chat", "sft", "preference", "transcribe", "translate")
    settings = {setting.key for setting in leaves(FinetuneConfig) if setting.key.split(".")[0] in tasks}
    assert settings == {key for _, key, *_ in CASES if not key.startswith("data.")} | ELSEWHERE


FIELDS = {
    "text": "distill",
    "pair": "classify",
    "label": "classify",
    "messages": "sft",
    "prompt": "preference",
    "response": "sft",
    "chosen": "preference",
    "rejected": "preference",
    "source": "translate",
    "target": "translate",
    "audio": "transcribe",
}
"""A task that reads each of data.fields."""


@pytest.mark.parametrize("name", FIELDS)
def test_a_field_under_another_name(tokenizers: dict[str, Tokenizer], name: str) -> None:
    task_name = FIELDS[name]
    tokenizer, given = tokenizers[task_name], record(task_name, 0)
    fields: dict[str, Any] = dict(given.fields)
    if name == "response":
        fields = {"prompt": "who are you", "response": "the river"}
    if name == "pair":
        fields["pair"] = "the red apple"
    renamed = Record({"body" if key == name else key: value for key, value in fields.items()}, given.file, given.line)
    kind = task_type(task_name)

    def encode(record: Record, **names: str) -> Any:
        settings = {"data.fields": FieldsConfig(**names), "classify.classes": ["river", "house"]}
        config = config_of(task_name, settings, tokenizer.vocab_size)
        return kind(kind.resolve(config, tokenizer, [record]), tokenizer).encode(record)

    if name == "pair":
        assert encode(renamed, pair="body").length > encode(renamed).length
        return
    usual, other = encode(Record(fields, given.file, given.line)), encode(renamed, **{name: "body"})
    assert usual.length == other.length
    with pytest.raises((BadRecordError, DataError)):
        encode(renamed)


def test_every_field_is_tried() -> None:
    assert list(FIELDS) == [setting.key for setting in leaves(FieldsConfig)]
