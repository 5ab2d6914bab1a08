from __future__ import annotations

import io
import json
from pathlib import Path
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
    assert tracker.wandb_mode == "off" and tracker.wandb_run_id == ""
    assert not (tmp_path / "wandb").exists()


def test_beginning_anew_and_resuming(tmp_path: Path) -> None:
    for resumed_step, last_step in ((0, 4), (0, 6), (5, 8)):
        tracker = make_tracker(tmp_path, resumed_step=resumed_step)
        for step in range(resumed_step, last_step + 1):
            tracker.log(step, step, {"train/loss": 1.0})
        tracker.close("stopped")
    assert [line["step"] for line in read(tmp_path / "metrics.jsonl")] == list(range(9))
    assert len(read(tmp_path / "events.jsonl")) == 3


@pytest.mark.parametrize("rank", [1, 7])
def test_other_ranks_do_nothing(tmp_path: Path, rank: int) -> None:
    stream = io.StringIO()
    tracker = make_tracker(tmp_path, stream, rank=rank)
    tracker.log(1, 100, {"train/loss": 2.5})
    tracker.samples(1, 100, [{"prompt": "", "completion": ""}])
    tracker.event(1, "skip")
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

    monkeypatch.setattr("bigtx.track.tracker.WandbRun", FakeRun)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    for changes in ({}, {setting: value}):
        facts: dict[str, Any] = {"run_config": {}, "environment": {}, "rank": 0, "total_steps": 1, "better": {}}
        Tracker(tmp_path, TrackConfig(**changes), **facts)
    usual, other = ({"wandb": task["mode"], **task["init"]} for task in tasks)
    assert {name for name in usual if usual[name] != other[name]} == {setting} and other[setting] == value
