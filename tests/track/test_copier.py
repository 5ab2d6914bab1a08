"""What of a run's files reaches W&B, with a run that takes note."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bigtx.track.copier import Copier, Tail


class Taken:
    """A W&B run that keeps what it is given."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, Any]]] = []
        self.defined: dict[str, str] = {}
        self.summary: dict[str, Any] = {}

    def log(self, values: dict[str, Any], step: int, commit: bool) -> None:
        assert commit, "W&B would show the step only when the next one arrives"
        assert not self.rows or step > self.rows[-1][0], "W&B accepts nothing for a step that it has"
        self.rows.append((step, values))

    def define_metric(self, name: str, step_metric: str, summary: str) -> None:
        assert step_metric == "train/tokens" and name not in self.defined
        self.defined[name] = summary


def write(path: Path, *records: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(record) + "\n")


def metrics(step: int, **values: Any) -> dict[str, Any]:
    return {"step": step, "tokens": 100 * step, "time": 1000.0 + step, **values}


def test_a_tail_gives_whole_lines_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tail = Tail(path, lambda record: "step" in record)
    assert tail.read() == []
    write(path, {"step": 1}, {"step": 2})
    assert tail.read(but_last=True) == [{"step": 1}]
    assert tail.read(but_last=True) == []
    path.write_text(path.read_text().replace('{"step": 2}', '{"step": 2, "more": 1}'))
    assert tail.read() == [{"step": 2, "more": 1}] and tail.read() == []
    with path.open("a") as file:
        file.write('{"step": 3}\n{"step"')
    assert tail.read() == [{"step": 3}] and tail.num_damaged == 0
    with path.open("a") as file:
        file.write(': 4}\nno json\n{"x": 1}\n{"step": 5}\n')
    assert tail.read() == [{"step": 4}, {"step": 5}] and tail.num_damaged == 2


def test_a_step_is_sent_once_when_it_is_complete(tmp_path: Path) -> None:
    """W&B accepts nothing more for a step that it has, so a measurement that follows the loss must be in its row."""
    taken = Taken()
    path = tmp_path / "metrics.jsonl"
    write(path, metrics(1, loss=1.0), metrics(2, loss=2.0))
    copier = Copier(taken, tmp_path, first_step=0, better={})  # type: ignore[arg-type]
    copier.copy()
    assert [step for step, _ in taken.rows] == [1] and copier.last_step == 1
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], json.dumps(metrics(2, loss=2.0, validation=0.5))]) + "\n")
    copier.copy()
    copier.copy(is_final=True)
    assert [step for step, _ in taken.rows] == [1, 2] and taken.rows[1][1]["validation"] == 0.5
    later = Copier(Taken(), tmp_path, first_step=3, better={})  # type: ignore[arg-type]
    later.copy(is_final=True)
    assert (later.num_sent, later.last_step) == (0, 2)


@pytest.mark.parametrize("damaged", ['{"step": "many", "tokens": 1, "time": 1}', '{"step": 1}', "no", "[1]", "null"])
def test_damaged_lines_are_counted(tmp_path: Path, damaged: str) -> None:
    for name in ("metrics", "samples", "events"):
        (tmp_path / f"{name}.jsonl").write_text(damaged + "\n")
    write(tmp_path / "metrics.jsonl", metrics(1, a=1.0))
    taken = Taken()
    copier = Copier(taken, tmp_path, first_step=0, better={})  # type: ignore[arg-type]
    copier.copy(is_final=True)
    assert [step for step, _ in taken.rows] == [1] and copier.num_damaged == 3 and taken.summary == {}


