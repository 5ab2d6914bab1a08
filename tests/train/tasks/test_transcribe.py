"""What `transcribe` makes of recordings and texts, without training."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sounds import RATE, WORDS, sayings, spoken, tone, wav, write_tokenizer

from bigtx.config.schema import AudioConfig, FinetuneConfig, ModelConfig, RecordsConfig, TranscribeConfig
from bigtx.config.shape import num_columns
from bigtx.data.recordings import AudioPlace
from bigtx.data.records.record import BadRecordError, Record
from bigtx.finetuning.tasks.speech import Cache, _band
from bigtx.finetuning.tasks.transcribe import Transcribe, collapse, normalize
from bigtx.model.beam import Beam
from bigtx.model.loss import IGNORED
from bigtx.model.transformer import Transformer
from bigtx.tokenizer.tokenizer import Tokenizer
from bigtx.utils.errors import DataError


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def make(
    tokenizer: Tokenizer, method: str = "ctc", *, data: dict[str, Any] | None = None, **settings: Any
) -> Transcribe:
    config = FinetuneConfig(
        task="transcribe",
        model=ModelConfig(
            shape="encoder" if method == "ctc" else "encoder_decoder",
            hidden_size=32,
            num_layers=1,
            num_heads=2,
            max_sequence_length=32,
            vocab_size=tokenizer.vocab_size,
            init_std=0.2,
            audio=AudioConfig(num_mel_bins=16, sample_rate=RATE, strides=[2]),
        ),
        data=RecordsConfig(**(data or {})),
        transcribe=TranscribeConfig(method=method, **settings),  # type: ignore[arg-type]
    )
    return Transcribe(Transcribe.resolve(config, tokenizer, []), tokenizer)


def record(content: bytes, text: str | None = "low", name: str = "a.wav") -> Record:
    place = AudioPlace(name, "nowhere", 0, len(content), content)
    return Record({"audio": place} | ({} if text is None else {"text": text}), name, 0)


def model_of(task: Transcribe) -> Transformer:
    model = Transformer(task.config.model)
    model.init_weights(1)
    return model.eval()


def test_texts_are_normalized_as_the_config_says() -> None:
    text = "  Don’t  PANIC, it's  O'Neill's «42» -- 'quoted' हिन्दी\n"
    assert normalize(text, "none") == "Don’t PANIC, it's O'Neill's «42» -- 'quoted' हिन्दी"
    assert normalize(text, "lower") == "don’t panic, it's o'neill's «42» -- 'quoted' हिन्दी"
    assert normalize(text, "words") == "don't panic it's o'neill's 42 quoted हिन्दी"
    assert normalize("x'y !x'y x'y! x''y 'x y'", "words") == "x'y x'y x'y x y x y"
    assert normalize("x'y", "words") == "x'y" and normalize("'x", "words") == normalize("x'", "words") == "x"


def test_a_path_collapses() -> None:
    assert collapse([0, 5, 5, 0, 5, 6, 6, 0, 0, 7], 0) == [5, 5, 6, 7]
    assert collapse([0, 0], 0) == [] and collapse([], 0) == []


@pytest.mark.parametrize("method", ["ctc", "seq2seq"])
def test_a_batch(tokenizer: Tokenizer, method: str) -> None:
    task = make(tokenizer, method)
    examples = [task.encode(record(content, text)) for content, text in sayings(4)]
    batch = task.collate(examples)
    assert batch.num_tokens == sum(example.length for example in examples)
    assert batch.features.shape[1] % 32 == 0 and batch.features.shape[2] == 16
    for row, example in enumerate(examples):
        ids = example.ids.tolist() + ([] if method == "ctc" else [tokenizer.end_id])
        assert tokenizer.decode(example.ids.tolist()) == example.text
        labels = batch.labels[row]
        assert labels[labels != IGNORED].tolist() == ids
        frames = int(batch.feature_lengths[row])
        assert -(-frames // 2) == example.length and bool((batch.features[row, frames:] == 0).all())
        if batch.target_tokens is not None:
            assert batch.target_tokens[row, : len(ids)].tolist() == [tokenizer.pad_id, *ids[:-1]]
    assert batch.num_labels == int((batch.labels != IGNORED).sum())


def test_what_is_drawn_follows_from_the_number_of_the_record(tokenizer: Tokenizer) -> None:
    for settings in ({}, {"speed_change": 0.1, "noise_db": 10.0}):
        task = make(tokenizer, **settings)
        examples = [task.encode(record(content, text)) for content, text in sayings(2)]
        plain, first, other = (task.collate(examples, numbers).features for numbers in (None, [5, 6], [7, 8]))
        assert torch.equal(first, make(tokenizer, **settings).collate(examples, [5, 6]).features)
        assert not torch.equal(first, other) and not torch.equal(first, plain)
        assert torch.equal(plain, task.collate(examples).features), "the cache holds what was heard unchanged"


def test_the_loss_of_ctc_is_the_sum_over_all_paths(tokenizer: Tokenizer) -> None:
    """Over every way to fill a few columns, among the ids that matter."""
    task = make(tokenizer)
    example = task.encode(record(wav(tone(400, 0.07)), "low"))
    assert example.length == 4
    batch, model = task.collate([example]), model_of(task)
    log_probabilities = model(**batch.inputs(labels=False))[0, :4].log_softmax(-1).detach().double()
    ids = example.ids.tolist()
    paths = itertools.product([task.tokenizer.pad_id, *set(ids)], repeat=4)
    total = sum(
        math.exp(sum(float(log_probabilities[column, own]) for column, own in enumerate(path)))
        for path in paths
        if collapse(path, task.tokenizer.pad_id) == ids
    )
    loss = task.loss(model, batch)
    assert float(loss.reported_sum) == pytest.approx(-math.log(total), rel=1e-5) and loss.loss_sum.requires_grad
    assert float(task.predict(model, [example], torch.device("cpu"))[0]["_loss"]) == pytest.approx(
        -math.log(total), rel=1e-5
    )


@pytest.mark.parametrize("num_beams", [1, 3])
def test_the_decoder_writes_what_the_model_finds_likeliest(tokenizer: Tokenizer, num_beams: int) -> None:
    task = make(tokenizer, "seq2seq", num_beams=num_beams)
    examples = [task.encode(record(content, text)) for content, text in sayings(3)]
    model = model_of(task)
    predictions = task.predict(model, examples, torch.device("cpu"))
    losses = [task.loss(model, task.collate([example])) for example in examples]
    for example, prediction, loss in zip(examples, predictions, losses, strict=True):
        assert prediction["_text"] == example.text
        assert prediction["_loss"] == pytest.approx(float(loss.reported_sum), rel=1e-4)
        if num_beams > 1:
            continue
        ids = [tokenizer.pad_id]
        while len(ids) <= min(task.max_length - 1, example.length + 1):
            batch = task.collate([example])
            logits = model(**batch.inputs(labels=False), target_tokens=torch.tensor([ids]))
            logits = logits[0, -1, : tokenizer.vocab_size]
            if int(logits.argmax()) == tokenizer.end_id:
                break
            ids.append(int(logits.argmax()))
        assert prediction["text"] == tokenizer.decode(ids[1:])


@torch.no_grad()
def test_the_loss_of_a_decoder_is_of_its_tokens_and_ends(tokenizer: Tokenizer) -> None:
    """Against torch's cross-entropy of each text alone."""
    task = make(tokenizer, "seq2seq", label_smoothing=0.2)
    examples = [task.encode(record(content, text)) for content, text in sayings(4)]
    model, plain, smoothed, count = model_of(task), 0.0, 0.0, 0
    for example in examples:
        ids = [*tokenizer.encode(example.text), tokenizer.end_id]
        heard = task.collate([example]).inputs(labels=False)
        logits = model(**heard, target_tokens=torch.tensor([[tokenizer.pad_id, *ids[:-1]]]))[0]
        for smoothing in (0.0, 0.2):
            loss = F.cross_entropy(logits, torch.tensor(ids), reduction="sum", label_smoothing=smoothing).item()
            plain, smoothed = (plain, smoothed + loss) if smoothing else (plain + loss, smoothed)
        count += len(ids)
    batch = task.collate(examples)
    loss = task.loss(model, batch)
    assert loss.reported_sum.item() == pytest.approx(plain, rel=1e-4)
    assert loss.loss_sum.item() == pytest.approx(smoothed, rel=1e-4)
    assert batch.num_labels == count
    predictions = task.predict(model, examples, torch.device("cpu"))
    assert task.metrics(predictions)["loss"] == pytest.approx(plain / count, rel=1e-4)
    # The blank of CTC is no token, and nothing says that a text ends.
    ctc = make(tokenizer)
    examples = [ctc.encode(record(content, text)) for content, text in sayings(4)]
    predictions = ctc.predict(model_of(ctc), examples, torch.device("cpu"))
    total = ctc.loss(model_of(ctc), ctc.collate(examples)).reported_sum.item()
    assert ctc.metrics(predictions)["loss"] == pytest.approx(total / (count - len(examples)), rel=1e-4)


