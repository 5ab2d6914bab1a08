"""`bigtx predict` and `bigtx evaluate` as their users call them."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import forks
import pytest
from doors import ROOT, bigtx, environment, read_lines
from finetunes import finetuned, labelled, write_folders, write_jsonl, write_samples
from terminals import Terminal

import bigtx as package
from bigtx.config.schema import FinetuneConfig
from bigtx.data.records.record import WHOLE_FILE, Record
from bigtx.finetuning.prediction_output import Output, Unread, fields_of
from bigtx.finetuning.predictions import task_config
from bigtx.utils.errors import DataError
from bigtx.utils.terminal import width


@pytest.fixture(scope="module")
def run(decoder_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("predict")
    records = write_jsonl(folder / "train.jsonl", labelled(80))
    finetuned(
        f"base={decoder_base}",
        f"data.train=[{records}]",
        f"run_dir={folder / 'run'}",
        "train.max_steps=30",
        "data.test_fraction=0.2",
        "validation.every=100 steps",
    )
    return folder / "run"


def predict(run: Path, *arguments: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    return forks.run(
        [sys.executable, "-m", "bigtx", "predict", str(run), *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        input=stdin,
        env=environment(PYTHONPATH=str(ROOT)),
    )


def objects(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_settings_of_predictions_replace_those_of_the_run() -> None:
    config = FinetuneConfig(task="translate")
    config.translate.num_beams = 2
    assert task_config(config, "run") == config
    changed = task_config(config, "run", ["translate.num_beams=5"])
    assert (changed.translate.num_beams, config.translate.num_beams) == (5, 2)


def test_the_fields_of_a_record_that_json_can_hold() -> None:
    held = {"id": 7, "text": "a", "score": 0.5, "is_new": False, "tag": None, "more": {"list": [1, (2, "b")]}}
    fields = held | {"image": b"x", "inner": {"a": [b"x"]}, "day": {1, 2}}
    assert fields_of(Record(fields, "a.parquet", 3)) == held
    assert fields_of(Record({"text": "a"}, "a.txt", WHOLE_FILE)) == {"file": "a.txt", "text": "a"}


def test_a_line_for_each_record_in_order(run: Path, tmp_path: Path) -> None:
    rows = labelled(50, seed=3)
    source, output = write_jsonl(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    done = predict(run, "--input", str(source), "--output", str(output), "--batch-size", "4")
    assert done.returncode == 0 and done.stdout == "", done.stderr
    lines = read_lines(output)
    assert [{key: line[key] for key in ("text", "label")} for line in lines] == rows
    assert sum(line["prediction"]["label"] == line["label"] for line in lines) > 35
    assert all(sum(line["prediction"]["probabilities"].values()) == pytest.approx(1) for line in lines)
    about = json.loads((tmp_path / "out.jsonl.about.json").read_text())
    assert about["checkpoint"].startswith(str(run)) and about["weights"] == "master"
    whole = output.read_bytes()
    # As a kill leaves it: in the middle of a line, in the middle of a chunk, and between chunks.
    for size in (
        len(whole) - 5,
        len(b"".join(whole.splitlines(True)[:40])),
        len(b"".join(whole.splitlines(True)[:32])),
    ):
        output.write_bytes(whole[:size])
        done = predict(run, "--input", str(source), "--output", str(output), "--batch-size", "4")
        assert done.returncode == 0 and "32 of them already in the output" in done.stderr, done.stderr
        assert output.read_bytes() == whole
    python = package.load(run).predict(rows[:3])
    for line, prediction in zip(lines, python, strict=False):
        assert line["prediction"]["label"] == prediction["label"]
        assert line["prediction"]["probabilities"] == pytest.approx(prediction["probabilities"], abs=1e-4)


@pytest.mark.slow
def test_killed_and_started_again(run: Path, tmp_path: Path) -> None:
    source, output = write_jsonl(tmp_path / "in.jsonl", labelled(4000)), tmp_path / "out.jsonl"
    arguments = ["--input", str(source), "--batch-size", "1"]
    command = [sys.executable, "-m", "bigtx", "predict", str(run), *arguments, "--output", str(output)]
    process = subprocess.Popen(command, env=environment(PYTHONPATH=str(ROOT)))
    while not output.exists() or output.stat().st_size < 20_000:
        assert process.poll() is None
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert len(output.read_bytes().splitlines()) < 4000
    assert predict(run, *arguments, "--output", str(output)).returncode == 0
    assert output.read_text() == predict(run, *arguments).stdout


def test_what_cannot_be_used_has_a_line_too(run: Path, tmp_path: Path) -> None:
    lines = ['{"text": "ba be", "label": "never seen"}', "nope", '{"text": ""}', '{"text": "\\ud800"}', '{"words": 1}']
    lines.append(json.dumps({"text": "ba " * 200}))
    done = predict(run, "--input", "-", stdin="\n".join(lines))
    assert done.returncode == 1 and "Traceback" not in done.stderr
    found = objects(done.stdout)
    assert len(found) == 6
    assert found[0]["prediction"]["label"] in ("joy", "woe") and found[0]["label"] == "never seen"
    assert [line.get("error", "").partition(":")[0] for line in found[1:5]] == [
        f"standard input, line {number}" for number in range(2, 6)
    ]
    assert found[5]["num_cut"] > 100 and "cut to the length that the model reads: 1 record" in done.stderr
    assert "4 records could not be used" in done.stderr
    refused = objects(predict(run, "--input", "-", "--too-long", "refuse", stdin=lines[-1]).stdout)
    assert "data.max_length" in refused[0]["error"]


def test_each_line_of_a_pipe_is_answered_when_it_comes(run: Path) -> None:
    process = forks.start(
        [sys.executable, "-m", "bigtx", "predict", str(run), "--input", "-"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(PYTHONPATH=str(ROOT)),
    )
    assert process.stdin and process.stdout and process.stderr
    for line, key in (('{"text": "ba be"}', "prediction"), ("nope", "error"), ('{"text": "bi"}', "prediction")):
        process.stdin.write(f"{line}\n".encode())
        process.stdin.flush()
        assert key in json.loads(process.stdout.readline())
    process.send_signal(signal.SIGINT)
    process.wait(timeout=60)
    said = process.stderr.read()
    assert process.returncode == 130 and b"Traceback" not in said and b"Fatal" not in said, said
    for stream in (process.stdin, process.stdout, process.stderr):
        stream.close()


def test_a_full_disk_is_told_and_gone_on_from(run: Path, tmp_path: Path) -> None:
    source, output = write_jsonl(tmp_path / "in.jsonl", labelled(600)), tmp_path / "out.jsonl"
    arguments = ["--input", str(source), "--output", str(output), "--batch-size", "8"]

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    command = [sys.executable, "-m", "bigtx", "predict", str(run), *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, preexec_fn=limit, env=environment(PYTHONPATH=str(ROOT))
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr and "continues when that is repaired" in done.stderr
    assert predict(run, *arguments).returncode == 0
    assert output.read_text() == predict(run, *arguments[:2], "--batch-size", "8").stdout


def test_folders_and_archives_name_their_files(run: Path, tmp_path: Path) -> None:
    rows = labelled(4)
    folder = write_folders(tmp_path / "folder", rows)
    shard = write_samples(tmp_path / "a.tar", [{"txt": rows[0]["text"]}, {"txt": b"\xff"}, {"txt": rows[1]["text"]}])
    done = predict(run, "--input", str(folder / "joy"), str(shard))
    assert done.returncode == 1
    found = objects(done.stdout)
    assert [line.get("file") for line in found] == [
        f"{folder}/joy/0.txt",
        f"{folder}/joy/2.txt",
        f"{shard}/00000.txt",
        None,
        f"{shard}/00002.txt",
    ]
    assert f"{shard}/00001.txt" in found[3]["error"]


def test_an_output_of_something_else_is_left_alone(run: Path, decoder_base: Path, tmp_path: Path) -> None:
    source, output = write_jsonl(tmp_path / "in.jsonl", labelled(6)), tmp_path / "out.jsonl"
    arguments = ["--input", str(source), "--output", str(output)]
    output.write_text("precious\n")
    done = predict(run, *arguments)
    assert done.returncode == 2 and "write output=FILE to name" in done.stderr and output.read_text() == "precious\n"
    output.with_name("out.jsonl.about.json").write_text("[1]")
    done = predict(run, *arguments)
    assert done.returncode == 2 and "write output=FILE to name" in done.stderr and output.read_text() == "precious\n"
    output.unlink()
    assert predict(run, *arguments).returncode == 0
    before = output.read_bytes()
    others = write_jsonl(tmp_path / "other.jsonl", labelled(6, seed=9))
    fewer = write_jsonl(tmp_path / "fewer.jsonl", labelled(5))
    for changes, expected in (
        (["--input", str(others)], "out.jsonl, line 1 is not the prediction for"),
        (["--input", str(fewer)], "more lines than the input has records"),
        ([*arguments[:2], "--too-long", "refuse"], "too_long=truncate"),
    ):
        done = predict(run, *arguments[2:], *changes)
        assert done.returncode == 2 and expected in done.stderr, done.stderr
        assert output.read_bytes() == before
    done = predict(decoder_base, "--input", str(source))
    assert done.returncode == 2 and "was pretrained and has no task" in done.stderr
    done = bigtx("generate", str(run), "--prompt", "a")
    assert done.returncode == 2 and "bigtx predict prints the class" in done.stderr


def test_a_classifier_as_a_base_keeps_its_head_for_the_same_classes_alone(run: Path, tmp_path: Path) -> None:
    three = [record | ({"label": "awe"} if number % 3 == 0 else {}) for number, record in enumerate(labelled(30))]
    others = [record | {"label": {"joy": "glad", "woe": "sad"}[record["label"]]} for record in labelled(30)]
    for name, records, is_kept in (("same", labelled(30), True), ("others", others, False), ("three", three, False)):
        data = write_jsonl(tmp_path / f"{name}.jsonl", records)
        run_dir = tmp_path / name
        finetuned(f"base={run}", f"data.train=[{data}]", f"run_dir={run_dir}", "train.max_steps=1")
        link = json.loads((run_dir / "base.json").read_text())
        assert "head.classes.weight" in link["loaded" if is_kept else "new"], link
        assert link["dropped"] == ([] if is_kept else ["head.classes.weight"])


def test_a_table_on_a_terminal(run: Path, tmp_path: Path) -> None:
    """Of the width of the terminal; elsewhere JSON lines."""
    source = write_jsonl(tmp_path / "in.jsonl", [*labelled(3), {"text": "ba \x1b[31m\n木木木木 " * 9}, {"words": 1}])
    terminal = Terminal("predict", str(run), "--input", str(source), columns=60)
    lines = [line for line in terminal.all().splitlines() if not line.startswith("[")]
    assert lines[0].split() == ["answer", "confidence", "text"] and len(lines) == 1 + 5 + 2, lines
    predicted = package.load(run).predict(labelled(3))
    for line, prediction, record in zip(lines[1:4], predicted, labelled(3), strict=True):
        answer, confidence, text = line.split(maxsplit=2)
        assert answer == prediction["label"] and confidence == f"{max(prediction['probabilities'].values()):.1%}"
        assert record["text"].startswith(text.removesuffix("…")) and text
    assert "\\x1b[31m 木木木" in lines[4] and lines[4].endswith("…") and lines[5].startswith("(error) ")
    assert all(width(line) <= 60 for line in lines[:6]), lines
    terminal = Terminal("predict", str(run), "--text", "ba be", "--text", "bi", "--json")
    assert [json.loads(line)["text"] for line in terminal.all().splitlines() if line[0] == "{"] == ["ba be", "bi"]


def test_texts_of_the_command_line(run: Path, tmp_path: Path) -> None:
    done = predict(run, "--text", "ba be", "--text", "bi")
    assert done.returncode == 0, done.stderr
    lines = objects(done.stdout)
    assert [line["text"] for line in lines] == ["ba be", "bi"]
    expected = [prediction["label"] for prediction in package.load(run).predict(["ba be", "bi"])]
    assert [line["prediction"]["label"] for line in lines] == expected
    for arguments in ([], ["--text", "a", "--input", "-"]):
        done = predict(run, *arguments)
        assert done.returncode == 2 and "one of them says what to predict for" in done.stderr


@pytest.mark.parametrize(
    ("redirection", "unbuffered"),
    [
        (">&-", ""),
        (">/dev/full", "1"),
        pytest.param(">&-", "1", marks=pytest.mark.slow),
        pytest.param(">/dev/full", "", marks=pytest.mark.slow),
    ],
)
def test_answers_that_cannot_be_written(run: Path, redirection: str, unbuffered: str) -> None:
    command = ["bash", "-c", f'exec "$@" {redirection}', "bash", sys.executable, "-m", "bigtx"]
    variables = environment(PYTHONPATH=str(ROOT), PYTHONUNBUFFERED=unbuffered)
    done = subprocess.run(
        [*command, "predict", str(run), "--text", "ba"], capture_output=True, text=True, env=variables
    )
    assert done.returncode == 1 and "standard output cannot be written" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and "Exception" not in done.stderr


def test_another_tokenizer_in_the_folder_of_a_run(run: Path, tmp_path: Path) -> None:
    from bigtx.config.schema import TokenizerTrainConfig
    from bigtx.tokenizer.train import train

    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "tokenizer")
    train(TokenizerTrainConfig(vocab_size=512), [row["text"] for row in labelled(40)]).save(copy / "tokenizer")
    for arguments in (["predict", "--text", "ba"], ["evaluate"]):
        done = bigtx(arguments[0], str(copy), *arguments[1:])
        assert done.returncode == 2 and done.stdout == "", done.stdout
        assert f"{copy / 'tokenizer'} is not the tokenizer that" in done.stderr and "Traceback" not in done.stderr


def test_evaluate(run: Path, decoder_base: Path, tmp_path: Path) -> None:
    done = bigtx("evaluate", str(run), "--split", "test", "--wandb", "offline")
    assert done.returncode == 0 and "accuracy" in done.stdout and "as joy" in done.stdout, done.stderr
    found = json.loads((run / "evaluations" / "test.json").read_text())
    at_the_end = json.loads((run / "results.json").read_text())["test"]
    assert found["metrics"]["accuracy"] == at_the_end["accuracy"] and found["records"] == at_the_end["records"]
    assert (run / "evaluations" / "test.wandb" / "wandb_run_id").is_file()
    for changes, name in (
        (["--split", "test"], "test"),
        (["--split", "test", "--set", "chat.temperature=0.5"], "test-2"),
        (["--split", "test"], "test"),
    ):
        done = bigtx("evaluate", str(run), *changes, "--wandb", "off")
        assert f"evaluations/{name}.json" in done.stdout, done.stdout + done.stderr
    done = bigtx("evaluate", str(run), "--wandb", "off")
    assert "measured on the run's own validation records" in done.stderr and done.returncode == 0, done.stderr
    assert re.search(r"accuracy +\d\.\d+\n +largest_class +\d\.\d+\n", done.stdout), done.stdout
    metrics = json.loads((run / "evaluations" / "validation.json").read_text())["metrics"]
    assert metrics["largest_class"] == json.loads((run / "results.json").read_text())["validation"]["largest_class"]
    done = bigtx("evaluate", str(run), "--split", "test", "--output", f"{tmp_path}/results")
    assert done.returncode == 2 and "write output=NAME.json" in done.stderr
    unknown = write_jsonl(tmp_path / "a.jsonl", [*labelled(3), {"text": "ba", "label": "jo"}])
    done = bigtx("evaluate", str(run), "--data", str(unknown), "--wandb", "off")
    assert done.returncode == 1 and "3 records" in done.stdout, "the others are measured"
    assert f"{unknown}, line 4" in done.stderr and "did you mean 'joy'?" in done.stderr
    assert json.loads((run / "evaluations" / "a.json").read_text())["num_failed"] == 1
    unknown.write_text('{"text": "ba", "label": "jo"}\n{"broken\n')
    done = bigtx("evaluate", str(run), "--data", str(unknown), "--wandb", "off")
    assert done.returncode == 2 and "2 records cannot be used" in done.stderr
    done = bigtx("evaluate", str(decoder_base), "--wandb", "off", "--output", f"{tmp_path}/x.json")
    assert done.returncode == 0 and "measured on the run's own validation text" in done.stderr, done.stderr
    assert json.loads((tmp_path / "x.json").read_text())["metrics"].keys() == {
        "a/loss",
        "a/perplexity",
        "a/bits_per_byte",
    }
    (tmp_path / "mine.json").write_text('{"a": 1}')
    before = {path: path.read_bytes() for path in tmp_path.glob("*.json")}
    for name, expected in (("mine", "is not an evaluation"), ("x", f"another evaluation, of {decoder_base}")):
        done = bigtx("evaluate", str(run), "--split", "test", "--output", f"{tmp_path}/{name}.json")
        assert done.returncode == 2 and expected in done.stderr, done.stdout + done.stderr
    assert {path: path.read_bytes() for path in tmp_path.glob("*.json")} == before
    copy = tmp_path / "copy"
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("evaluations"))
    # What W&B needs has a folder of its own, not that of a run of the same name.
    metrics = (copy / "metrics.jsonl").read_bytes()
    done = bigtx("evaluate", str(copy), "--split", "test", "--output", f"{copy}.json", "--wandb", "offline")
    assert done.returncode == 0 and (copy / "metrics.jsonl").read_bytes() == metrics, done.stdout + done.stderr
    config = copy / "config.yaml"
    config.write_text(config.read_text().replace("test_fraction: 0.2", "test_fraction: 0.4"))
    done = bigtx("evaluate", str(copy), "--split", "test", "--wandb", "off")
    assert done.returncode == 2 and "not those of the run" in done.stderr


def test_python_takes_plain_texts(run: Path) -> None:
    loaded = package.load(run)
    texts = [row["text"] for row in labelled(3, seed=4)]
    assert loaded.predict(texts) == loaded.predict([{"text": text} for text in texts])
    for records in ([5], "text", [None]):
        with pytest.raises(DataError, match=r"record 1 is neither|not a list of records"):
            loaded.predict(records)  # type: ignore[arg-type]


def test_a_line_that_is_not_whole_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_bytes(b'{"predicti')
    output = Output(path, dict.fromkeys(Output.MUST_AGREE, "x"))
    with path.open("r+b") as output._file:
        assert output.known([Unread("not JSON")]) is None
    assert path.read_bytes() == b""
