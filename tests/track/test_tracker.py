from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bigtx.config.schema import TrackConfig
from bigtx.track import Tracker


def make_tracker(folder: Path, stream: io.StringIO | None = None, **options: Any) -> Tracker:
    facts: dict[str, Any] = {"run_config": {}, "environment": {}, "rank": 0, "total_steps": 10, "better": {}, **options}
    return Tracker(folder, TrackConfig(wandb="off"), stream=stream, **facts)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_end_stands_at_the_step_that_was_saved(tmp_path: Path) -> None:
    tracker = make_tracker(tmp_path)
    tracker.log(20, 2000, {"train/loss": 2.5})
    tracker.close("stopped", 22)
    (end,) = read(tmp_path / "events.jsonl")
    assert (end["kind"], end["status"], end["step"]) == ("end", "stopped", 22)


def test_all_that_a_run_says(tmp_path: Path) -> None:
    stream = io.StringIO()
    tracker = make_tracker(tmp_path, stream)
    tracker.log(1, 100, {"train/loss": 2.5})
    tracker.log(1, 100, {"validation/books/loss": 2.0})
    tracker.samples(1, 100, [{"prompt": "def ", "completion": "f(x):\n  pass\x1b[2J"}])
    tracker.event(1, "config_change", key="optimizer.learning_rate", old=1e-3, new=1e-4, api_key="abcdefgh")
    tracker.message("hello")
    tracker.close("finished")
    tracker.close("failed")
    tracker.log(2, 200, {})
    (line,) = read(tmp_path / "metrics.jsonl")
    assert line.pop("time") > 0
    assert line == {"step": 1, "tokens": 100, "train/loss": 2.5, "validation/books/loss": 2.0}
    (sample,) = read(tmp_path / "samples.jsonl")
    assert (sample["prompt"], sample["completion"]) == ("def ", "f(x):\n  pass\x1b[2J")
    change, end = read(tmp_path / "events.jsonl")
    assert (change["kind"], change["new"], change["api_key"]) == ("config_change", 1e-4, "<hidden>")
    assert (end["kind"], end["status"]) == ("end", "finished")
    assert "  def ▸f(x):\n    pass\\x1b[2J\n" in stream.getvalue()
    assert tracker._wandb is None and tracker.wandb_run_id == ""
    assert not (tmp_path / "wandb").exists()


def test_beginning_anew_and_resuming(tmp_path: Path) -> None:
    for resumed_step, last_step in ((0, 4), (0, 6), (5, 8)):
        tracker = make_tracker(tmp_path, resumed_step=resumed_step)
        for step in range(resumed_step, last_step + 1):
            tracker.log(step, step, {"train/loss": 1.0})
        tracker.close("stopped")
    assert [line["step"] for line in read(tmp_path / "metrics.jsonl")] == list(range(9))
    assert len(read(tmp_path / "events.jsonl")) == 3


def test_predictions_and_the_model_are_recorded(tmp_path: Path) -> None:
    tracker = make_tracker(tmp_path)
    tracker.predictions(3, 300, [])
    tracker.samples(3, 300, [])
    tracker.predictions(3, 300, [{"input": "x", "label": "a"}, {"input": "y", "label": "b"}])
    tracker.model(4, tmp_path / "checkpoints" / "step-00000004", "abc")
    tracker.close("finished")
    rows = read(tmp_path / "predictions.jsonl")
    assert all(row.pop("time") > 0 for row in rows)
    assert rows == [
        {"step": 3, "tokens": 300, "input": "x", "label": "a"},
        {"step": 3, "tokens": 300, "input": "y", "label": "b"},
    ]
    assert read(tmp_path / "samples.jsonl") == []
    model, end = read(tmp_path / "events.jsonl")
    assert (model["kind"], model["step"], model["manifest_sha256"]) == ("model", 4, "abc")
    assert model["checkpoint"] == str(tmp_path / "checkpoints" / "step-00000004")
    assert (end["kind"], end["step"]) == ("end", 4)  # Where nothing else is said, as many steps as were told last.