def test_error_rates() -> None:
    task = object.__new__(Transcribe)
    task.settings = TranscribeConfig(normalize="lower")
    metrics = task.metrics(
        [
            {"text": "One two", "_text": "one two", "_loss": 1.0, "_num_labels": 2},
            {"text": "three", "_text": "three four", "_loss": 5.0, "_num_labels": 2},
        ]
    )
    assert metrics == {"wer": 0.25, "cer": pytest.approx(5 / 17), "loss": 1.5}


def test_what_cannot_be_used_is_refused_with_the_reason(tokenizer: Tokenizer, tmp_path: Path) -> None:
    task, sound = make(tokenizer, normalize="words"), wav(tone(400))
    cases = [
        (record(b""), "a.wav: an empty file"),
        (record(b"no sound"), "not a recording that can be read"),
        (record(wav(np.zeros(0, np.float32))), "without samples"),
        (record(sound, None), "has no text: there is no .txt"),
        (record(sound, "  "), "empty"),
        (record(sound, "?!"), "the text is empty"),
        (record(sound, "low mid high top " * 3), "columns for CTC"),
        (Record({"audio": "gone.wav", "text": "low"}, str(tmp_path / "list.jsonl"), 3), "gone.wav cannot be read"),
        (Record({"text": "low"}, "list.jsonl", 3), "no field 'audio'"),
    ]
    for bad, reason in cases:
        with pytest.raises(BadRecordError, match=reason):
            task.encode(bad)
    assert task.encode(record(sound, None), for_training=False).text == ""
    with pytest.raises(BadRecordError, match="cut short"):
        task.encode(record(sound[:-20]), for_training=False)


