"""What a task is: what it makes of records, its loss, its predictions, and how good these are.

    Record ──encode──▶ Example ──collate──▶ batch ──loss──▶ training
                          └──────predict──▶ Prediction ──metrics──▶ validation, `bigtx evaluate`
                                                └────────────────▶ `bigtx predict`

All that a task has learned of its training records (the names of the classes) is in the config that `resolve` returns,
so a run's config.yaml says all that prediction needs.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from bigtx.config.schema import FinetuneConfig
from bigtx.data.audio.decode import AudioPlace
from bigtx.data.audio.look import Found
from bigtx.data.records.record import BadRecordError, Record
from bigtx.engine.task import TaskLoss
from bigtx.tokenizer.tokenizer import Tokenizer
from bigtx.track.tracker import Better
from bigtx.utils.errors import ConfigError

Look = Callable[[Iterable[AudioPlace]], Mapping[AudioPlace, Found]]
"""See `bigtx.data.audio.look.look_at`."""
Model = Callable[..., Any]
"""A Transformer, or an engine around one."""
Prediction = dict[str, Any]
"""What is predicted for a record, ready for JSON."""
LENGTH_MULTIPLE = 16
"""Batches are padded to a multiple of so many columns, so that there are few shapes."""


class Example(Protocol):
    """A record made ready: a task's own kind of object."""

    @property
    def length(self) -> int:
        """Records of like length are batched together: tokens, or frames of sound."""
        ...

    @property
    def num_cut(self) -> int:
        """Tokens that were left out because the record was too long."""
        ...


@dataclass(frozen=True)
class Examples:
    """Records of one split, and what the task made of them, in the same order."""

    records: list[Record]
    examples: list[Any]

    @property
    def num_cut(self) -> int:
        """Records that were too long."""
        return sum(example.num_cut > 0 for example in self.examples)


class Lengths(NamedTuple):
    """Columns that a record takes, for the count of arithmetic."""

    source: float
    """Of the encoder; 0 without one."""
    target: float
    """Of the decoder; 0 without one."""
    predicted: float
    """Columns whose logits are made."""
    num_rows: int = 1
    """Rows of these lengths that an example takes."""


