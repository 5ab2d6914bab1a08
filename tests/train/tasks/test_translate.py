"""What `translate` makes of pairs of texts, without training."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from bigtx.config.schema import FinetuneConfig, ModelConfig, RecordsConfig, TokenizerTrainConfig, TranslateConfig
from bigtx.data.records.record import BadRecordError, Record
from bigtx.finetuning.tasks.translate import PairExample, Translate, require_sacrebleu
from bigtx.model.beam import Found
from bigtx.model.loss import IGNORED
from bigtx.model.transformer import Transformer
from bigtx.tokenizer.tokenizer import Tokenizer
from bigtx.tokenizer.train import train
from bigtx.utils.errors import LaunchError

TEXTS = ["ein Haus aus Stein, a house of stone. der Fluss, the river. zwei Bäume, two trees. " * 3] * 20
PAIRS = [
    ("ein Haus aus Stein", "a house of stone"),
    ("der Fluss", "the river and the two trees of stone"),
    ("zwei Bäume, ein Haus, der Fluss", "two trees"),
]
SHAPES = ("encoder_decoder", "decoder", "prefix")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train(TokenizerTrainConfig(vocab_size=420, chat_roles=[]), TEXTS)


def make(tokenizer: Tokenizer, shape: str = "encoder_decoder", **changes: Any) -> Translate:
    model = ModelConfig(
        shape="encoder_decoder" if shape == "encoder_decoder" else "decoder",
        prefix_attention=shape == "prefix",
        vocab_size=420,
        hidden_size=32,
        num_layers=2,
        num_heads=2,
        max_sequence_length=64,
        init_std=0.2,
    )
    config = FinetuneConfig(task="translate", model=model, **changes)
    return Translate(Translate.resolve(config, tokenizer, []), tokenizer)


def pair(source: str, target: str | None = None) -> Record:
    return Record({"source": source} | ({} if target is None else {"target": target}), "pairs.tsv", 3)


def model_of(task: Translate) -> Transformer:
    model = Transformer(task.config.model)
    model.init_weights(1)
    return model.eval()


def test_sides_of_an_encoder_decoder(tokenizer: Tokenizer) -> None:
    task, end, pad = make(tokenizer), tokenizer.end_id, tokenizer.pad_id
    batch = task.collate([task.encode(pair(*texts)) for texts in PAIRS])
    assert batch.target_tokens is not None and batch.segment_ids is not None
    sources = [[*tokenizer.encode(source), end] for source, _ in PAIRS]
    targets = [[*tokenizer.encode(target), end] for _, target in PAIRS]
    assert batch.tokens.shape[1] == max(map(len, sources)), "no column is all padding"
    assert batch.labels.shape[1] == max(map(len, targets))
    for row, (source, target) in enumerate(zip(sources, targets, strict=True)):
        assert batch.tokens[row].tolist() == source + [pad] * (batch.tokens.shape[1] - len(source))
        assert batch.segment_ids[row].tolist() == [0] * len(source) + [1] * (batch.tokens.shape[1] - len(source))
        assert batch.labels[row].tolist() == target + [IGNORED] * (batch.labels.shape[1] - len(target))
        assert batch.target_tokens[row, : len(target)].tolist() == [pad, *target[:-1]]
    assert batch.num_labels == sum(map(len, targets))
    assert batch.num_tokens == sum(map(len, sources + targets))
    assert task.mean_tokens([task.encode(pair(*texts)) for texts in PAIRS]) * 3 == pytest.approx(batch.num_tokens)


@pytest.mark.parametrize("shape", ["decoder", "prefix"])
def test_only_the_target_of_a_decoder_carries_loss(tokenizer: Tokenizer, shape: str) -> None:
    task, end, separator = make(tokenizer, shape), tokenizer.end_id, tokenizer.sentinel_ids[0]
    batch = task.collate([task.encode(pair(*texts)) for texts in PAIRS])
    for row, (source, target) in enumerate(PAIRS):
        before, after = [*tokenizer.encode(source), separator], [*tokenizer.encode(target), end]
        whole = before + after
        assert batch.tokens[row, : len(whole) - 1].tolist() == whole[:-1]
        by_hand = [IGNORED] * (len(before) - 1) + after
        assert batch.labels[row].tolist() == by_hand + [IGNORED] * (batch.labels.shape[1] - len(by_hand))
        if shape == "prefix":
            assert batch.prefix_mask is not None
            assert batch.prefix_mask[row].nonzero().flatten().tolist() == list(range(len(before)))
    assert (batch.prefix_mask is None) == (shape == "decoder")


@pytest.mark.parametrize("shape", SHAPES)
def test_the_loss_is_smoothed_and_the_reported_one_is_not(tokenizer: Tokenizer, shape: str) -> None:
    task = make(tokenizer, shape, translate=TranslateConfig(label_smoothing=0.3))
    model = model_of(task)
    examples = [task.encode(pair(*texts)) for texts in PAIRS]
    batch = task.collate(examples)
    logits = model(**{name: part for name, part in batch.inputs().items() if name != "labels"}).transpose(1, 2)
    plain, smoothed = (
        F.cross_entropy(logits, batch.labels, reduction="sum", label_smoothing=smoothing) for smoothing in (0.0, 0.3)
    )
    loss = task.loss(model, batch)
    torch.testing.assert_close((loss.loss_sum, loss.reported_sum), (smoothed, plain), rtol=1e-4, atol=1e-4)
    # Padding and neighbours change nothing, and validation's loss is the plain one.
    alone = [task.loss(model, task.collate([example])).reported_sum.item() for example in examples]
    predictions = task.predict(model, examples, torch.device("cpu"))
    assert [prediction["_loss"] for prediction in predictions] == pytest.approx(alone, rel=1e-4)
    metrics = task.metrics(predictions)
    assert metrics["loss"] == pytest.approx(plain.item() / batch.num_labels, rel=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_predictions(tokenizer: Tokenizer, shape: str) -> None:
    task = make(tokenizer, shape, translate=TranslateConfig(num_beams=3, max_ratio=1.0, max_added=2))
    model, device = model_of(task), torch.device("cpu")
    examples = [task.encode(pair(source), for_training=False) for source, _ in PAIRS]
    together = task.predict(model, examples, device)
    alone = [task.predict(model, [example], device)[0] for example in examples]
    assert [found.keys() for found in together] == [{"translation", "score"}] * 3, "what is not known is not measured"
    assert [found["translation"] for found in together] == [found["translation"] for found in alone]
    for example, found in zip(examples, task._search(model, examples, device, 3), strict=True):
        assert len(found.ids) <= len(example.source) + 2
    greedy = make(tokenizer, shape, translate=TranslateConfig(num_beams=1, max_ratio=1.0, max_added=2))
    assert task.predict_in_run(model, examples, device) == greedy.predict(model, examples, device)


@pytest.mark.parametrize(("max_length", "limits"), [(12, [11, 8]), (None, [31, 8])])
def test_a_translation_is_as_long_as_a_target_at_most(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, max_length: int | None, limits: list[int]
) -> None:
    """A target has max_length tokens with its end; a short source allows a multiple of its tokens and some more."""
    task = make(
        tokenizer,
        "decoder",
        data=RecordsConfig(max_length=max_length),
        translate=TranslateConfig(max_ratio=2.0, max_added=4),
    )
    given: list[list[int]] = []

    def search(*arguments: Any, max_new_tokens: list[int], **settings: Any) -> list[Found]:
        given.append(max_new_tokens)
        return [Found([], 0.0, 0.0)] * 2

    monkeypatch.setattr("bigtx.model.beam.beam_search", search)
    examples = [PairExample(np.arange(130, 130 + length), np.zeros(0, np.int64), "", 0) for length in (20, 2)]
    task.predict(model_of(task), examples, torch.device("cpu"))
    assert given == [limits]


def test_metrics_are_those_of_sacrebleu(tokenizer: Tokenizer) -> None:
    task = make(tokenizer)
    rows = [("The river.", "the river."), ("a house of stone", "a house of stone"), ("two trees", "three trees here")]
    metrics = task.metrics(
        [{"translation": written, "_reference": right, "_loss": 2.0, "_num_labels": 4} for written, right in rows]
    )
    # By the command: sacrebleu -m bleu chrf; BLEU knows cases.
    import sacrebleu

    written, right = ([row[side] for row in rows] for side in (0, 1))
    assert metrics["bleu"] == sacrebleu.corpus_bleu(written, [right]).score
    assert metrics["chrf"] == sacrebleu.corpus_chrf(written, [right]).score
    assert metrics["loss"] == 0.5
    same = [{"translation": row[1], "_reference": row[1], "_loss": 0.0, "_num_labels": 4} for row in rows]
    assert task.metrics(same)["bleu"] == pytest.approx(100.0)


def test_a_prefix_stands_before_each_source(tokenizer: Tokenizer) -> None:
    task = make(tokenizer, translate=TranslateConfig(prefix="to English: "))
    example = task.encode(pair("der Fluss", "the river"))
    assert tokenizer.decode(example.source[:-1].tolist()) == "to English: der Fluss"


@pytest.mark.parametrize("shape", ["encoder_decoder", "decoder"])
def test_texts_that_are_too_long(tokenizer: Tokenizer, shape: str) -> None:
    long, short = "der Fluss, " * 10, "der"
    task = make(tokenizer, shape, data=RecordsConfig(max_length=8))
    ids, end = tokenizer.encode(long), tokenizer.end_id
    example = task.encode(pair(long, short))
    assert example.source[:-1].tolist() == ids[:7] and example.num_cut == len(ids) - 7
    example = task.encode(pair(short, long))
    assert example.target.tolist() == ids[:8], "what was cut does not end there"
    assert example.num_cut == len(ids) + 1 - 8
    assert task.encode(pair(short, short)).num_cut == 0
    assert task.encode(pair(short, short)).target[-1] == end
    assert "8 tokens of a side" in task.limit
    task = make(tokenizer, shape, data=RecordsConfig(max_length=8, too_long="refuse"))
    for texts in ((long, short), (short, long)):
        with pytest.raises(BadRecordError, match="are allowed"):
            task.encode(pair(*texts))
    by_default = make(tokenizer, shape)
    assert by_default.max_length == (64 if shape == "encoder_decoder" else 32)
    model = model_of(by_default)
    longest = by_default.encode(pair("der Fluss, " * 100), for_training=False)
    assert by_default.predict(model, [longest], torch.device("cpu"))[0]["translation"] is not None


def test_what_is_refused(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    task = make(tokenizer)
    for record, expected in (
        (pair("der Fluss"), "no field 'target'"),
        (pair("der Fluss", "  "), "'target' is empty"),
        (pair("", "the river"), "'source' is empty"),
        (Record({"source": "der Fluss", "target": 3}, "a.jsonl", 1), "is a number, not a text"),
    ):
        with pytest.raises(BadRecordError, match=expected):
            task.encode(record)
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(LaunchError, match=r"bigtx\[translate\]"):
        require_sacrebleu()
    with pytest.raises(LaunchError, match=r"bigtx\[translate\]"):
        Translate.resolve(task.config, tokenizer, [])


def test_batches_for_compiled_blocks_have_few_shapes(tokenizer: Tokenizer) -> None:
    task = make(tokenizer)
    task = Translate(
        dataclasses.replace(task.config, engine=dataclasses.replace(task.config.engine, compile="true")), tokenizer
    )
    batch = task.collate([task.encode(pair(*texts)) for texts in PAIRS])
    assert batch.tokens.shape[1] % 16 == batch.labels.shape[1] % 16 == 0
    assert task.padded([], 0).shape[0] == 0
    lengths = np.array([task.encode(pair(*texts)).length for texts in PAIRS])
    assert (lengths == [max(len(tokenizer.encode(text)) for text in texts) + 1 for texts in PAIRS]).all()
