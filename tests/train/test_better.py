"""Which values of a metric are better: the best checkpoint, the end of patience and W&B's summary agree."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bigtx.config.schema import FinetuneConfig, SelectionConfig
from bigtx.finetuning.measure import Measurement
from bigtx.finetuning.tasks import RECORD_TASKS, task_type
from bigtx.finetuning.tasks.task import Examples, Prediction, RecordTask
from bigtx.pretraining.validation import BETTER
from bigtx.track.copier import Copier
from bigtx.train.loop import is_out_of_patience
from bigtx.train.state import RunState

CHOOSING = [
    (name, metric, better)
    for name in RECORD_TASKS
    for metric, better in task_type(name).better.items()
    if better != "neither"
]
VALUES = [2.0, 3.0, 1.0, 2.0]


def make_task(name: str, metric: str) -> RecordTask:
    kind = task_type(name)
    task = kind.__new__(kind)
    config = FinetuneConfig(task=name, validation=SelectionConfig(metric=metric))  # type: ignore[arg-type]
    RecordTask.__init__(task, config, SimpleNamespace())  # type: ignore[arg-type]
    return task


class Scripted(Measurement):
    """Measures what it is given."""

    def measure(self, held_out: Examples, *, in_run: bool = False) -> tuple[dict[str, float], list[Prediction]]:
        return {self.metric: self.values.pop(0)}, []

    def _shown(self, predictions: Any) -> list[dict[str, Any]]:
        return []


class FakeTracker:
    def __init__(self, folder: Path) -> None:
        self.file = folder / "metrics.jsonl"

    def log(self, step: int, tokens: int, metrics: dict[str, float]) -> None:
        with self.file.open("a") as file:
            file.write(json.dumps({"step": step, "tokens": tokens, "time": 0.0, **metrics}) + "\n")

    def message(self, text: str) -> None: ...

    def predictions(self, step: int, tokens: int, rows: Any) -> None: ...


class FakeRun:
    """A W&B run that keeps what it is asked to."""

    def __init__(self) -> None:
        self.kept: dict[str, str] = {}
        self.values: dict[str, list[float]] = {}
        self.summary: dict[str, Any] = {}

    def define_metric(self, name: str, *, step_metric: str, summary: str) -> None:
        self.kept[name] = summary

    def log(self, values: dict[str, Any], step: int, commit: bool) -> None:
        for name, value in values.items():
            self.values.setdefault(name, []).append(value)


def test_every_task_has_metrics_that_can_choose() -> None:
    assert {name for name, _, _ in CHOOSING} == set(RECORD_TASKS)
    directions = {(metric, better) for _, metric, better in CHOOSING} | set(BETTER.items())
    assert len(directions) == len({metric for metric, _ in directions}), "one name, one direction: W&B has one list"


@pytest.mark.parametrize(("name", "metric", "better"), CHOOSING, ids=[f"{each[0]}-{each[1]}" for each in CHOOSING])
def test_all_that_compares_values_agrees(tmp_path: Path, name: str, metric: str, better: str) -> None:
    task, tracker, state = make_task(name, metric), FakeTracker(tmp_path), RunState()
    held_out: Any = SimpleNamespace(records=[1], examples=[1])
    measurement = Scripted(task.config, None, None, task, held_out)  # type: ignore[arg-type]
    measurement.values = list(VALUES)
    best_value, best_step = (min(VALUES), 3) if better == "lower" else (max(VALUES), 2)
    kept = []
    for step in range(1, 5):
        state.step = step
        kept.append(measurement.report(tracker, state))  # type: ignore[arg-type]
    assert kept == ([True, False, True, False] if better == "lower" else [True, True, False, False])
    assert (state.best_value, state.best_step) == (best_value, best_step)
    run: Any = SimpleNamespace(patience=2, state=state)
    assert is_out_of_patience(run) == (better == "higher")

    wandb = FakeRun()
    Copier(wandb, tmp_path, 0, task.better).copy(is_final=True)  # type: ignore[arg-type]
    first, last = wandb.kept[f"validation/{metric}"].split(",")
    assert {"min": min, "max": max}[first](wandb.values[f"validation/{metric}"]) == best_value and last == "last"
    assert set(wandb.kept) == {f"validation/{metric}"}, "the best so far is no series of which one keeps a best"


@pytest.mark.parametrize(
    ("name", "metric"),
    [("classify", "largest_class"), ("preference", "chosen_reward"), ("sft", "bleu"), ("sft", "exact_match")],
)
def test_what_has_no_direction_chooses_nothing(name: str, metric: str) -> None:
    (problem,) = SelectionConfig(metric=metric).problems(name)
    assert re.search(rf"validation\.metric={metric}: .*; write one of .*loss", str(problem))


@pytest.mark.parametrize("group", ["best", "test", "evaluate"])
def test_what_is_measured_once_has_no_best(tmp_path: Path, group: str) -> None:
    FakeTracker(tmp_path).log(1, 1, {f"{group}/loss": 1.0, "validation/books/loss": 1.0, "train/grad_norm": 1.0})
    run = FakeRun()
    Copier(run, tmp_path, 0, BETTER).copy(is_final=True)  # type: ignore[arg-type]
    assert run.kept == {"validation/books/loss": "min,last"}
