"""What `classify` makes of texts, with values by hand."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from bigtx.config.schema import (
    ClassifyConfig,
    FieldsConfig,
    FinetuneConfig,
    ModelConfig,
    RecordsConfig,
    TokenizerTrainConfig,
)
from bigtx.data.records.record import BadRecordError, Record
from bigtx.finetuning.tasks.classify import Classify
from bigtx.finetuning.tasks.task import Examples
from bigtx.model.loss import IGNORED
from bigtx.model.transformer import Transformer
from bigtx.tokenizer.tokenizer import Tokenizer
from bigtx.tokenizer.train import train
from bigtx.utils.errors import ConfigError, DataError

TEXTS = ["red apple tree and green apple tree, the house of stone, who are you, I am the river. " * 3] * 20
SHORT, LONG = "the river", "red apple tree and green apple tree, the house of stone, who are you, I am the river"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train(TokenizerTrainConfig(vocab_size=420), TEXTS)


def config_of(
    classes: Sequence[str] = "ab",
    *,
    shape: Any = "encoder",
    model: dict[str, Any] | None = None,
    data: dict[str, Any] | None = None,
    **settings: Any,
) -> FinetuneConfig:
    size = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "max_sequence_length": 64, "init_std": 0.2}
    return FinetuneConfig(
        task="classify",
        model=ModelConfig(shape=shape, vocab_size=420, **(size | (model or {}))),
        data=RecordsConfig(**(data or {})),
        classify=ClassifyConfig(classes=list(classes), **settings),
    )


def make(tokenizer: Tokenizer, classes: Sequence[str] = "ab", **changes: Any) -> Classify:
    return Classify(Classify.resolve(config_of(classes, **changes), tokenizer, []), tokenizer)


def text(value: str, label: str | None = "a") -> Record:
    return Record({"text": value} | ({} if label is None else {"label": label}), "texts.jsonl", 1)


def with_logits(rows: list[list[float]]) -> Callable[..., torch.Tensor]:
    """A model of which only its logits matter."""
    return lambda **_: torch.tensor(rows, requires_grad=True)


def weights_of(tokenizer: Tokenizer, labels: str, classes: str = "ab", **settings: Any) -> list[float]:
    task = make(tokenizer, classes, **settings)
    task.begin([task.encode(text(SHORT, label)) for label in labels])
    batch = task.collate([task.encode(text(SHORT, label)) for label in classes])
    return batch.weights.tolist()


def test_balance_lets_each_class_weigh_the_same(tokenizer: Tokenizer) -> None:
    """The sum of weights is the number of records, and each class has the same share of it."""
    assert weights_of(tokenizer, "aaab", balance=True) == pytest.approx([4 / (2 * 3), 4 / (2 * 1)])
    assert weights_of(tokenizer, "baaaaa", balance=True) == pytest.approx([6 / (2 * 5), 6 / (2 * 1)])
    # A class without a record takes nothing from the others.
    assert weights_of(tokenizer, "aaac", "abc", balance=True) == pytest.approx([2 / 3, 1.0, 2.0])
    assert weights_of(tokenizer, "aaab") == [1.0, 1.0]


def test_the_loss_is_smoothed_and_weighted_and_the_reported_one_is_neither(tokenizer: Tokenizer) -> None:
    # Logits of which the probabilities are 3/4 and 1/4, and 1/5 and 4/5.
    model = with_logits([[math.log(3), 0.0], [0.0, math.log(4)], [9.0, 0.0]])
    task = make(tokenizer, label_smoothing=0.2, balance=True)
    examples = [task.encode(text(SHORT, "a")), task.encode(text(SHORT, "a"))]
    task.begin([*examples, task.encode(text(SHORT, "a")), task.encode(text(SHORT, "b"))])
    batch = task.collate([*examples, task.encode(text(SHORT, None), for_training=False)])
    loss = task.loss(model, batch)
    # The target is 0.9 for its class and 0.1 for the other; the weight of class a is 2/3; the third has no label.
    first = 0.9 * -math.log(3 / 4) + 0.1 * -math.log(1 / 4)
    second = 0.9 * -math.log(1 / 5) + 0.1 * -math.log(4 / 5)
    assert loss.loss_sum.item() == pytest.approx(2 / 3 * (first + second))
    assert loss.reported_sum.item() == pytest.approx(-math.log(3 / 4) - math.log(1 / 5))
    assert loss.loss_sum.requires_grad and not loss.reported_sum.requires_grad
    assert batch.num_labels == 2
    of_both = task.collate([task.encode(text(SHORT, "a")), task.encode(text(SHORT, "b"))])
    loss = task.loss(with_logits([[math.log(3), 0.0], [0.0, math.log(4)]]), of_both)
    second = 0.9 * -math.log(4 / 5) + 0.1 * -math.log(1 / 5)
    assert loss.loss_sum.item() == pytest.approx(2 / 3 * first + 2 * second)


@pytest.mark.parametrize("pooling", ["first", "mean", "last"])
def test_texts_side_by_side(tokenizer: Tokenizer, pooling: Any) -> None:
    task = make(tokenizer, pooling=pooling)
    short, long = task.encode(text(SHORT, "b")), task.encode(text(LONG, "a"))
    end, lengths = tokenizer.end_id, [len(short.ids), len(long.ids)]
    assert short.ids.tolist() == [end, *tokenizer.encode(SHORT), end] and lengths[0] < lengths[1] - 3
    assert (short.length, short.num_cut, short.label, long.label) == (lengths[0], 0, 1, 0)
    batch = task.collate([short, long], [7, 8])
    assert batch.tokens.shape[1] == -(-lengths[1] // 16) * 16, "few shapes"
    for row, example in enumerate((short, long)):
        length, rest = lengths[row], batch.tokens.shape[1] - lengths[row]
        assert batch.tokens[row].tolist() == example.ids.tolist() + [tokenizer.pad_id] * rest
        assert batch.segment_ids[row].tolist() == [0] * length + [1] * rest, "no text sees padding"
        of_text = {
            "first": [1.0] + [0.0] * (length - 1),
            "last": [0.0] * (length - 1) + [1.0],
            "mean": [1 / length] * length,
        }[pooling]
        assert batch.pool[row].tolist() == pytest.approx(of_text + [0.0] * rest)
    assert batch.labels.tolist() == [1, 0] and batch.num_tokens == sum(lengths)
    assert batch.sequence_ids is not None and batch.sequence_ids.tolist() == [7, 8]
    assert batch.token_types is None and task.collate([short]).sequence_ids is None


@torch.no_grad()
@pytest.mark.parametrize(
    ("shape", "pooling"), [("encoder", "first"), ("encoder", "mean"), ("encoder", "last"), ("decoder", "last")]
)
def test_a_text_is_judged_the_same_beside_a_longer_one(tokenizer: Tokenizer, shape: Any, pooling: Any) -> None:
    task = make(tokenizer, shape=shape, pooling=pooling)
    model = Transformer(task.config.model).eval()
    model.init_weights(1)
    examples = [task.encode(text(value)) for value in (SHORT, LONG * 3, "who are you")]
    together = task.predict(model, examples, CPU)
    for example, found in zip(examples, together, strict=True):
        (alone,) = task.predict(model, [example], CPU)
        assert found["probabilities"] == pytest.approx(alone["probabilities"], rel=1e-5)
    # Neither is it the same for all texts, and the first token of a text is seen.
    other = task.predict(model, [task.encode(text("who" + SHORT.removeprefix("the")))], CPU)[0]["probabilities"]
    assert abs(other["a"] - together[0]["probabilities"]["a"]) > 1e-3


def test_a_text_that_is_too_long_is_cut_where_the_config_says(tokenizer: Tokenizer) -> None:
    ids, end = tokenizer.encode(LONG), tokenizer.end_id
    assert len(ids) > 12
    for truncate, kept in (("end", ids[:7]), ("start", ids[-7:]), ("middle", ids[:3] + ids[-4:])):
        task = make(tokenizer, data={"max_length": 9}, truncate=truncate)
        example = task.encode(text(LONG))
        assert example.ids.tolist() == [end, *kept, end] and example.num_cut == len(ids) - 7
    exact = make(tokenizer, data={"max_length": len(ids) + 2, "too_long": "refuse"})
    assert exact.encode(text(LONG)).ids.tolist() == [end, *ids, end] and exact.encode(text(LONG)).num_cut == 0
    with pytest.raises(BadRecordError, match=f"{len(ids)} tokens, and {len(ids) - 1} are allowed"):
        make(tokenizer, data={"max_length": len(ids) + 1, "too_long": "refuse"}).encode(text(LONG))
    with pytest.raises(ConfigError, match=r"the smallest value of use is data\.max_length=3"):
        make(tokenizer, data={"max_length": 2}).encode(text(SHORT))
    assert len(make(tokenizer, data={"max_length": 3}).encode(text(SHORT)).ids) == 3


def test_of_two_texts_the_longer_one_gives_way(tokenizer: Tokenizer) -> None:
    end, long, short = tokenizer.end_id, tokenizer.encode(LONG), tokenizer.encode(SHORT)
    assert len(short) < 5
    room = 11
    task = make(tokenizer, data={"max_length": room + 3, "fields": FieldsConfig(pair="other")})

    def encode(first: str, second: str) -> tuple[list[int], list[int], int]:
        example = task.encode(Record({"text": first, "other": second, "label": "a"}, "a"))
        return example.ids.tolist(), example.types.tolist(), example.num_cut

    left = room - len(short)
    assert encode(SHORT, LONG)[0] == [end, *short, end, *long[:left], end]
    assert encode(LONG, SHORT)[0] == [end, *long[:left], end, *short, end]
    ids, types, num_cut = encode(LONG, LONG)
    assert ids == [end, *long[:6], end, *long[:5], end] and num_cut == 2 * len(long) - room
    assert types == [0] * 8 + [1] * 6
    assert encode(SHORT, SHORT) == ([end, *short, end, *short, end], [0] * (2 + len(short)) + [1] * (1 + len(short)), 0)
    typed = make(tokenizer, model={"num_token_types": 2}, data={"fields": FieldsConfig(pair="other")})
    batch = typed.collate([typed.encode(Record({"text": SHORT, "other": SHORT, "label": "a"}, "a"))])
    assert batch.token_types is not None
    types = [0] * (2 + len(short)) + [1] * (1 + len(short))
    assert batch.token_types[0].tolist() == types + [0] * (batch.tokens.shape[1] - len(types))
    assert task.text_field is None and make(tokenizer).text_field == "text"


def test_the_likeliest_class_and_the_probability_of_each(tokenizer: Tokenizer) -> None:
    task = make(tokenizer, "abc")
    examples = [task.encode(text(SHORT, "c")), task.encode(text(SHORT, None), for_training=False)]
    model = with_logits([[0.0, math.log(2), 0.0], [math.log(7), 0.0, math.log(2)]])
    first, second = task.predict(model, examples, CPU)
    assert first["label"] == "b" and first["_label"] == 2
    assert first["probabilities"] == pytest.approx({"a": 0.25, "b": 0.5, "c": 0.25})
    assert second["label"] == "a" and "_label" not in second
    assert second["probabilities"] == pytest.approx({"a": 0.7, "b": 0.1, "c": 0.2})


def test_metrics_by_hand(tokenizer: Tokenizer) -> None:
    task = make(tokenizer, "abc")
    rows = [
        (0, (0.75, 0.15, 0.1)),
        (0, (0.62, 0.28, 0.1)),
        (0, (0.11, 0.69, 0.2)),
        (1, (0.1, 0.8, 0.1)),
        (2, (0.1, 0.1, 0.8)),
    ]
    predictions = [
        {"_label": label, "probabilities": dict(zip("abc", probabilities, strict=True))}
        for label, probabilities in rows
    ]
    # One a was taken for b. Of fifteen bins, one has both of 0.8, and 0.62, 0.69 and 0.75 have one each.
    assert task.metrics(predictions) == pytest.approx(
        {
            "accuracy": 4 / 5,
            "largest_class": 3 / 5,
            "macro_f1": (2 * 2 / (2 * 2 + 1) + 2 * 1 / (2 * 1 + 1) + 1) / 3,
            "loss": -sum(map(math.log, (0.75, 0.62, 0.11, 0.8, 0.8))) / 5,
            "calibration_error": (0.25 + 0.38 + 0.69 + (0.2 + 0.2)) / 5,
        }
    )
    assert task.tables(predictions)["confusion"] == [
        {"class": "a", "as a": 2, "as b": 1, "as c": 0},
        {"class": "b", "as a": 0, "as b": 1, "as c": 0},
        {"class": "c", "as a": 0, "as b": 0, "as c": 1},
    ]
    impossible = [{"_label": 0, "probabilities": {"a": 0.0, "b": 1.0, "c": 0.0}}]
    assert 700 < task.metrics(impossible)["loss"] < 710, "no infinity: the smallest number has a logarithm of -708"


@pytest.mark.parametrize(
    ("changes", "pooling", "head"),
    [
        ({"shape": "decoder"}, "last", "score"),
        ({"shape": "encoder"}, "mean", "transform"),
        ({"shape": "encoder", "model": {"norm_placement": "post"}}, "first", "pooler"),
        ({"shape": "encoder", "model": {"num_classes": 3, "class_head": "pooler"}}, "first", "pooler"),
        ({"shape": "encoder", "model": {"num_classes": 3, "class_head": None}}, "mean", None),
        ({"shape": "encoder", "pooling": "last"}, "last", "transform"),
        ({"shape": "decoder", "pooling": "mean"}, "mean", "score"),
    ],
)
def test_the_head_and_what_it_reads(tokenizer: Tokenizer, changes: dict[str, Any], pooling: str, head: str) -> None:
    config = make(tokenizer, "abcd", **changes).config
    assert (config.classify.pooling, config.model.class_head, config.model.num_classes) == (pooling, head, 4)


def test_classes_are_those_of_the_training_records_sorted(tokenizer: Tokenizer) -> None:
    records = [text(SHORT, label) for label in ("good", " bad ", "good")] + [Record({"text": SHORT, "label": 7}, "a")]
    config = Classify.resolve(config_of(""), tokenizer, records)
    assert config.classify.classes == ["7", "bad", "good"] and config.model.num_classes == 3
    task = Classify(config, tokenizer)
    assert [task.encode(record).label for record in records] == [2, 1, 2, 0]
    assert task.answer(records[1]) == "bad" and task.answer(text(SHORT, None)) == ""
    assert Classify.group_of(records[1], config) == "bad"
    assert Classify.resolve(config_of("ba"), tokenizer, records).classify.classes == ["b", "a"]
    with pytest.raises(DataError, match="have one class, 'good'"):
        Classify.resolve(config_of(""), tokenizer, records[:1])


@pytest.mark.parametrize(
    ("label", "said"),
    [
        (None, "the field 'label' is null"),
        ("  ", "'label' of the class is empty"),
        (True, r"is true \(bool\)"),
        (1.5, r"is 1\.5 \(float\)"),
        ("goood", "the class 'goood' is unknown .* did you mean 'good'"),
        ("x", "the class 'x' is unknown .* there are 'bad', 'good'"),
    ],
)
def test_a_class_that_is_none(tokenizer: Tokenizer, label: Any, said: str) -> None:
    task = make(tokenizer, ["bad", "good"])
    record = Record({"text": SHORT, "label": label}, "a")
    with pytest.raises(BadRecordError, match=said):
        task.encode(record)
    example = task.encode(record, for_training=False)
    assert example.label == -1 and task.collate([example]).labels.tolist() == [IGNORED]
    assert task.collate([example]).weights.tolist() == [0.0]


def test_what_is_said_of_the_classes(tokenizer: Tokenizer) -> None:
    task = make(tokenizer, "abc")

    def split(labels: str) -> Examples:
        records = [text(SHORT, label) for label in labels]
        return Examples(records, [task.encode(record) for record in records])

    assert task.review({"train": split("aaab"), "validation": split("ac"), "test": split("")}) == [
        "3 classes, records of each (train + validation): 'a' 3 + 1, 'b' 1 + 0, 'c' 0 + 1",
        "warning: classes without a train record: 'c', which the model cannot learn",
        "warning: classes without a validation record: 'b'",
    ]


def test_lengths_of_an_example(tokenizer: Tokenizer) -> None:
    """Columns of the one stack; the head reads no column of its own."""
    for shape, expected in (("encoder", (5.0, 0)), ("decoder", (0, 5.0))):
        task = make(tokenizer, shape=shape)
        example = task.encode(text(SHORT))
        examples = [dataclasses.replace(example, ids=np.zeros(size, np.int32)) for size in (4, 6)]
        assert task.lengths(examples)[:3] == (*expected, 0)
        assert task.mean_tokens(examples) == 5.0
