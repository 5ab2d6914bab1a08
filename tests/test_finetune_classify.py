"""Sorting texts into classes, through the door of `bigtx-finetune`."""

from __future__ import annotations

import json
import random
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from doors import bigtx, last_step, losses, read_lines, same_weights, wait_for
from finetunes import (
    finetune,
    finetuned,
    kill_at,
    labelled,
    make_base,
    results,
    started,
    write_folders,
    write_jsonl,
    write_samples,
    write_table,
)

from bigtx.engine.checkpoint import list_checkpoints, preferred


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("records") / "train.jsonl", labelled(160))


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("records") / "test.jsonl", labelled(60, seed=2))


def run_of(base: Path, records: Path, run_dir: Path, *changes: str) -> list[str]:
    return [f"base={base}", f"data.train=[{records}]", f"run_dir={run_dir}", "train.max_steps=40", *changes]


def metrics(run_dir: Path, name: str) -> list[float]:
    return [line[name] for line in read_lines(run_dir / "metrics.jsonl") if name in line]


@pytest.mark.parametrize(
    ("shape", "changes"),
    [
        ("decoder", []),
        ("encoder", []),
        pytest.param("encoder", ["classify.pooling=first"], marks=pytest.mark.slow),
        pytest.param("decoder", ["model.shape=encoder"], marks=pytest.mark.slow),
        pytest.param("decoder", ["classify.pooling=mean", "classify.label_smoothing=0.1"], marks=pytest.mark.slow),
    ],
)
def test_it_learns_and_says_what_it_found(
    decoder_base: Path,
    encoder_base: Path,
    records: Path,
    held_out: Path,
    tmp_path: Path,
    shape: str,
    changes: list[str],
) -> None:
    base, run_dir = {"decoder": decoder_base, "encoder": encoder_base}[shape], tmp_path / "run"
    said = finetuned(*run_of(base, records, run_dir, f"data.test=[{held_out}]", "train.max_steps=61", *changes))
    assert "new: head.classes.weight" in said and "dropped: " in said
    note = "note: this model cannot be exported to transformers: "
    of_base, of_run = "model.head_transform=false", "classify.pooling=mean"
    of_run = of_run if of_run in changes else of_base
    log, is_encoder = (base / "logs" / "rank-00000.log").read_text(), shape == "encoder"
    for text, is_noted, reason in ((said, is_encoder or bool(changes), of_run), (log, is_encoder, of_base)):
        lines = [line for line in text.splitlines() if note in line]
        assert len(lines) == is_noted and all(reason in line for line in lines)
    assert f"next: bigtx predict {run_dir} input=FILE" in said
    found = results(run_dir)
    assert found["test"]["accuracy"] > 0.85
    assert found["test"]["records"] == sum(
        row[f"as {name}"] for row in found["test"]["confusion"] for name in ("joy", "woe")
    )
    assert metrics(run_dir, "test/accuracy") == [found["test"]["accuracy"]]
    assert found["validation"]["accuracy"] == max(metrics(run_dir, "validation/accuracy"))
    measured = [line["step"] for line in read_lines(run_dir / "metrics.jsonl") if "validation/accuracy" in line]
    assert measured == [*range(7, 61, 7), 61], "a tenth of the steps, rounded up; the last one at the end"
    link = json.loads((run_dir / "base.json").read_text())
    assert link["checkpoint"].startswith(str(base)) and "head.classes.weight" in link["new"]
    assert "- joy\n" in (run_dir / "config.yaml").read_text(), "the classes are known from the config alone"
    shown = read_lines(run_dir / "predictions.jsonl")
    assert {"record", "input", "answer", "label", "probabilities"} <= shown[0].keys()
    evaluated = bigtx("evaluate", str(run_dir), "--data", str(held_out), "--wandb", "off")
    assert evaluated.returncode == 0, evaluated.stderr
    again = json.loads((run_dir / "evaluations" / "test.json").read_text())
    assert again["metrics"]["accuracy"] == found["test"]["accuracy"]
    assert again["metrics"]["loss"] == pytest.approx(found["test"]["loss"], abs=1e-4)
    assert again["tables"]["confusion"] == found["test"]["confusion"]


@pytest.mark.slow
def test_every_kind_of_file_trains_alike(decoder_base: Path, tmp_path: Path) -> None:
    rows = labelled(24)
    samples: list[dict[str, Any]] = [{"txt": row["text"], "cls": row["label"]} for row in rows]
    files = [
        write_jsonl(tmp_path / "a.jsonl", rows),
        write_table(tmp_path / "a.csv", rows),
        write_samples(tmp_path / "a.tar", samples),
    ]
    runs = [tmp_path / "runs" / file.name for file in files]
    for file, run_dir in zip(files, runs, strict=True):
        finetuned(*run_of(decoder_base, file, run_dir, "train.max_steps=3", "validation.every=100 steps"))
    assert losses(runs[0]) == losses(runs[1]) == losses(runs[2])