class RecordTask(ABC):
    """A task on records. `E` below is its kind of example."""

    metric: ClassVar[str]
    """What the best checkpoint is best in, if the config does not say: a key of `better`."""
    better: ClassVar[Mapping[str, Better]]
    """Every name that `metrics` gives, and which of two values is the better one. All that compares values of a metric
    reads it here: the best checkpoint, the end for lack of progress, W&B's summary."""
    generates: ClassVar[bool] = False
    """Whether predictions are written token by token, so that ranks take different numbers of passes."""

    def __init__(self, config: FinetuneConfig, tokenizer: Tokenizer) -> None:
        """Args:
            config: what `resolve` returned.

        Raises:
            ConfigError: validation.metric cannot choose a checkpoint of the task.
        """
        self.config, self.tokenizer = config, tokenizer
        self.fields = config.data.fields
        self.max_length = config.data.max_length or config.model.max_sequence_length
        self.num_sides = 1
        """Texts of a record that share the model's length, each of which may have `max_length`."""
        self.chosen_by = self._chosen_by()
        """The metric that the best checkpoint is best in."""

    @property
    def text_field(self) -> str | None:
        """The field whose text is all that a prediction needs of a record; None: it needs more, or no text."""
        return None

    shows_by_predict: ClassVar[bool] = False
    """Whether `predict_in_run` leaves out what people want to see of predictions, so that the shown ones are made anew.
    """
    needs_reference: ClassVar[bool] = False
    """Whether training compares the model with what it was before the first step: see `refer`."""

    @property
    def limit(self) -> str:
        """What longer records are cut to, for messages."""
        return f"{self.max_length:,} tokens (data.max_length)"

    @classmethod
    def resolve(cls, config: FinetuneConfig, tokenizer: Tokenizer, records: Sequence[Record]) -> FinetuneConfig:
        """The config with all that follows from the training records and from the tokenizer.

        Raises:
            ConfigError: the model cannot do the task.
            DataError: the records do not fit it.
        """
        return dataclasses.replace(config, model=dataclasses.replace(config.model, num_classes=None, class_head=None))

    @classmethod
    def group_of(cls, record: Record, config: FinetuneConfig) -> Any:
        """The group of a record, of each of which the last are held out where data.split=tail; None: all are one."""
        return None

    def look_ahead(self, records: Iterable[Record], look: Look) -> None:  # noqa: B027 - most have nothing to do
        """Take in, before records are encoded, what only the whole of the files that they name can tell.

        Args:
            look: decodes recordings, or remembers that they were decoded before.
        """

    def review(self, splits: Mapping[str, Examples]) -> list[str]:
        """What users should know of the records before training, a line each.

        Args:
            splits: all examples of a run, by the name of their split.

        Raises:
            DataError: too many of the records are of no use.
        """
        return []

    def begin(self, examples: Sequence[Any]) -> None:  # noqa: B027 - most have nothing to do
        """Take in what training needs to know of the training examples."""

    @abstractmethod
    def encode(self, record: Record, *, for_training: bool = True) -> Any:
        """The record's example.

        Args:
            for_training: whether the answer must be there; otherwise it is taken along where there is one.

        Raises:
            BadRecordError: it is none of this task's.
        """

    def pack(self, examples: Sequence[Any]) -> list[Any]:
        """What training takes for one record each: the examples, or rows of several that `collate` knows too. A pure
        function of the examples and the config, so that a run resumes."""
        return list(examples)

    @abstractmethod
    def collate(self, examples: Sequence[Any], numbers: Sequence[int] | None = None) -> Any:
        """A micro batch, on the CPU: with `num_labels`, `num_tokens` and `to(device)`.

        Args:
            numbers: of the records in the run, from which all that is drawn follows; None: nothing is drawn.
        """

    @abstractmethod
    def loss(self, model: Model, batch: Any) -> TaskLoss:
        """The loss of a micro batch, summed over its labels: the same for a row whatever stands beside it."""

    @abstractmethod
    def predict(self, model: Model, examples: Sequence[Any], device: torch.device) -> list[Prediction]:
        """A prediction for each example. With `generates` False exactly one pass of the model, for any batch.

        An example that has its answer gives what `metrics` needs of it too, under keys that begin with "_".
        """

    def predict_in_run(self, model: Model, examples: Sequence[Any], device: torch.device) -> list[Prediction]:
        """What validation within a run takes: as `predict`, or something cheaper of which `metrics` can tell enough."""
        return self.predict(model, examples, device)

    @property
    def generates_in_run(self) -> bool:
        """As `generates`, of `predict_in_run`."""
        return self.generates

    def refer(self, model: Model, examples: Sequence[Any], device: torch.device) -> list[tuple[float, ...]]:
        """Numbers of each example, as many for all, that training needs of the model as it was before the first step.
        Exactly one pass of the model. With `needs_reference` alone."""
        raise NotImplementedError

    def with_reference(self, example: Any, numbers: tuple[float, ...]) -> Any:
        """The example with what `refer` gave for it."""
        raise NotImplementedError

    @abstractmethod
    def metrics(self, predictions: Sequence[Prediction]) -> dict[str, float]:
        """Metrics by name, without group, of predictions for examples that have answers."""

    def tables(self, predictions: Sequence[Prediction]) -> dict[str, list[dict[str, Any]]]:
        """More of what was measured, as rows by name, e.g. a confusion matrix."""
        return {}

    def mean_tokens(self, examples: Sequence[Any]) -> float:
        """Of an example, as `num_tokens` of a batch counts them."""
        return float(np.mean([example.length for example in examples]))

    @abstractmethod
    def lengths(self, examples: Sequence[Any]) -> Lengths:
        """Mean columns of an example."""

    def shown(self, record: Record) -> str:
        """The record in a few words, for tables of predictions."""
        return str(record.fields.get(self.fields.text, ""))

    def answer(self, record: Record) -> str:
        """The record's own answer, for tables of predictions; "" where it has none."""
        return ""

    def _chosen_by(self) -> str:
        name = self.config.validation.metric or self.metric
        if self.better.get(name, "neither") != "neither":
            return name
        usable = [each for each, better in self.better.items() if better != "neither"]
        raise ConfigError(
            f"validation.metric={name!r} cannot tell which checkpoint of task={self.config.task} is the best; these "
            f"can: {', '.join(usable)}"
        )

    @property
    def length_setting(self) -> str:
        """The setting that `max_length` comes from."""
        return "data.max_length" if self.config.data.max_length else "model.max_sequence_length"

    def require_length(self, smallest: int) -> None:
        """Do nothing if a record may be long enough to say something.

        Args:
            smallest: least tokens in which a record of this task has some of each of its texts.

        Raises:
            ConfigError: `max_length` is less.
        """
        if self.max_length >= smallest:
            return
        setting, given = self.length_setting, self.max_length
        if setting == "model.max_sequence_length":
            given, smallest = self.config.model.max_sequence_length, smallest * self.num_sides
        raise ConfigError(
            f"{setting}={given} leaves no room for the texts of task={self.config.task}, since ends, roles and "
            f"prefixes take tokens too; the smallest value of use is {setting}={smallest}"
        )

    def cut(self, ids: list[int], limit: int, where: str = "end") -> list[int]:
        """At most `limit` ids: without the last, the first, or the middle ones.

        Raises:
            BadRecordError: there are more, and data.too_long=refuse.
        """
        if len(ids) <= limit:
            return ids
        if self.config.data.too_long == "refuse":
            raise BadRecordError(
                f"{len(ids):,} tokens, and {limit:,} are allowed (data.max_length); data.too_long=truncate cuts them"
            )
        if where == "start":
            return ids[-limit:]
        if where == "middle":
            head = limit // 2
            return ids[:head] + ids[len(ids) - (limit - head) :]
        return ids[:limit]


