"""Predictions by several ranks and what is made of them: every example once, in order, and judged the right way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from engine.together import Together

from bigtx.config.schema import FinetuneConfig
from bigtx.data.records.record import BadRecordError
from bigtx.finetuning import measure
from bigtx.finetuning.measure import Measurement, by_all_ranks
from bigtx.finetuning.predictions import (
    MAX_SHOWN,
    Outcome,
    batches_by_length,
    in_order,
    predict_all,
    predict_records,
    shown_predictions,
)
from bigtx.finetuning.tasks.task import Examples
from bigtx.train.state import RunState
from bigtx.utils.errors import ConfigError


@dataclass(frozen=True)
class Example:
    """A number, and how long it is."""

    value: int
    length: int


EXAMPLES = [Example(value, length) for value, length in enumerate((3, 9, 1, 7, 7, 2, 8))]
"""By their length: 1, 6, 3, 4, 0, 5, 2."""


class Task:
    """Predicts numbers; its metrics are their mean and how many there are."""

    better: ClassVar[Mapping[str, str]] = {"mean": "lower", "count": "higher"}
    chosen_by = "mean"
    generates = generates_in_run = shows_by_predict = False

    def __init__(self) -> None:
        self.batches: list[list[int]] = []

    def predict(self, model: Any, examples: Sequence[Example], device: Any) -> list[dict[str, Any]]:
        self.batches.append([example.value for example in examples])
        return [{"number": 10 * example.value} for example in examples]

    def predict_in_run(self, model: Any, examples: Sequence[Example], device: Any) -> list[dict[str, Any]]:
        return [{"number": example.value} for example in examples]

    def metrics(self, predictions: Sequence[dict[str, Any]]) -> dict[str, float]:
        numbers = [prediction["number"] for prediction in predictions]
        return {"mean": sum(numbers) / len(numbers), "count": float(len(numbers))}

    def shown(self, record: Any) -> str:
        return record.text

    def answer(self, record: Any) -> str:
        return f"answer {record.where}"

    def refer(self, model: Any, examples: Sequence[Example], device: Any) -> list[tuple[float, float]]:
        return [(example.value, -example.value) for example in examples]


def engine(stage: int = 0) -> Any:
    return SimpleNamespace(stage=stage, deepspeed=SimpleNamespace(eval=lambda: None), device=torch.device("cpu"))


def test_the_longest_come_first_in_batches_of_like_length() -> None:
    assert list(batches_by_length(EXAMPLES, 3)) == [[1, 6, 3], [4, 0, 5], [2]]
    assert list(batches_by_length([], 3)) == []
    task = Task()
    found = predict_all(task, None, EXAMPLES, batch_size=3, device=torch.device("cpu"))  # type: ignore[arg-type]
    assert found == [{"number": 10 * number} for number in range(7)] and task.batches == [[1, 6, 3], [4, 0, 5], [2]]
    assert in_order([[2, 0], [1]], [["c", "a"], ["b"]], 3) == ["a", "b", "c"]


def test_a_record_that_cannot_be_used_costs_its_own_prediction_alone() -> None:
    class Encoding(Task):
        def encode(self, record: Any, *, for_training: bool) -> Any:
            assert not for_training
            if record.where in ("line 1", "line 4"):
                raise BadRecordError("no text")
            number = int(record.where.removeprefix("line "))
            return SimpleNamespace(value=number, length=number, num_cut=10 - number)

    task: Any = Encoding()
    found = predict_records(task, None, records(6), batch_size=2, device=torch.device("cpu"))  # type: ignore[arg-type]
    expected = [Outcome({"number": 10 * number}, num_cut=10 - number) for number in range(6)]
    for place in (1, 4):
        expected[place] = Outcome(None, f"line {place}: no text")
    assert found == expected and task.batches == [[5, 3], [2, 0]]


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("stage", [0, 3])
def test_every_example_is_predicted_once_and_as_often_by_each_rank_where_weights_are_gathered(
    world_size: int, stage: int
) -> None:
    tasks = [Task() for _ in range(world_size)]

    def one(ranks: Any) -> Any:
        return by_all_ranks(engine(stage), ranks, EXAMPLES, tasks[ranks.rank].predict, batch_size=3)

    found = Together(world_size).run(one)
    assert found == [[{"number": 10 * number} for number in range(7)]] * world_size
    counts = [len(task.batches) for task in tasks]
    if stage == 3:
        assert set(counts) == {-(-3 // world_size)}
    else:
        assert sum(counts) == 3 and max(counts) == -(-3 // world_size)


@pytest.mark.parametrize(("stage", "is_shared"), [(3, True), (2, False)])
def test_texts_are_written_by_all_ranks_together_where_weights_are_gathered(stage: int, is_shared: bool) -> None:
    tasks = [Task(), Task()]

    def one(ranks: Any) -> Any:
        return by_all_ranks(engine(stage), ranks, EXAMPLES, tasks[ranks.rank].predict, batch_size=3, generates=True)

    assert Together(2).run(one) == [[{"number": 10 * number} for number in range(7)]] * 2
    whole = [[1, 6, 3], [4, 0, 5], [2]]
    assert [task.batches for task in tasks] == ([whole, whole] if is_shared else [[whole[0], whole[2]], [whole[1]]])


def test_rank_0s_logits_are_everybodys(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[tuple[Any, int]] = []
    monkeypatch.setattr(measure.dist, "broadcast", lambda tensor, src: sent.append((tensor, src)))
    logits = torch.ones(2)
    answer = measure._with_logits_of_first(lambda *args, **inputs: logits if args else (args, inputs))
    assert answer(1) is logits and answer(x=2) == ((), {"x": 2})
    assert len(sent) == 1 and sent[0][0] is logits and sent[0][1] == 0


def records(count: int) -> list[Any]:
    return [SimpleNamespace(where=f"line {number}", text="x" * (number + MAX_SHOWN - 2)) for number in range(count)]


def test_predictions_are_shown_at_even_distances_with_the_beginning_of_their_text() -> None:
    predictions: Any = [{"number": number} for number in range(10)]
    rows = shown_predictions(Task(), records(10), predictions, 4)  # type: ignore[arg-type]
    assert [row["record"] for row in rows] == ["line 0", "line 2", "line 5", "line 7"]
    assert rows[1] == {
        "record": "line 2",
        "input": "x" * MAX_SHOWN,
        "answer": "answer line 2",
        "number": 2,
    }
    assert rows[2]["input"] == "x" * MAX_SHOWN + " ..."
    assert len(shown_predictions(Task(), records(3), predictions[:3], 9)) == 3  # type: ignore[arg-type]


def measurement(task: Task, **validation: Any) -> Measurement:
    config = FinetuneConfig()
    config.train.micro_batch_size = 2
    task.chosen_by = validation.pop("metric", task.chosen_by)
    for name, value in validation.items():
        setattr(config.validation, name, value)
    ranks = SimpleNamespace(rank=0, world_size=1, gather=lambda value: [value], from_first=lambda value: value)
    examples = [Example(value, 1) for value in range(10)]
    return Measurement(config, engine(), ranks, task, Examples(records(10), examples))  # type: ignore[arg-type]


class Told:
    """A tracker that keeps what it is told."""

    def __init__(self) -> None:
        self.logged: dict[str, float] = {}
        self.lines: list[str] = []
        self.rows: list[dict[str, Any]] = []

    def log(self, step: int, tokens: int, metrics: dict[str, float]) -> None:
        self.logged = {"step": step, "tokens": tokens, **metrics}

    def message(self, text: str) -> None:
        self.lines.append(text)

    def predictions(self, step: int, tokens: int, rows: list[dict[str, Any]]) -> None:
        self.rows = rows


def test_a_part_of_the_records_is_measured_at_even_distances() -> None:
    assert [example.value for example in measurement(Task(), max_records=4).held_out.examples] == [0, 2, 5, 7]
    assert len(measurement(Task(), max_records=None).held_out.examples) == 10
    assert len(measurement(Task(), max_records=99).held_out.examples) == 10


@pytest.mark.parametrize(("metric", "is_best"), [("mean", [True, True, False]), ("count", [True, False, False])])
def test_the_best_is_judged_by_the_metric_and_its_direction(metric: str, is_best: list[bool]) -> None:
    """A lower mean is better, a higher count."""
    made, told, state = measurement(Task(), metric=metric, num_examples=2), Told(), RunState(step=10, tokens=100)
    found = []
    for offset in (5, 2, 9):
        examples = [Example(value + offset, 1) for value in range(10)]
        made.held_out = Examples(made.held_out.records, examples)
        found.append(made.report(told, state))  # type: ignore[arg-type]
    assert found == is_best
    best = 6.5 if metric == "mean" else 10.0
    assert told.logged == {
        "step": 10,
        "tokens": 100,
        "validation/mean": 13.5,
        "validation/count": 10.0,
        f"validation/best_{metric}": best,
    }
    marks = [" (the best so far)" if one else "" for one in is_best]
    assert told.lines[0] == f"validation at step 10: mean 9.5000, count 10.0000{marks[0]}"
    assert told.lines[2] == f"validation at step 10: mean 13.5000, count 10.0000{marks[2]}"
    assert [row["number"] for row in told.rows] == [9, 14]


def test_what_the_model_can_do_before_the_first_step_is_told_and_not_chosen() -> None:
    told, state = Told(), RunState()
    assert not measurement(Task()).report(told, state)  # type: ignore[arg-type]
    assert state.best_value is None and state.measured_since_best == 0
    assert set(told.logged) == {"step", "tokens", "validation/mean", "validation/count"}


def test_without_records_nothing_is_measured_and_a_metric_must_be_the_tasks() -> None:
    made = measurement(Task(), metric="accuracy")
    with pytest.raises(ConfigError, match=r"validation.metric='accuracy' is not measured during a run .*: mean, count"):
        made.report(Told(), RunState(step=1))  # type: ignore[arg-type]
    made.held_out = Examples([], [])
    assert not made.report(Told(), RunState(step=1))  # type: ignore[arg-type]


def test_where_a_cheaper_way_says_nothing_shown_predictions_are_made_anew() -> None:
    task = Task()
    task.shows_by_predict = True  # type: ignore[misc]
    told = Told()
    measurement(task, num_examples=3).report(told, RunState(step=1))  # type: ignore[arg-type]
    assert [(row["record"], row["number"]) for row in told.rows] == [("line 0", 0), ("line 3", 30), ("line 6", 60)]
    assert sorted(value for batch in task.batches for value in batch) == [0, 3, 6]


def test_a_measurement_at_the_end_is_by_the_tasks_own_way() -> None:
    made = measurement(Task())
    metrics, predictions = made.measure(made.held_out)
    assert metrics == {"mean": 45.0, "count": 10.0} and predictions[3] == {"number": 30}


def test_a_reference_counts_only_as_it_was_written_and_for_its_own_inputs(tmp_path: Path) -> None:
    values = {"train": np.array([[1.0, 2.0], [0.1, 1e-300]]), "validation": np.array([[5.0]])}
    own, other = (measure.reference_key(records={"train": "a"}, seed=seed) for seed in (1, 2))
    assert own == measure.reference_key(seed=1, records={"train": "a"}) != other
    assert measure.read_reference(tmp_path, own) is None
    measure.write_reference(tmp_path, own, values)
    found = measure.read_reference(tmp_path, own)
    assert found is not None and set(found) == set(values)
    for name, numbers in values.items():
        assert found[name].dtype == np.float64 and np.array_equal(found[name], numbers)
    assert measure.read_reference(tmp_path, other) is None
    path = tmp_path / measure.REFERENCE
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert measure.read_reference(tmp_path, own) is None
    path.write_bytes(content[:20])
    assert measure.read_reference(tmp_path, own) is None


def test_a_reference_is_what_the_model_says_of_each_example_in_its_order() -> None:
    made: list[bool] = []
    own = engine()
    own.deepspeed.eval = lambda: made.append(True)
    ranks = SimpleNamespace(rank=0, world_size=1, gather=lambda value: [value])
    splits = {"train": EXAMPLES, "validation": EXAMPLES[:2], "test": []}
    found = measure.make_reference(own, ranks, Task(), splits, 3)  # type: ignore[arg-type]
    assert made and set(found) == {"train", "validation"}
    assert found["train"].tolist() == [[float(number), -float(number)] for number in range(7)]
    assert found["validation"].dtype == np.float64 and found["validation"].tolist() == [[0.0, 0.0], [1.0, -1.0]]


@pytest.mark.parametrize("generates", [True, False])
def test_all_ranks_know_whether_texts_are_written(generates: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr(measure, "by_all_ranks", lambda *given, **named: asked.update(named) or ["answer"])
    config = SimpleNamespace(train=SimpleNamespace(micro_batch_size=3))
    measurement: Any = SimpleNamespace(config=config, engine=None, ranks=None)
    predict: Any = None
    assert Measurement._predict(measurement, ["example"], predict, generates=generates) == ["answer"]
    assert asked == {"batch_size": 3, "generates": generates}
