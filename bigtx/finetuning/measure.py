"""What all ranks compute of records together: measurements, and the numbers of the reference model.

All ranks predict records with answers, and the predictions give the metrics. Validation within a run and the
measurement at its end use this module; `bigtx evaluate` does the same in one process.

The reference model is the model before the first step. All ranks compute its numbers for each example once, in a file
of the run folder, and every later start of the run reads them; if the file is missing, they are computed again from the
base. They are valid only for the same records, settings and base.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from bigtx.config.schema import FinetuneConfig
from bigtx.engine.engine import Engine
from bigtx.engine.ranks import Ranks
from bigtx.finetuning.predictions import batches_by_length, evenly_spaced, in_order, shown_predictions
from bigtx.finetuning.tasks.task import Examples, Model, Prediction, RecordTask
from bigtx.track.tracker import Tracker
from bigtx.train.state import RunState
from bigtx.utils.errors import ConfigError, writes
from bigtx.utils.files import write_atomic
from bigtx.utils.heartbeat import beat

Predict = Callable[[Model, Sequence[Any], torch.device], list[Prediction]]
"""A task's `predict` or `predict_in_run`."""
Result = TypeVar("Result")
Reference = dict[str, np.ndarray]
"""fp64 [examples, numbers] by split."""
REFERENCE = "reference.safetensors"


class Measurement:
    """The measurement of a run's model on its validation records."""

    def __init__(
        self, config: FinetuneConfig, engine: Engine, ranks: Ranks, task: RecordTask, held_out: Examples
    ) -> None:
        self.config, self.engine, self.ranks, self.task = config, engine, ranks, task
        total = len(held_out.records)
        # Evenly spaced, so that all classes are measured if the records are sorted by class.
        places = evenly_spaced(total, config.validation.max_records or total)
        self.held_out = Examples(
            [held_out.records[place] for place in places], [held_out.examples[place] for place in places]
        )
        self.metric = task.chosen_by
        self.num_examples = config.validation.num_examples

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
        records = self.held_out.records
        if not self.task.shows_by_predict:
            return shown_predictions(self.task, records, predictions, self.num_examples)
        places = evenly_spaced(len(records), self.num_examples)
        shown = [self.held_out.examples[place] for place in places]
        made = self._predict(shown, self.task.predict, generates=self.task.generates)
        return shown_predictions(self.task, [records[place] for place in places], made, len(places))

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
        beat()
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


def make_reference(
    engine: Engine, ranks: Ranks, task: RecordTask, splits: Mapping[str, Sequence[Any]], batch_size: int
) -> Reference:
    """Compute the numbers of all examples with the current model, on every rank; every rank must call it."""
    engine.deepspeed.eval()
    return {
        name: np.array(by_all_ranks(engine, ranks, examples, task.refer, batch_size=batch_size), np.float64)
        for name, examples in splits.items()
        if examples
    }


def reference_key(**facts: Any) -> str:
    """Return a hash of everything that determines a reference."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def read_reference(folder: Path, wanted: str) -> Reference | None:
    """Return the reference of a run folder, or None if it is missing, damaged or of another key.

    Args:
        wanted: the result of `reference_key`.
    """
    path = folder / REFERENCE
    try:
        with safe_open(path, framework="numpy") as file:
            facts = file.metadata() or {}
            values = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - a file, not a dict
    except (OSError, SafetensorError):
        return None
    return values if facts.get("key") == wanted and facts.get("sha256") == _digest(values) else None


def write_reference(folder: Path, wanted: str, values: Reference) -> None:
    """Write a reference into the run folder.

    Raises:
        LaunchError: the folder cannot be written.
    """
    path = folder / REFERENCE
    with writes(path):
        write_atomic(path, save(values, metadata={"key": wanted, "sha256": _digest(values)}))


def _digest(values: Reference) -> str:
    digest = hashlib.sha256()
    for name in sorted(values):
        digest.update(name.encode() + values[name].tobytes())
    return digest.hexdigest()