def listed(names: Sequence[str], most: int = 12) -> str:
    """The first of some names, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most:,} more" if len(names) > most else "")


def some_ids(tokenizer: Tokenizer, name: str, text: str) -> list[int]:
    """The ids of a text that stands in a field of a record.

    Raises:
        BadRecordError: there are none: a tokenizer may drop, for example, characters that are not seen.
    """
    ids = tokenizer.encode(text)
    if not ids:
        raise BadRecordError(f"the tokenizer makes no token of the field {name!r}: {text[:40]!r}")
    return ids


def padded(rows: Sequence[Sequence[int] | np.ndarray], fill: int, *, multiple: int = 1) -> Tensor:
    """int64 [B, T]: rows of different lengths, filled up on the right to the longest, or to a multiple of something."""
    length = -(-max((len(row) for row in rows), default=0) // multiple) * multiple
    result = np.full((len(rows), length), fill, np.int64)
    for place, row in enumerate(rows):
        result[place, : len(row)] = row
    return pinned(result)


Tensors = TypeVar("Tensors")


def on_device(batch: Tensors, device: torch.device) -> Tensors:
    """A dataclass of tensors on a device, copied without waiting where their memory is pinned."""
    moved: dict[str, Any] = {
        name: part.to(device, non_blocking=True) for name, part in vars(batch).items() if torch.is_tensor(part)
    }
    return dataclasses.replace(batch, **moved)  # type: ignore[type-var]


def ids_of(numbers: Sequence[int] | None) -> Tensor | None:
    """int64 [B]: the numbers of the rows in the run, if anything is drawn by them."""
    return None if numbers is None else pinned(np.array(numbers, np.int64))


def pinned(array: np.ndarray) -> Tensor:
    """The array as a tensor, in memory from which a GPU copies without waiting if there is one."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory() if torch.cuda.is_available() else tensor


def public(prediction: Mapping[str, Any]) -> Prediction:
    """A prediction without what is for `metrics` alone."""
    return {key: value for key, value in prediction.items() if not key.startswith("_")}
