"""Predictions for records by one process, for `bigtx predict`, `bigtx evaluate` and `LoadedModel.predict`.

This module and the tasks do not import deepspeed, which prints to standard output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from bigtx.config.load import with_settings
from bigtx.config.schema import FinetuneConfig, RunConfig
from bigtx.data.records.record import BadRecordError, Record
from bigtx.finetuning.tasks.task import Example, Model, Prediction, RecordTask, public
from bigtx.utils.errors import ConfigError, DataError

BATCH_SIZE = 32
"""The default number of records in a batch."""
Result = TypeVar("Result")
MAX_SHOWN = 300
"""The maximum number of characters of a record in a table of predictions."""


@dataclass(frozen=True)
class Outcome:
    """The result for a record.

    Attributes:
        prediction: the prediction; None if the record could not be used.
        error: why the record could not be used, or "".
        num_cut: tokens that were left out because the record was too long.
    """

    prediction: Prediction | None
    error: str = ""
    num_cut: int = 0


def predict_records(
    task: RecordTask, model: Model, records: Sequence[Record], *, batch_size: int, device: torch.device
) -> list[Outcome]:
    """Return an outcome for each record; records need no answer, and an answer may be unknown to the model."""
    outcomes = [Outcome(None)] * len(records)
    places, examples = [], []
    for place, record in enumerate(records):
        try:
            examples.append(task.encode(record, for_training=False))
            places.append(place)
        except (BadRecordError, DataError) as error:  # The tokenizer refuses invalid text.
            outcomes[place] = Outcome(None, f"{record.where}: {error}")
    predictions = predict_all(task, model, examples, batch_size=batch_size, device=device)
    for place, example, prediction in zip(places, examples, predictions, strict=True):
        outcomes[place] = Outcome(public(prediction), num_cut=example.num_cut)
    return outcomes


def predict_all(
    task: RecordTask, model: Model, examples: Sequence[Any], *, batch_size: int, device: torch.device
) -> list[Prediction]:
    """Return a prediction for each example, with what `task.metrics` needs."""
    return by_batches(lambda batch: task.predict(model, batch, device), examples, batch_size)


def by_batches(call: Callable[[list[Any]], list[Result]], examples: Sequence[Any], size: int) -> list[Result]:
    """Return the results of a function of batches, in the order of the examples."""
    batches = list(batches_by_length(examples, size))
    return in_order(batches, [call([examples[place] for place in batch]) for batch in batches], len(examples))


def batches_by_length(examples: Sequence[Example], size: int) -> Iterator[list[int]]:
    """Return the indices of examples in batches of similar length, the longest first, so that a lack of memory shows at
    once."""
    order = sorted(range(len(examples)), key=lambda place: -examples[place].length)
    return (order[begin : begin + size] for begin in range(0, len(order), size))


def evenly_spaced(total: int, count: int) -> list[int]:
    """Return at most `count` places of `total`."""
    count = min(count, total)
    return [number * total // count for number in range(count)]


def in_order(batches: Sequence[list[int]], parts: Sequence[list[Result]], total: int) -> list[Result]:
    """Return the results of batches in the order of the examples."""
    found: dict[int, Result] = {}
    for batch, part in zip(batches, parts, strict=True):
        found.update(zip(batch, part, strict=True))
    return [found[place] for place in range(total)]


def shown_predictions(
    task: RecordTask, records: Sequence[Record], predictions: Sequence[Prediction], count: int
) -> list[dict[str, Any]]:
    """Return some evenly spaced predictions with their records, for a table."""
    rows = []
    for place in evenly_spaced(len(predictions), count):
        record, prediction = records[place], predictions[place]
        text = task.shown(record)
        shown = text if len(text) <= MAX_SHOWN else text[:MAX_SHOWN] + " ..."
        rows.append({"record": record.where, "input": shown, "answer": task.answer(record), **public(prediction)})
    return rows


def task_config(config: RunConfig, run: str, settings: Sequence[str] = ()) -> FinetuneConfig:
    """Return the config of a run that has a task.

    Args:
        run: the run as the user named it.
        settings: KEY=VALUE, settings of the task's predictions, of the fields of records, and of long records.

    Raises:
        ConfigError: the run was pretrained, or a setting does not affect predictions.
    """
    if not isinstance(config, FinetuneConfig):
        what = (
            "it is an encoder; `bigtx finetune` trains it for a task"
            if config.model.shape == "encoder"
            else f"bigtx generate {run} continues texts; `bigtx finetune` trains it for a task"
        )
        raise ConfigError(f"{run} was pretrained and has no task to predict for: {what}")
    if not settings:
        return config
    return with_settings(config, settings, sections=(config.task, "chat"), also=("data.fields", "data.too_long"))
