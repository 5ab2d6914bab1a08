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

    def log(self, values: dict[str, Any], step: int) -> None:
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


def test_a_tail_gives_whole_lines_once_and_a_rewritten_last_line_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tail = Tail(path)
    assert tail.read() == []
    write(path, {"step": 1}, {"step": 2})
    assert tail.read() == [{"step": 1}, {"step": 2}]
    assert tail.read() == []
    lines = path.read_text()
    path.write_text(lines.replace('{"step": 2}', '{"step": 2, "more": 1}'))
    assert tail.read() == [{"step": 2, "more": 1}]
    with path.open("a") as file:
        file.write('{"step": 3}\n{"step"')
    assert tail.read() == [{"step": 3}]
    with path.open("a") as file:
        file.write(': 4}\nno json\n{"step": 5}\n')
    assert tail.read() == [{"step": 4}, {"step": 5}]
    path.write_text(path.read_text().replace('{"step": 5}', '{"step": 5, "x": 1}') + '{"step": 6}\n')
    assert tail.read() == [{"step": 5, "x": 1}, {"step": 6}]


def test_metrics_come_with_their_tokens_and_time_in_the_order_of_steps(tmp_path: Path) -> None:
    taken = Taken()
    copier = Copier(taken, tmp_path, first_step=2, better={"loss": "lower", "accuracy": "higher"})  # type: ignore[arg-type]
    write(
        tmp_path / "metrics.jsonl", metrics(1, a=1.0), metrics(3, a=3.0), metrics(2, **{"train/loss": "NaN", "b": "x"})
    )
    copier.copy()
    assert [step for step, _ in taken.rows] == [2, 3]
    (_, second), (_, third) = taken.rows
    assert math.isnan(second.pop("train/loss"))
    assert second == {"b": "x", "train/tokens": 200, "_timestamp": 1002.0}
    assert third == {"a": 3.0, "train/tokens": 300, "_timestamp": 1003.0}
    assert taken.defined == {"train/loss": "min,last"}
    write(tmp_path / "metrics.jsonl", metrics(4, **{"train/loss": "-Infinity", "validation/accuracy": 0.5}))
    copier.copy()
    copier.copy()
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
    write(path, {"kind": "skipped_step"}, {"nothing": 1}, {"kind": "end"})
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
    write(path, row(1, input="x", answer=["y", {"z": 1}]), row(2, input="u"))
    copier.copy()
    name = "validation/predictions"
    columns = ["step", "tokens", "input", "answer"]
    assert taken.rows == [
        (1, {"a": 1.0, "train/tokens": 100, "_timestamp": 1001.0}),
        (1, {name: (columns, [[1, 100, "x", '["y", {"z": 1}]']]), "train/tokens": 100, "_timestamp": 1001.0}),
        (2, {name: (["step", "tokens", "input"], [[2, 200, "u"]]), "train/tokens": 200, "_timestamp": 5.0}),
    ]
    write(path, row(2, answer="v"))
    copier.copy()
    (step, values) = taken.rows[-1]
    assert (step, values[name]) == (2, (columns, [[2, 200, "u", None], [2, 200, None, "v"]]))
    write(path, row(3, input="w"))
    copier.copy()
    assert taken.rows[-1][1][name] == (["step", "tokens", "input"], [[3, 300, "w"]])
