"""Records that teach nothing are refused or counted before training, and a prediction needs no answer."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from sounds import RATE, sayings, write_tokenizer

from bigtx.config.load import load
from bigtx.config.schema import (
    AudioConfig,
    ClassifyConfig,
    FieldsConfig,
    FinetuneConfig,
    ModelConfig,
    PreferenceConfig,
    RecordsConfig,
    SftConfig,
    TokenizerTrainConfig,
    TranscribeConfig,
    TranslateConfig,
)
from bigtx.data.recordings import AudioPlace
from bigtx.data.records.read import read_records
from bigtx.data.records.record import BadRecordError, Broken, Record
from bigtx.finetuning.records import encode, open_task_data
from bigtx.finetuning.tasks import task_type
from bigtx.finetuning.tasks.preference import Preference
from bigtx.finetuning.tasks.sft import Sft
from bigtx.finetuning.tasks.task import RecordTask
from bigtx.tokenizer.tokenizer import Tokenizer
from bigtx.tokenizer.train import train
from bigtx.utils.errors import ConfigError, DataError

TEXTS = ["red apple tree and green apple tree, the house of stone, who are you, I am the river. " * 3] * 20
LONG = "the house of stone and the river" + " and the house of stone and the river" * 5
SHAPES = {"classify": "encoder", "translate": "encoder_decoder"}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train(TokenizerTrainConfig(vocab_size=420), TEXTS)


def config_of(task: str, **changes: Any) -> FinetuneConfig:
    shape: Any = changes.pop("shape", SHAPES.get(task, "decoder"))
    model = ModelConfig(shape=shape, vocab_size=420, hidden_size=16, num_layers=1, num_heads=2, max_sequence_length=128)
    if task == "classify":
        changes.setdefault("classify", ClassifyConfig(classes=["bad", "good"]))
    return FinetuneConfig(task=task, model=model, **changes)  # type: ignore[arg-type]


def make(tokenizer: Tokenizer, task: str, **changes: Any) -> RecordTask:
    kind = task_type(task)
    return kind(kind.resolve(config_of(task, **changes), tokenizer, []), tokenizer)


def records(rows: Sequence[Mapping[str, Any]], file: str = "a.jsonl") -> list[Record]:
    return [Record(row, file, number) for number, row in enumerate(rows, 1)]


def reviewed(task: RecordTask, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    broken = Broken()
    examples = encode(task, records(rows), broken)
    broken.check()
    return task.review({"train": examples})


def labelled(*labels: Any) -> list[Record]:
    return records([{"text": f"the tree {number}", "label": label} for number, label in enumerate(labels)])


def test_classes_are_counted_and_those_without_records_named(tokenizer: Tokenizer) -> None:
    task = make(tokenizer, "classify", classify=ClassifyConfig(classes=["bad", "good", "odd"]))
    splits = {
        name: encode(task, found, Broken())
        for name, found in (
            ("train", labelled("good", " good", "bad ", "good")),
            ("validation", labelled("odd", "bad")),
            ("test", []),
        )
    }
    assert task.review(splits) == [
        "3 classes, records of each (train + validation): 'bad' 1 + 1, 'good' 3 + 0, 'odd' 0 + 1",
        "warning: classes without a train record: 'odd', which the model cannot learn",
        "warning: classes without a validation record: 'good'",
    ]


def test_spaces_around_a_label_make_no_other_class(tokenizer: Tokenizer) -> None:
    kind = task_type("classify")
    config = config_of("classify", classify=ClassifyConfig())
    assert kind.resolve(config, tokenizer, labelled("pos", "pos ", " neg", 1)).classify.classes == ["1", "neg", "pos"]


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ("", "the field 'label' of the class is empty"),
        ("  ", "is empty"),
        (True, r"the field 'label' is true \(bool\), and a class is a text or a whole number"),
        (1.0, r"is 1\.0 \(float\)"),
        (["pos"], r"is \[\"pos\"\] \(list\)"),
        (None, "the field 'label' is null"),
    ],
)
def test_what_names_no_class_is_said(tokenizer: Tokenizer, label: Any, message: str) -> None:
    kind, task = task_type("classify"), make(tokenizer, "classify")
    with pytest.raises(BadRecordError, match=message):
        task.encode(labelled(label)[0])
    with pytest.raises(DataError, match=rf"2 records cannot be used.*\n  a\.jsonl, line 1: .*{message}.*\n.*the same"):
        kind.resolve(config_of("classify", classify=ClassifyConfig()), tokenizer, labelled(label, label))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("text;label\nthe tree;good\n", r"its fields: 'text;label'\); it seems to have ';' between its columns"),
        ("the tree,good\nthe house,bad\n", r"fields: 'the tree', good\); the first line of a table has to name its"),
        ("text, label\nthe tree, good\n", r"its fields: text, ' label'\); write '(data\.fields\.label=.*)'"),
        ("text,Label\nthe tree,good\n", r"its fields: text, Label\); write '?(data\.fields\.label=.*)'?"),
    ],
)
def test_a_table_whose_columns_are_not_as_thought(
    tokenizer: Tokenizer, tmp_path: Path, content: str, message: str
) -> None:
    (tmp_path / "a.csv").write_text(content)
    found = list(read_records([str(tmp_path / "a.csv")], Broken()))
    kind, config = task_type("classify"), config_of("classify", classify=ClassifyConfig())
    with pytest.raises(DataError, match=message) as error:
        kind.resolve(config, tokenizer, found)
    advice = re.search(message, str(error.value))
    if advice is not None and advice.groups():
        fields = load(FinetuneConfig, [advice[1].strip("'")], check=False).data.fields
        make(tokenizer, "classify", data=RecordsConfig(fields=fields)).encode(found[0])


def test_a_class_that_only_validation_has_is_explained(tokenizer: Tokenizer, tmp_path: Path) -> None:
    for name, label in (("train", "good"), ("validation", "fine")):
        rows = [f'{{"text": "the tree {number}", "label": "{["bad", label][number % 2]}"}}' for number in range(8)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
    data = RecordsConfig(train=[f"{tmp_path}/train.jsonl"], validation=[f"{tmp_path}/validation.jsonl"])
    config = config_of("classify", classify=ClassifyConfig(), data=data)
    with pytest.raises(DataError, match="the class 'fine' is unknown to the model: no training record has it"):
        open_task_data(config, tokenizer)


def test_the_longer_of_two_texts_gives_way(tokenizer: Tokenizer) -> None:
    """At every length, odd and even; it went on forever where both texts were longer than their halves."""
    fields = FieldsConfig(pair="pair")
    rows = [(LONG, LONG + " end"), (LONG, "the tree"), ("the tree", LONG)]
    for length in range(5, 24):
        task = make(tokenizer, "classify", data=RecordsConfig(max_length=length, fields=fields))
        for text, pair in rows:
            example = task.encode(Record({"text": text, "pair": pair, "label": "bad"}, "a"))
            sides = [int((example.types == side).sum()) for side in (0, 1)]
            assert len(example.ids) == length and min(sides) >= 2, "with its end"
            if text == rows[0][0] and pair == rows[0][1]:
                assert abs(sides[0] - 1 - sides[1]) <= 1, "both have half of the room; the first has two ends"


RECORDS: dict[str, dict[str, Any]] = {
    "classify": {"text": LONG, "label": "bad"},
    "sft": {"prompt": LONG, "response": LONG},
    "preference": {"prompt": LONG, "chosen": "red", "rejected": "green"},
    "translate": {"source": LONG, "target": LONG},
}


@pytest.mark.parametrize(
    ("task", "changes"),
    [
        ("classify", {}),
        ("classify", {"data": RecordsConfig(fields=FieldsConfig(pair="text"))}),
        ("sft", {}),
        ("sft", {"sft": SftConfig(packing=True, row_length=2)}),
        ("preference", {}),
        ("translate", {"translate": TranslateConfig(prefix="the house: ")}),
        ("translate", {"translate": TranslateConfig(prefix="the house: "), "shape": "decoder"}),
    ],
)
def test_a_length_without_room_for_a_text_is_refused_with_one_that_has_room(
    tokenizer: Tokenizer, task: str, changes: dict[str, Any]
) -> None:
    changes = dict(changes)
    data, row = changes.pop("data", RecordsConfig()), "sft" in changes

    def encoded(length: int) -> Any:
        if row:
            changes["sft"] = SftConfig(packing=True, row_length=length)
        else:
            data.max_length = length
        return make(tokenizer, task, data=data, **changes).encode(Record(RECORDS[task], "a"))

    setting = "sft.row_length" if row else "data.max_length"
    with pytest.raises(ConfigError, match=rf"{setting}=2 leaves no tokens.* value of use is {setting}=(\d+)") as error:
        encoded(2)
    smallest = int(str(error.value).rpartition("=")[2])
    with pytest.raises(ConfigError, match="leaves no tokens"):
        encoded(smallest - 1)
    example = encoded(smallest)
    if task in ("sft", "preference"):
        prompt = example.ids[: example.prompt_length] if task == "sft" else example.prompt
        assert tokenizer.decode([int(token) for token in prompt if token != tokenizer.end_id]).strip()
    if task == "translate":
        source = tokenizer.decode(example.source[:-1].tolist())
        assert source.startswith("the house: ") and source != "the house: "


def test_a_model_too_short_for_a_task_is_refused(tokenizer: Tokenizer) -> None:
    config = config_of("translate", shape="decoder", translate=TranslateConfig(prefix="the house: "))
    config.model.max_sequence_length = 4
    with pytest.raises(ConfigError, match=r"model\.max_sequence_length=4 leaves .*max_sequence_length=(\d+)") as error:
        task_type("translate")(config, tokenizer)
    config.model.max_sequence_length = int(str(error.value).rpartition("=")[2])
    task_type("translate")(config, tokenizer)


CUT_EQUAL = {"prompt": "who", "chosen": LONG + " red", "rejected": LONG + " green"}
PAIR = {"prompt": "who", "chosen": "red", "rejected": "green"}


def test_pairs_that_are_cut_to_the_same_answer_are_counted_and_refused(tokenizer: Tokenizer) -> None:
    data = RecordsConfig(max_length=24)
    rows = [CUT_EQUAL, *[PAIR] * 19]
    (said, *others) = [line for line in reviewed(make(tokenizer, "preference", data=data), rows) if "equal" in line]
    assert "1 of 20 train pairs (5.0%) have two equal answers" in said and "a.jsonl, line 1" in said and not others
    with pytest.raises(DataError, match=r"2 of 20 train pairs \(10\.0%\).*at most 5\.0%.*preference\.max_equal"):
        reviewed(make(tokenizer, "preference", data=data), [CUT_EQUAL, CUT_EQUAL, *[PAIR] * 18])
    allowed = make(tokenizer, "preference", data=data, preference=PreferenceConfig(max_equal=0.1))
    assert "2 of 20" in reviewed(allowed, [CUT_EQUAL, CUT_EQUAL, *[PAIR] * 18])[-1]
    assert reviewed(make(tokenizer, "preference"), [CUT_EQUAL]) == [], "at their full length they differ"


def messages(prompt: str = "who", **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": "I am", **more}]}


def test_what_stands_beside_the_texts_of_a_chat_is_counted(tokenizer: Tokenizer) -> None:
    rows = [
        messages(),
        messages(tool_calls=[{"id": "1"}]),
        messages(tool_calls=[{"id": "2"}], weight=0),
        messages(tool_calls=[], function_call=None, refusal=""),
        {**messages(function_call={"name": "f"}), "tools": [{"name": "f"}], "id": 7},
        {"prompt": "who", "response": "I am", "source": "a"},
    ]
    said = reviewed(make(tokenizer, "sft"), rows)
    assert [line.partition(":")[2].partition(", which")[0].strip() for line in said] == [
        "1 record has function_call",
        "2 records have tool_calls",
        "1 record has tools",
        "1 record has weight",
    ]
    assert "tool_calls, which are not trained on" in said[1]
    pair = {"prompt": [{"role": "user", "content": "who", "name": "Ann"}], "chosen": "red", "rejected": "green"}
    assert "1 record has name, which is not" in reviewed(make(tokenizer, "preference"), [pair])[0]


@pytest.mark.parametrize("task", ["sft", "preference"])
def test_a_last_turn_that_loses_its_beginning_is_counted(tokenizer: Tokenizer, task: str) -> None:
    system = {"role": "system", "content": "be short"}
    answers = {"chosen": "red", "rejected": "green"}
    rows: list[dict[str, Any]] = []
    for prompt in (LONG, "who"):
        asked = [system, {"role": "user", "content": prompt}]
        answered = {"messages": [*asked, {"role": "assistant", "content": "I am"}]}
        rows.append(answered if task == "sft" else {"prompt": asked, **answers})
    (said,) = reviewed(make(tokenizer, task, data=RecordsConfig(max_length=24)), rows)
    assert "1 of 2 records (50.0%) have a last turn that alone is too long" in said and "system prompt" in said
    assert reviewed(make(tokenizer, task), rows) == []


@pytest.mark.parametrize("nothing", ["", "  ", None])
def test_a_prediction_needs_no_answer(tokenizer: Tokenizer, nothing: str | None) -> None:
    """An empty answer is as none."""
    for task, fields, answers in (
        ("sft", {"prompt": "who"}, ["response"]),
        ("preference", {"prompt": "who"}, ["chosen", "rejected"]),
        ("preference", {"prompt": "who", "rejected": "red"}, ["chosen"]),
        ("translate", {"source": "who"}, ["target"]),
        ("classify", {"text": "who"}, ["label"]),
    ):
        ready = make(tokenizer, task)
        without = ready.encode(Record(fields, "a"), for_training=False)
        found = ready.encode(Record(fields | dict.fromkeys(answers, nothing), "a"), for_training=False)
        assert repr(found) == repr(without), task
        with pytest.raises(BadRecordError):
            ready.encode(Record(fields | dict.fromkeys(answers, nothing), "a"))
    user = {"role": "user", "content": "who"}
    for ready in (make(tokenizer, "sft"), make(tokenizer, "preference")):
        assert isinstance(ready, Sft | Preference)
        chat = Record({"messages": [user, {"role": "assistant", "content": nothing}]}, "a")
        asked = Record({"messages": [user]}, "a")
        assert repr(ready.encode(chat, for_training=False)) == repr(ready.encode(asked, for_training=False))
        assert ready.shown(chat) == "user: who" and ready.answer(chat) == ""


def test_a_pair_of_equal_answers_can_be_predicted_for(tokenizer: Tokenizer) -> None:
    ready = make(tokenizer, "preference")
    assert ready.encode(Record({"prompt": "a", "chosen": "b", "rejected": "b"}, "a"), for_training=False).has_answers


@pytest.mark.parametrize("text", ["", " ", None, "low " * 200, "?!"])
def test_what_is_said_of_a_recording_does_not_keep_it_from_being_transcribed(tmp_path: Path, text: str | None) -> None:
    speech = Tokenizer.load(write_tokenizer(tmp_path / "tokenizer"))
    model = ModelConfig(
        shape="encoder",
        vocab_size=speech.vocab_size,
        hidden_size=16,
        num_layers=1,
        num_heads=2,
        max_sequence_length=32,
        audio=AudioConfig(num_mel_bins=16, sample_rate=RATE, strides=[2]),
    )
    config = FinetuneConfig(
        task="transcribe", model=model, transcribe=TranscribeConfig(method="ctc", normalize="words")
    )
    kind = task_type("transcribe")
    task = kind(kind.resolve(config, speech, []), speech)
    content, _ = sayings(1)[0]
    place = AudioPlace("a.wav", "nowhere", 0, len(content), content)
    task.encode(Record({"audio": place, "text": text}, "a.wav", 0), for_training=False)
    with pytest.raises(BadRecordError):
        task.encode(Record({"audio": place, "text": text}, "a.wav", 0))