def test_a_resumed_run_loses_what_it_does_again_but_no_event(tmp_path: Path) -> None:
    for resumed_step in (0, 2):
        tracker = make_tracker(tmp_path, resumed_step=resumed_step)
        for step in (1, 2, 3):
            if step > resumed_step:
                tracker.log(step, step, {"life": resumed_step})
                tracker.samples(step, step, [{"prompt": "p", "completion": str(resumed_step)}])
                tracker.predictions(step, step, [{"life": resumed_step}])
        tracker.event(3, "kept")
        tracker.close("stopped")
    assert [(line["step"], line["life"]) for line in read(tmp_path / "metrics.jsonl")] == [(1, 0), (2, 0), (3, 2)]
    assert [line["completion"] for line in read(tmp_path / "samples.jsonl")] == ["0", "0", "2"]
    assert [line["life"] for line in read(tmp_path / "predictions.jsonl")] == [0, 0, 2]
    assert [line["kind"] for line in read(tmp_path / "events.jsonl")] == ["kept", "end"] * 2


def test_lines_that_are_gone_are_reported_at_a_resume(tmp_path: Path) -> None:
    tracker = make_tracker(tmp_path)
    for step in (1, 2, 3):
        tracker.log(step, step, {"train/loss": 1.0})
    tracker.event(3, "skip")
    tracker.close("stopped")
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))
    stream = io.StringIO()
    saved = {"metrics.jsonl": {"lines": 3}, "samples.jsonl": {"lines": 0}, "events.jsonl": {"lines": 9}}
    make_tracker(tmp_path, stream, resumed_step=3, saved=saved).close("stopped")
    assert f"1 of 3 lines of {path} up to step 3 are missing" in stream.getvalue()
    (found,) = [event for event in read(tmp_path / "events.jsonl") if event["kind"] == "missing_lines"]
    assert (found["file"], found["missing"], found["of"], found["step"]) == ("metrics.jsonl", 1, 3, 3)