def test_pairs_classes_and_their_balance(encoder_base: Path, tmp_path: Path) -> None:
    first, second = labelled(60, classes=("a", "b", "c")), labelled(60, classes=("a", "b", "c"), seed=7)
    pairs = [
        {"one": {"text": left["text"]}, "two": right["text"], "class": number % 3 if number % 9 else 2}
        for number, (left, right) in enumerate(zip(first, second, strict=True))
    ]
    fields = ["data.fields.text=one.text", "data.fields.pair=two", "data.fields.label=class"]
    run_dir = tmp_path / "run"
    file = write_jsonl(tmp_path / "pairs.jsonl", pairs)
    balance = ["classify.balance=true", "classify.classes=['0', '1', '2']"]
    finetuned(*run_of(encoder_base, file, run_dir, *fields, *balance, "train.max_steps=30"))
    assert results(run_dir)["validation"]["accuracy"] > 0.5
    done = finetune(*run_of(encoder_base, file, tmp_path / "two", *fields, "classify.classes=['0', '1']"))
    assert done.returncode == 2 and "the class '2' is unknown to the model" in done.stderr
    assert f"{file}, line 1" in done.stderr


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_two_ranks_and_a_kill_lose_nothing(decoder_base: Path, records: Path, tmp_path: Path, stage: int) -> None:
    straight, run_dir = tmp_path / "straight", tmp_path / "run"
    changes = [
        f"engine.zero_stage={stage}",
        "model.dropout=0.1",
        "train.checkpoint_every=7 steps",
        "train.keep_checkpoints=1",
        "validation.every=5 steps",
    ]
    finetuned(*run_of(decoder_base, records, straight, *changes), ranks=2)
    stop_at = random.randrange(8, 30)
    kill_at(run_dir, stop_at, *run_of(decoder_base, records, run_dir, *changes), ranks=2)
    said = finetuned(*run_of(decoder_base, records, run_dir, *changes), ranks=2)
    assert "resumed from" in said
    assert losses(run_dir) == losses(straight), f"killed at step {stop_at}"
    same_weights(run_dir, straight)
    assert results(run_dir) == results(straight)
    assert preferred(run_dir).name == preferred(straight).name
    without_time = [
        [
            {key: value for key, value in line.items() if key != "time"}
            for line in read_lines(path / "predictions.jsonl")
        ]
        for path in (run_dir, straight)
    ]
    assert without_time[0] == without_time[1]


def test_the_best_checkpoint_is_kept_beside_the_newest(decoder_base: Path, records: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    # Later steps spoil the model: the best one is early.
    changes = [
        "validation.every=2 steps",
        "train.checkpoint_every=2 steps",
        "train.keep_checkpoints=1",
        "schedule.name=constant",
        "validation.metric=loss",
        "validation.at_start=true",
    ]
    arguments = run_of(
        decoder_base, records, run_dir, *changes, "optimizer.learning_rate=0.03", "validation.patience=4"
    )
    said = finetuned(*arguments)
    assert "validation at step 0" in said and "the run ends here" in said
    found, saved = results(run_dir), list_checkpoints(run_dir)
    (stop,) = [event for event in read_lines(run_dir / "events.jsonl") if event["kind"] == "early_stop"]
    assert stop["best_step"] == found["step"] and last_step(run_dir) == found["step"] + 8
    assert len(saved) == 2 and saved[-1].name == found["checkpoint"]
    assert not list((run_dir / "checkpoints").glob("*.damaged")), "a step that was saved is not saved again"
    trained = metrics(run_dir, "validation/loss")[1:]
    assert found["validation"]["loss"] == pytest.approx(min(trained), abs=1e-6), (
        "the measurement at step 0 has no weights"
    )
    said = finetuned(*arguments)
    assert "the run is finished" in said
    assert "train.max_steps=N validation.patience=N 'allow_changes=[train.max_steps,validation.patience]'" in said
    (run_dir / "results.json").write_text(json.dumps(found | {"tokens": 1, "step": 2}))
    assert "the run is finished" not in finetuned(*arguments), "results of an earlier end are none of this one"
    assert json.loads((run_dir / "results.json").read_text())["step"] == found["step"]
    longer = ["train.max_steps=50", "allow_changes=[train.max_steps,validation.patience]"]
    assert "the run is finished" in finetuned(*arguments, *longer), "patience has run out, however long the run"
    names = "train.max_steps,validation.patience,validation.metric"
    longer = ["validation.patience=99", "train.max_steps=41", "validation.metric=accuracy", f"allow_changes=[{names}]"]
    assert "resumed from" in finetuned(*arguments, *longer) and last_step(run_dir) == 41
    assert results(run_dir)["chosen_by"] == "accuracy"


@pytest.mark.slow
def test_a_request_to_stop_where_validation_is_due(decoder_base: Path, records: Path, tmp_path: Path) -> None:
    straight, run_dir = tmp_path / "straight", tmp_path / "run"
    changes = ["validation.every=1 steps"]
    finetuned(*run_of(decoder_base, records, straight, *changes))
    with started(run_dir, *run_of(decoder_base, records, run_dir, *changes)) as process:
        wait_for(lambda: last_step(run_dir) >= 5, process)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=120)
        assert process.returncode == 75, out + err
    manifest = json.loads((list_checkpoints(run_dir)[0] / "manifest.json").read_text())
    assert manifest["state"]["owes_validation"] is True
    finetuned(*run_of(decoder_base, records, run_dir, *changes))
    assert losses(run_dir) == losses(straight)
    assert metrics(run_dir, "validation/accuracy") == metrics(straight, "validation/accuracy")
    assert results(run_dir) == results(straight)


