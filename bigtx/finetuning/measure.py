"""Measurement of a model on a task: all ranks predict records with answers, and the predictions give the metrics.

Validation within a run and the measurement at its end use this module; `bigtx evaluate` does the same in one process.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from bigtx.config.schema import FinetuneConfig
from bigtx.engine.engine import Engine
from bigtx.engine.ranks import Ranks
from bigtx.finetuning.predictions import batches_by_length, in_order, shown_predictions
from bigtx.finetuning.tasks.task import Examples, Model, Prediction, RecordTask
from bigtx.track.tracker import Tracker
from bigtx.train.state import RunState
from bigtx.utils.errors import ConfigError

Predict = Callable[[Model, Sequence[Any], torch.device], list[Prediction]]
"""A task's `predict` or `predict_in_run`."""
Result = TypeVar("Result")


class Measurement:
    """The measurement of a run's model on its validation records."""

    def __init__(
        self, config: FinetuneConfig, engine: Engine, ranks: Ranks, task: RecordTask, held_out: Examples
    ) -> None:
        self.config, self.engine, self.ranks, self.task = config, engine, ranks, task
        limit = config.validation.max_records or len(held_out.records)
        # Evenly spaced, so that all classes are measured if the records are sorted by class.
        total = len(held_out.records)
        places = [number * total // min(limit, total) for number in range(min(limit, total))]
        self.held_out = Examples(
            [held_out.records[place] for place in places], [held_out.examples[place] for place in places]
        )
        self.metric = task.chosen_by

    def report(self, tracker: Tracker, state: RunState) -> bool:
        """Measure and report, and return whether the model is the best so far."""
        if not self.held_out.records:
            return False
        measured = self.measure(self.held_out, in_run=True)
        metrics = {f"validation/{name}": value for name, value in measured[0].items()}
        if self.metric not in measured[0]:
            raise ConfigError(
                f"validation.metric={self.metric!r} is not measured during a run of task={self.config.task}; these "
                f"are: {', '.join(measured[0])}"
            )
        value = measured[0][self.metric]
        # A measurement before the first step is reported, but is never the best: no checkpoint holds that model.
        is_best = state.step > 0 and state.judge(value, lower=self.task.better[self.metric] == "lower")
        if state.best_value is not None:
            metrics[f"validation/best_{self.metric}"] = state.best_value
        tracker.log(state.step, state.tokens, metrics)
        shown = ", ".join(f"{name} {number:.4f}" for name, number in measured[0].items())
        tracker.message(f"validation at step {state.step}: {shown}{' (the best so far)' if is_best else ''}")
        tracker.predictions(state.step, state.tokens, self._shown(measured[1]))
        return is_best

    @torch.no_grad()
    def _shown(self, predictions: Sequence[Prediction]) -> list[dict[str, Any]]:
        """Return some predictions with their records; the task predicts again if `predict_in_run` has no text."""
        records, total = self.held_out.records, len(self.held_out.records)
        if not self.task.shows_by_predict:
            return shown_predictions(self.task, records, predictions, self.num_examples)
        count = min(self.num_examples, total)
        places = [number * total // count for number in range(count)]
        shown = [self.held_out.examples[place] for place in places]
        made = self._predict(shown, self.task.predict, generates=self.task.generates)
        return shown_predictions(self.task, [records[place] for place in places], made, count)

    @property
    def num_examples(self) -> int:
        """Return the number of predictions to show."""
        return self.config.validation.num_examples

    @torch.no_grad()
    def measure(self, held_out: Examples, *, in_run: bool = False) -> tuple[dict[str, float], list[Prediction]]:
        """Return the metrics, and the predictions in the order of the records, on every rank.

        Args:
            in_run: whether to use the task's cheaper `predict_in_run`.
        """
        self.engine.deepspeed.eval()
        task = self.task
        predict, generates = (task.predict_in_run, task.generates_in_run) if in_run else (task.predict, task.generates)
        predictions = self._predict(held_out.examples, predict, generates=generates)
        # All ranks use rank 0's metrics: rounding differences could make ranks decide differently.
        metrics = self.ranks.from_first(self.task.metrics(predictions) if self.ranks.rank == 0 else None)
        return metrics, predictions

    def _predict(self, examples: Sequence[Any], predict: Predict, *, generates: bool) -> list[Prediction]:
        size = self.config.train.micro_batch_size
        return by_all_ranks(self.engine, self.ranks, examples, predict, batch_size=size, generates=generates)


def by_all_ranks(
    engine: Engine,
    ranks: Ranks,
    examples: Sequence[Any],
    predict: Callable[[Model, Sequence[Any], torch.device], list[Result]],
    *,
    batch_size: int,
    generates: bool = False,
) -> list[Result]:
    """Call `predict` on all examples, divided among the ranks, and return all results on every rank. Every rank must
    call it.

    Args:
        generates: whether `predict` makes a varying number of forward passes, instead of exactly one.
    """

    together = engine.stage == 3 and generates
    model = _with_logits_of_first(engine.deepspeed) if together else engine.deepspeed

    def of_batch(batch: list[int]) -> list[Result]:
        return predict(model, [examples[place] for place in batch], engine.device)

    batches = list(batches_by_length(examples, batch_size))
    if together:
        # Texts end at different steps, and every rank is needed at each step: all ranks generate the same texts.
        return in_order(batches, [of_batch(batch) for batch in batches], len(examples))
    mine = batches[ranks.rank :: ranks.world_size]
    if engine.stage == 3 and len(mine) < -(-len(batches) // ranks.world_size):
        mine.append(batches[-1])  # Every rank must make the same number of passes; a duplicate is harmless.
    gathered = ranks.gather((mine, [of_batch(batch) for batch in mine]))
    return in_order(
        [batch for own, _ in gathered for batch in own],
        [part for _, parts in gathered for part in parts],
        len(examples),
    )


def _with_logits_of_first(model: Model) -> Model:
    """Return the model with rank 0's logits on every rank, since rounding differences could change when ranks stop."""

    def forward(*args: Any, **inputs: Any) -> Any:
        found = model(*args, **inputs)
        if isinstance(found, torch.Tensor):
            dist.broadcast(found, src=0)
        return found

    return forward
