"""How good a model is at a task: predictions for records with answers, by all ranks, and the metrics of them.

In-run validation, the measurement at the end of a run and `bigtx evaluate` are all this.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from bigtx.config.schema import FinetuneConfig
from bigtx.engine.engine import Engine
from bigtx.engine.ranks import Ranks
from bigtx.track.tracker import Tracker
from bigtx.train.examples import Examples
from bigtx.train.state import RunState
from bigtx.train.tasks.task import Model, Prediction, RecordTask, public
from bigtx.utils.errors import ConfigError

Predict = Callable[[Model, Sequence[Any], torch.device], list[Prediction]]
"""A task's `predict` or `predict_in_run`."""
MAX_SHOWN = 300
"""Characters of a record in a table of predictions."""


class Measurement:
    """Measures the model of a run on its validation records, and remembers the best."""

    def __init__(
        self, config: FinetuneConfig, engine: Engine, ranks: Ranks, task: RecordTask, held_out: Examples
    ) -> None:
        self.config, self.engine, self.ranks, self.task = config, engine, ranks, task
        limit = config.validation.max_records or len(held_out.records)
        # At even distances, so that a folder of each class is not one class alone.
        total = len(held_out.records)
        places = [number * total // min(limit, total) for number in range(min(limit, total))]
        self.held_out = Examples(
            [held_out.records[place] for place in places], [held_out.examples[place] for place in places]
        )
        self.metric = config.validation.metric or task.metric

    def report(self, tracker: Tracker, state: RunState) -> bool:
        """Measure, tell, and judge whether this is the best so far."""
        if not self.held_out.records:
            return False
        measured = self.measure(self.held_out, in_run=True)
        metrics = {f"validation/{name}": value for name, value in measured[0].items()}
        if self.metric not in measured[0]:
            raise ConfigError(
                f"validation.metric={self.metric!r} is no metric of task={self.config.task}; it has "
                f"{', '.join(measured[0])}"
            )
        value = measured[0][self.metric]
        is_best = state.judge(value, lower=self.metric in self.task.lower_is_better)
        best = state.best_value if state.best_value is not None else math.nan
        tracker.log(state.step, state.tokens, metrics | {f"validation/best_{self.metric}": best})
        shown = ", ".join(f"{name} {number:.4f}" for name, number in measured[0].items())
        tracker.message(f"validation at step {state.step}: {shown}{' (the best so far)' if is_best else ''}")
        tracker.predictions(
            state.step, state.tokens, shown_predictions(self.task, self.held_out, measured[1], self.num_examples)
        )
        return is_best

    @property
    def num_examples(self) -> int:
        """Predictions that are shown."""
        return self.config.validation.num_examples

    @torch.no_grad()
    def measure(self, held_out: Examples, *, in_run: bool = False) -> tuple[dict[str, float], list[Prediction]]:
        """Metrics, and the predictions in the order of the records, on every rank.

        Args:
            in_run: whether the task may predict in its cheaper way, if it has one.
        """
        self.engine.deepspeed.eval()
        predictions = self._predict(held_out.examples, self.task.predict_in_run if in_run else self.task.predict)
        # One rank's arithmetic for all: a last bit of difference would let ranks judge differently.
        metrics = self.ranks.from_first(self.task.metrics(predictions) if self.ranks.rank == 0 else None)
        return metrics, predictions

    def _predict(self, examples: Sequence[Any], predict: Predict) -> list[Prediction]:
        engine, ranks = self.engine, self.ranks
        batches = list(batches_by_length(examples, self.config.train.micro_batch_size))
        if engine.stage == 3 and self.task.generates:
            # Texts end at different steps, and every rank is needed at each: all write the same ones.
            return in_order(
                batches, [self._predict_batch(examples, batch, predict) for batch in batches], len(examples)
            )
        mine = batches[ranks.rank :: ranks.world_size]
        if engine.stage == 3 and len(mine) < -(-len(batches) // ranks.world_size):
            mine.append(batches[-1])  # Every rank makes as many passes; that it comes twice does no harm.
        gathered = ranks.gather((mine, [self._predict_batch(examples, batch, predict) for batch in mine]))
        return in_order(
            [batch for own, _ in gathered for batch in own],
            [part for _, parts in gathered for part in parts],
            len(examples),
        )

    def _predict_batch(self, examples: Sequence[Any], batch: list[int], predict: Predict) -> list[Prediction]:
        return predict(self.engine.deepspeed, [examples[place] for place in batch], self.engine.device)


def batches_by_length(examples: Sequence[Any], size: int) -> Iterator[list[int]]:
    """Places of examples in batches of like length, the longest first: what does not fit into memory shows at once."""
    order = sorted(range(len(examples)), key=lambda place: -examples[place].length)
    for begin in range(0, len(order), size):
        yield order[begin : begin + size]


def in_order(batches: Sequence[list[int]], parts: Sequence[list[Prediction]], total: int) -> list[Prediction]:
    """The predictions of batches in the order of the examples."""
    found: list[Prediction] = [{}] * total
    for batch, part in zip(batches, parts, strict=True):
        for place, prediction in zip(batch, part, strict=True):
            found[place] = prediction
    return found


def predict_all(
    task: RecordTask, model: Model, examples: Sequence[Any], *, batch_size: int, device: torch.device
) -> list[Prediction]:
    """A prediction for each example, on this process alone."""
    batches = list(batches_by_length(examples, batch_size))
    parts = [task.predict(model, [examples[place] for place in batch], device) for batch in batches]
    return in_order(batches, parts, len(examples))


def shown_predictions(
    task: RecordTask, held_out: Examples, predictions: Sequence[Prediction], count: int
) -> list[dict[str, Any]]:
    """The first predictions beside their records, for a table."""
    rows = []
    total = len(predictions)
    for number in range(min(count, total)):
        place = number * total // min(count, total)
        record, prediction = held_out.records[place], predictions[place]
        text = task.shown(record)
        shown = text if len(text) <= MAX_SHOWN else text[:MAX_SHOWN] + " ..."
        rows.append({"record": record.where, "input": shown, "answer": task.answer(record), **public(prediction)})
    return rows