@pytest.mark.slow
def test_compiled_blocks_take_rows_of_any_length(encoder_base: Path, tmp_path: Path) -> None:
    rows = [row | {"text": row["text"] * (1 + number // 4)} for number, row in enumerate(labelled(64))]
    file = write_jsonl(tmp_path / "long.jsonl", rows)
    changes = ["model.max_sequence_length=1024", "data.max_length=1024", "train.max_steps=16"]
    finetuned(*run_of(encoder_base, file, tmp_path / "plain", *changes))
    finetuned(*run_of(encoder_base, file, tmp_path / "compiled", *changes), "engine.compile=true")
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "plain"), rel=1e-3)


@pytest.mark.slow
def test_the_base_may_be_gone_at_resume(corpus: Path, records: Path, tmp_path: Path) -> None:
    base, run_dir = make_base(corpus, tmp_path / "base"), tmp_path / "run"
    finetuned(*run_of(base, records, run_dir, "train.max_steps=4"))
    shutil.rmtree(base)
    more = ["train.max_steps=6", "allow_changes=[train.max_steps]"]
    assert "resumed from" in finetuned(*run_of(base, records, run_dir, *more))
    assert sorted(losses(run_dir)) == list(range(1, 7))
    done = finetune(*run_of(base, records, tmp_path / "new"))
    assert done.returncode == 2 and "no such folder" in done.stderr


def test_what_cannot_be_used_is_refused_with_its_place(
    decoder_base: Path, records: Path, corpus: Path, tmp_path: Path
) -> None:
    rows = [{"text": "ba be", "label": "joy"}, {"text": "  ", "label": "woe"}, {"text": "bi", "label": ["woe"]}]
    rows += [{"label": "joy"}, {"text": "bi bo", "label": "woe"}, {"text": "ba " * 200, "label": "joy"}]
    file = write_jsonl(tmp_path / "odd.jsonl", rows)
    done = finetune(*run_of(decoder_base, file, tmp_path / "run", "data.too_long=refuse"))
    assert done.returncode == 2 and "Traceback" not in done.stdout + done.stderr, done.stderr
    for line in (2, 3, 4, 6):
        assert f"{file}, line {line}: " in done.stderr, done.stderr
    assert "data.max_length" in done.stderr and not (tmp_path / "run" / "checkpoints").exists()
    long = write_jsonl(tmp_path / "long.jsonl", [*labelled(20), rows[-1]])
    said = finetuned(*run_of(decoder_base, long, tmp_path / "long", "train.max_steps=2", "data.max_length=32"))
    assert "records" in said and "were cut (data.too_long" in said
    assert "2 classes, records of each (train + validation): 'joy' 10 + 1, 'woe' 9 + 1" in said
    assert "2 steps of 8 make 0.842 epochs" in said and "warning: 2 steps are so few" in said
    hugging_face = tmp_path / "hf"
    hugging_face.mkdir()
    (hugging_face / "config.json").write_text("{}")
    one_class = write_folders(tmp_path / "one", [{"text": "ba", "label": "joy"}])
    other = tmp_path / "tokenizer"
    done = bigtx("tokenizer", "train", f"input.paths=[{corpus.parent}/0*.txt]", f"output={other}", "vocab_size=400")
    assert done.returncode == 0, done.stderr
    for changes, expected in (
        ([f"base={hugging_face}"], "`bigtx import` converts it to a run"),
        ([f"tokenizer={other}"], "has another tokenizer, so the same ids"),
        ([f"data.train=[{one_class}]", "data.validation_fraction=0"], "have one class, 'joy'"),
        (["data.fields.pair=text", "data.max_length=4"], "the smallest value of use is data.max_length=5"),
        (["model.hidden_size=32"], "does not fit the section model"),
    ):
        done = finetune(*run_of(decoder_base, records, tmp_path / "refused"), *changes)
        assert done.returncode == 2 and expected in done.stderr, done.stdout + done.stderr
        assert "Traceback" not in done.stdout + done.stderr