def test_too_long_recordings_are_cut_and_counted_or_refused(tokenizer: Tokenizer) -> None:
    long = record(wav(tone(400, 1.0)))
    example = make(tokenizer, max_seconds=0.5).encode(long)
    assert example.length == 25 and example.num_cut == 25
    task = make(tokenizer, max_seconds=0.5)
    assert int(task.collate([task.encode(long)]).feature_lengths[0]) == 50
    with pytest.raises(BadRecordError, match=r"1\.0 s, and transcribe\.max_seconds=0\.5"):
        make(tokenizer, max_seconds=0.5, data={"too_long": "refuse"}).encode(long)


def test_texts_are_cut_with_room_for_their_end(tokenizer: Tokenizer) -> None:
    """All that a decoder reads and writes is as long as is allowed: a start, or an end, and the text."""
    sound, text = wav(tone(400, 1.0)), "low mid high top low mid"
    ids = tokenizer.encode(text)
    assert len(ids) > 5
    for method, room in (("ctc", 5), ("seq2seq", 4)):
        task = make(tokenizer, method, data={"max_length": 5})
        example = task.encode(record(sound, text))
        assert example.ids.tolist() == ids[:room] and example.num_cut == len(ids) - room
        assert task.collate([example]).labels.shape[1] == 5
        exact = make(tokenizer, method, data={"max_length": len(ids) + 5 - room, "too_long": "refuse"})
        assert exact.encode(record(sound, text)).ids.tolist() == ids


def test_columns_that_ctc_needs(tokenizer: Tokenizer) -> None:
    """One for each token, and one for the blank between two equal ones; of what is left when it is played faster."""
    task, rate = make(tokenizer), RATE
    assert num_columns(task.config.model, round(0.1 * rate)) == 5
    for ids, speed_change, fits in (
        ([5, 6, 5, 6, 5], 0.0, True),
        ([5, 6, 5, 6, 5, 6], 0.0, False),
        ([5, 5, 5], 0.0, True),
        ([5, 5, 6, 6], 0.0, False),
        ([5, 5, 6], 0.3, True),
        ([5, 5, 6, 5], 0.3, False),
        ([5, 5, 6, 5], 0.5, False),
    ):
        task = make(tokenizer, speed_change=speed_change)
        if fits:
            task._check_columns(ids, round(0.1 * rate))
        else:
            with pytest.raises(BadRecordError, match="columns for CTC"):
                task._check_columns(ids, round(0.1 * rate))
    make(tokenizer, "seq2seq")._check_columns([5] * 20, round(0.1 * rate))
    assert make(tokenizer, "seq2seq", num_beams=3, length_penalty=0.9).beam == Beam(size=3, length_penalty=0.9)


def test_a_recording_that_was_lost_meanwhile_is_named(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(wav(spoken(list(WORDS), np.random.default_rng(1))))
    task = make(tokenizer)
    example = task.encode(Record({"audio": "a.wav", "text": "low"}, str(tmp_path / "list.jsonl"), 7))
    (tmp_path / "a.wav").unlink()
    with pytest.raises(DataError, match=r"list\.jsonl, line 7: the recording a\.wav cannot be used"):
        task.collate([example])


def test_the_cache_holds_no_more_than_it_may() -> None:
    cache, made = Cache(max_bytes=100), list[str]()

    def get(key: str, size: int = 10) -> int:
        def make() -> torch.Tensor:
            made.append(key)
            return torch.zeros(size)  # 4 bytes each.

        return cache.get(key, make).numel()

    for key in ("a", "b", "a", "c", "a", "b"):
        get(key)
    assert made == ["a", "b", "c", "b"] and cache.num_bytes == 80, "b was used longest ago when c came"
    assert get("large", 26) == 26 and "large" not in cache.held


def test_a_band_is_anywhere_within_the_length() -> None:
    draw = np.random.default_rng(1)
    bands = {_band(6, 0.5, draw) for _ in range(500)}
    assert bands == {(start, start + width) for width in range(4) for start in range(6 - width + 1)}