def test_metrics_come_with_their_tokens_and_time_in_the_order_of_steps(tmp_path: Path) -> None:
    taken = Taken()
    copier = Copier(taken, tmp_path, first_step=2, better={"loss": "lower", "accuracy": "higher"})  # type: ignore[arg-type]
    write(
        tmp_path / "metrics.jsonl", metrics(1, a=1.0), metrics(3, a=3.0), metrics(2, **{"train/loss": "NaN", "b": "x"})
    )
    copier.copy(is_final=True)
    assert [step for step, _ in taken.rows] == [2, 3]
    (_, second), (_, third) = taken.rows
    assert math.isnan(second.pop("train/loss"))
    assert second == {"b": "x", "train/tokens": 200, "_timestamp": 1002.0}
    assert third == {"a": 3.0, "train/tokens": 300, "_timestamp": 1003.0}
    assert taken.defined == {"train/loss": "min,last"}
    write(tmp_path / "metrics.jsonl", metrics(4, **{"train/loss": "-Infinity", "validation/accuracy": 0.5}))
    copier.copy()
    assert [step for step, _ in taken.rows] == [2, 3]
    copier.copy(is_final=True)
    copier.copy(is_final=True)
    assert [step for step, _ in taken.rows] == [2, 3, 4] and taken.rows[-1][1]["train/loss"] == -math.inf
    assert taken.defined == {"train/loss": "min,last", "validation/accuracy": "max,last"}


def test_events_are_counted_and_the_last_model_is_kept(tmp_path: Path) -> None:
    taken = Taken()
    copier = Copier(taken, tmp_path, first_step=0, better={})  # type: ignore[arg-type]
    path = tmp_path / "events.jsonl"
    copier.copy()
    assert taken.summary == {} and copier.model is None
    write(path, {"kind": "start"}, {"kind": "model", "step": 1}, {"kind": "skipped_step"}, {"kind": "model", "step": 2})
    copier.copy()
    assert copier.model == {"kind": "model", "step": 2}
    write(path, {"kind": "skipped_step"}, {"nothing": 1}, {"kind": 5}, {"kind": "end"})
    copier.copy()
    assert taken.summary == {"events/start": 1, "events/model": 2, "events/skipped_step": 2, "events/end": 1}
    assert copier.model == {"kind": "model", "step": 2}


def test_a_table_has_all_rows_of_its_step_and_the_time_of_its_metrics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def table(columns: list[str], data: list[list[Any]], allow_mixed_types: bool) -> Any:
        assert allow_mixed_types
        return columns, data

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(Table=table))
    taken = Taken()
    copier = Copier(taken, tmp_path, first_step=1, better={"loss": "lower"})  # type: ignore[arg-type]
    path = tmp_path / "predictions.jsonl"

    def row(step: int, **values: Any) -> dict[str, Any]:
        return {"step": step, "tokens": 100 * step, "time": 5.0, **values}

    write(tmp_path / "metrics.jsonl", metrics(1, a=1.0))
    write(path, row(1, input="x", answer=["y", {"z": 1}]), row(2, input="u"), row(2, answer="v"))
    copier.copy()
    assert taken.rows == []
    write(tmp_path / "metrics.jsonl", metrics(3, a=3.0))
    write(path, row(3, input="w"))
    copier.copy()
    name = "validation/predictions"
    first = (["step", "tokens", "input", "answer"], [[1, 100, "x", '["y", {"z": 1}]']])
    assert taken.rows == [(1, {"a": 1.0, name: first, "train/tokens": 100, "_timestamp": 1001.0})]
    copier.copy(is_final=True)
    second = (["step", "tokens", "input", "answer"], [[2, 200, "u", None], [2, 200, None, "v"]])
    third = (["step", "tokens", "input"], [[3, 300, "w"]])
    assert taken.rows[1:] == [
        (2, {name: second, "train/tokens": 200, "_timestamp": 5.0}),
        (3, {"a": 3.0, name: third, "train/tokens": 300, "_timestamp": 1003.0}),
    ]


def test_steps_that_are_made_again_are_not_copied_again(tmp_path: Path) -> None:
    """The run returns to step 2 and writes other values. W&B keeps its value of step 3; it does not have step 4 yet."""
    path, run = tmp_path / "metrics.jsonl", Taken()
    copier = Copier(run, tmp_path, 0, {})  # type: ignore[arg-type]
    write(path, *(metrics(step, x=step) for step in (1, 2, 3, 4)))
    copier.copy()
    other = tmp_path / "other"
    write(other, *(metrics(step, x=-step) for step in (1, 2, 3)))
    other.replace(path)
    copier.copy()
    write(path, *(metrics(step, x=-step) for step in (4, 5)))
    copier.copy(is_final=True)
    assert [(step, values["x"]) for step, values in run.rows] == [(1, 1), (2, 2), (3, 3), (4, -4), (5, -5)]