def test_what_wandb_is_told_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its id, where it is, how it began; and no secret."""
    tasks: list[dict[str, Any]] = []
    ends: list[str] = []
    polls: list[int] = []

    def run(folder: Path, task: dict[str, Any], show: Any, note: Any) -> Any:
        tasks.append(task)
        return SimpleNamespace(
            mode="offline", poll=lambda: polls.append(1), close=lambda status, **_: ends.append(status)
        )

    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setattr("bigtx.track.wandb_run.WandbRun", run)
    folder = tmp_path / "mine"
    folder.mkdir()
    config = TrackConfig(wandb="offline", project="p", entity="e", group="g", tags=["t"])
    facts: dict[str, Any] = {"rank": 0, "total_steps": 10, "resumed_step": 5, "job_type": "finetune", "better": {}}
    base = {"checkpoint": "c", "manifest_sha256": "m", "step": 1, "wandb_run_id": "w"}
    tracker = Tracker(
        folder, config, run_config={"a": 1, "api_key": "abcdefgh"}, environment={"host": "h"}, base=base, **facts
    )
    (task,) = tasks
    assert (task["mode"], task["resumed_step"], task["base"]) == ("offline", 5, base)
    init = task["init"]
    assert init.pop("config") == {"a": 1, "api_key": "<hidden>", "environment": {"host": "h"}, "base_run": base}
    assert init == {
        "id": tracker.wandb_run_id,
        "dir": str(folder),
        "project": "p",
        "entity": "e",
        "group": "g",
        "tags": ["t"],
        "name": "mine",
        "job_type": "finetune",
    }
    assert tracker.wandb_run_id and tracker._wandb and tracker._wandb.mode == "offline"
    tracker.log(1, 1, {})
    tracker.samples(1, 1, [{"prompt": "", "completion": ""}])
    tracker.predictions(1, 1, [{"label": "a"}])
    tracker.event(1, "skip")
    tracker.progress(1, 1, {})
    assert len(polls) == 5
    tracker.close("stopped")
    assert ends == ["stopped"]
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert Tracker(folder, config, run_config={}, environment={}, **facts)._wandb is None and len(tasks) == 1


def test_a_copy_of_a_run_is_linked_to_the_original(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tasks: list[dict[str, Any]] = []
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setattr("bigtx.track.wandb_run.WandbRun", lambda folder, task, show, note: tasks.append(task))
    first, copy, stream = tmp_path / "first", tmp_path / "copy", io.StringIO()
    first.mkdir()
    facts: dict[str, Any] = {"run_config": {}, "environment": {}, "rank": 0, "total_steps": 10, "better": {}}
    facts["resumed_step"] = 5
    own = Tracker(first, TrackConfig(wandb="offline"), **facts).wandb_run_id
    shutil.copytree(first, copy)
    copied = Tracker(copy, TrackConfig(wandb="offline"), stream=stream, **facts).wandb_run_id
    original = {"wandb_run_id": own, "folder": str(first)}
    base = {"checkpoint": str(first), "manifest_sha256": "", "step": 5, "wandb_run_id": own}
    assert own != copied == tasks[1]["init"]["id"]
    assert tasks[0]["base"] == {} and tasks[0]["init"]["config"] == {"environment": {}}
    assert tasks[1]["base"] == base
    assert tasks[1]["init"]["config"] == {"environment": {}, "copied_from": original, "base_run": base}
    assert f"copy of {first}, whose run there is {own}; the copy is the run {copied}" in stream.getvalue()
    (event,) = read(copy / "events.jsonl")
    assert (event["kind"], event["original"], event["folder"]) == ("wandb_copy", own, str(first))


def test_the_screen_is_shown_how_far_the_run_is(tmp_path: Path) -> None:
    stream = io.StringIO()
    tracker = make_tracker(tmp_path, stream)
    tracker.begin()
    tracker.progress(5, 1200, {"train/loss": 2.5})
    assert stream.getvalue() == "step 5/10  50.0%  1.20k tokens  loss 2.5000\n"
    tracker.log(7, 70, {})
    tracker.close("failed")
    (end,) = read(tmp_path / "events.jsonl")
    assert (end["kind"], end["status"], end["step"]) == ("end", "failed", 7)


@pytest.mark.parametrize("rank", [1, 7])
def test_other_ranks_do_nothing(tmp_path: Path, rank: int) -> None:
    stream = io.StringIO()
    tracker = make_tracker(tmp_path, stream, rank=rank)
    tracker.log(1, 100, {"train/loss": 2.5})
    tracker.samples(1, 100, [{"prompt": "", "completion": ""}])
    tracker.predictions(1, 100, [{"label": "a"}])
    tracker.event(1, "skip")
    tracker.model(1, tmp_path, "abc")
    tracker.begin()
    tracker.progress(1, 100, {})
    tracker.message("hello")
    tracker.close("finished")
    assert list(tmp_path.iterdir()) == []
    assert stream.getvalue() == ""


@pytest.mark.parametrize(
    ("setting", "value"),
    [("project", "other"), ("entity", "team"), ("group", "sweep"), ("tags", ["a", "b"]), ("wandb", "offline")],
)
def test_wandb_is_told_what_the_config_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: str, value: Any
) -> None:
    tasks: list[dict[str, Any]] = []

    class FakeRun:
        def __init__(self, folder: Path, task: dict[str, Any], **calls: Any) -> None:
            tasks.append(task)

    monkeypatch.setattr("bigtx.track.wandb_run.WandbRun", FakeRun)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    for changes in ({}, {setting: value}):
        facts: dict[str, Any] = {"run_config": {}, "environment": {}, "rank": 0, "total_steps": 1, "better": {}}
        Tracker(tmp_path, TrackConfig(**changes), **facts)
    usual, other = ({"wandb": task["mode"], **task["init"]} for task in tasks)
    assert {name for name in usual if usual[name] != other[name]} == {setting} and other[setting] == value
