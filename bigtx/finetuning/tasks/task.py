"""The base of all tasks: their examples, loss, predictions and metrics.

    Record ──encode──▶ Example ──collate──▶ batch ──loss──▶ training
                          └──────predict──▶ Prediction ──metrics──▶ validation, `bigtx evaluate`
                                                └────────────────▶ `bigtx predict`

The config that `resolve` returns holds everything that a task derives from its training records (the names of the
classes), so a run's config.yaml is enough for prediction.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from bigtx.config.schema import FinetuneConfig
from bigtx.config.schema.tasks import Better
from bigtx.data.recordings import AudioPlace, Found
from bigtx.data.records.record import BadRecordError, Record
from bigtx.finetuning.tasks.batch import Batch, padded, padded_length
from bigtx.model import beam
from bigtx.model.loss import Loss
from bigtx.tokenizer.tokenizer import Tokenizer
from bigtx.utils.errors import ConfigError

Look = Callable[[Iterable[AudioPlace]], Mapping[AudioPlace, Found]]
"""See `bigtx.data.recordings.look_at`."""
Model = Callable[..., Any]
"""A Transformer, or an engine around one."""
Prediction = dict[str, Any]
"""The prediction for a record, ready for JSON."""


class Example(Protocol):
    """An encoded record; each task has its own class."""

    @property
    def length(self) -> int:
        """Return the length by which records are batched: tokens, or columns of a recording."""
        ...

    @property
    def num_cut(self) -> int:
        """Return the number of tokens that were left out because the record was too long."""
        ...


@dataclass(frozen=True)
class Examples:
    """Records of one split and their examples, in the same order."""

    records: list[Record]
    examples: list[Any]

    @property
    def num_cut(self) -> int:
        """Return the number of records that were too long."""
        return sum(example.num_cut > 0 for example in self.examples)


class Lengths(NamedTuple):
    """Numbers of columns of an example, for the count of FLOPs."""

    source: float
    """Columns of the encoder; 0 without one."""
    target: float
    """Columns of the decoder; 0 without one."""
    predicted: float
    """Columns whose logits are computed."""
    num_rows: int = 1
    """Rows of these lengths in an example."""


class RecordTask(ABC):
    """A task on records. `E` below is its kind of example."""

    metric: ClassVar[str]
    """The default metric that selects the best checkpoint: a key of `better`."""
    better: ClassVar[Mapping[str, Better]]
    """Whether lower or higher is better, for every name that `metrics` returns. Everything that compares metrics uses
    it: the best checkpoint, validation.patience, and W&B's summary."""
    generates: ClassVar[bool] = False
    """Whether predictions are generated token by token, so that ranks make different numbers of forward passes."""

    def __init__(self, config: FinetuneConfig, tokenizer: Tokenizer) -> None:
        """Args:
        config: the result of `resolve`.
        """
        self.config, self.tokenizer = config, tokenizer
        self.fields = config.data.fields
        self.max_length = config.data.max_length or config.model.max_sequence_length
        self.num_sides = 1
        """Texts of a record that share the model's length, each with at most `max_length` tokens."""
        self.chosen_by = config.validation.metric or self.metric
        """The metric that selects the best checkpoint."""

    text_from: ClassVar[str] = ""
    """The member of data.fields whose text is enough for a prediction; "" if a prediction needs other fields."""

    @property
    def text_field(self) -> str | None:
        """Return the field whose text is enough for a prediction; None if a prediction needs other fields."""
        return getattr(self.fields, self.text_from) if self.text_from else None

    shows_by_predict: ClassVar[bool] = False
    """Whether `predict_in_run` omits the texts of predictions, so that shown ones are made by `predict`."""
    needs_reference: ClassVar[bool] = False
    """Whether training compares the model with its state before the first step: see `refer`."""

    @property
    def limit(self) -> str:
        """Return the maximum length of records, for messages."""
        return f"{self.max_length:,} tokens (data.max_length)"

    @classmethod
    def resolve(cls, config: FinetuneConfig, tokenizer: Tokenizer, records: Sequence[Record]) -> FinetuneConfig:
        """Return the config with everything that follows from the training records and from the tokenizer.

        Raises:
            ConfigError: the model cannot do the task.
            DataError: the records do not fit the task.
        """
        return dataclasses.replace(config, model=dataclasses.replace(config.model, num_classes=None, class_head=None))

    @classmethod
    def group_of(cls, record: Record, config: FinetuneConfig) -> Any:
        """Return the group of a record: with data.split=tail the last records of each group are held out. None for a
        single group."""
        return None

    def look_ahead(self, records: Iterable[Record], look: Look) -> None:  # noqa: B027 - most have nothing to do
        """Examine the files that records name, before the records are encoded.

        Args:
            look: decodes recordings, unless an earlier start of the run did.
        """

    def review(self, splits: Mapping[str, Examples]) -> list[str]:
        """Return lines with statistics and warnings about the records, before training.

        Args:
            splits: all examples of a run, by the name of their split.

        Raises:
            DataError: too many records are useless.
        """
        return []

    def begin(self, examples: Sequence[Any]) -> None:  # noqa: B027 - most have nothing to do
        """Compute what training needs from all training examples."""

    @abstractmethod
    def encode(self, record: Record, *, for_training: bool = True) -> Any:
        """Encode a record.

        Args:
            for_training: whether the answer is required; otherwise it is encoded if there is one.

        Raises:
            BadRecordError: the record cannot be used for this task.
        """

    def pack(self, examples: Sequence[Any]) -> list[Any]:
        """Return the rows of training: the examples, or rows of several examples, which `collate` accepts too. The
        result depends only on the examples and the config, so that a run can resume."""
        return list(examples)

    @abstractmethod
    def collate(self, examples: Sequence[Any], numbers: Sequence[int] | None = None) -> Batch:
        """Return a micro batch on the CPU.

        Args:
            numbers: the numbers of the records in the run, which determine all random draws; None to draw nothing.
        """

    @abstractmethod
    def loss(self, model: Model, batch: Batch) -> Loss:
        """Return the loss of a micro batch, summed over its labels. A row's loss is independent of the other rows."""

    @abstractmethod
    def predict(self, model: Model, examples: Sequence[Any], device: torch.device) -> list[Prediction]:
        """Return a prediction for each example. Unless `generates`, this makes exactly one forward pass for any batch.

        The prediction for an example with an answer also has what `metrics` needs, under keys that begin with "_".
        """

    def predict_in_run(self, model: Model, examples: Sequence[Any], device: torch.device) -> list[Prediction]:
        """Return predictions for validation within a run: as `predict`, or cheaper ones that suffice for `metrics`."""
        return self.predict(model, examples, device)

    @property
    def generates_in_run(self) -> bool:
        """Return whether `predict_in_run` generates, as `generates` does for `predict`."""
        return self.generates

    def best_texts(
        self, forward: Model, prompts: Sequence[list[int]], limits: list[int], search: beam.Beam, device: torch.device
    ) -> list[beam.Found]:
        """Return the best text after each prompt, of at most as many tokens as its limit; see `beam_search`."""
        return beam.beam_search(
            forward,
            self.config.model,
            prompts,
            max_new_tokens=limits,
            beam=search,
            end_ids=self.tokenizer.end_ids,
            num_ids=self.tokenizer.vocab_size,
            start_id=self.tokenizer.pad_id,
            device=device,
        )

    def refer(self, model: Model, examples: Sequence[Any], device: torch.device) -> list[tuple[float, ...]]:
        """Return the numbers of each example that training needs from the model before the first step, the same number
        for each. This makes exactly one forward pass. Only tasks with `needs_reference` implement it."""
        raise NotImplementedError

    def with_reference(self, example: Any, numbers: tuple[float, ...]) -> Any:
        """Return the example with the numbers that `refer` returned for it."""
        raise NotImplementedError

    @abstractmethod
    def metrics(self, predictions: Sequence[Prediction]) -> dict[str, float]:
        """Return metrics by name, without group, of predictions for examples with answers."""

    def tables(self, predictions: Sequence[Prediction]) -> dict[str, list[dict[str, Any]]]:
        """Return further results as tables by name, e.g. a confusion matrix."""
        return {}

    def mean_tokens(self, examples: Sequence[Any]) -> float:
        """Return the mean tokens of an example, as `num_tokens` of a batch counts them."""
        return float(np.mean([example.length for example in examples]))

    @abstractmethod
    def lengths(self, examples: Sequence[Any]) -> Lengths:
        """Return the mean columns of an example."""

    def shown(self, record: Record) -> str:
        """Return a short text of the record, for tables of predictions."""
        return str(record.value(self.text_field or self.fields.text) or "")

    def answer(self, record: Record) -> str:
        """Return the record's own answer, for tables of predictions; "" if it has none."""
        return ""

    @property
    def length_setting(self) -> str:
        """Return the setting that `max_length` comes from."""
        return "data.max_length" if self.config.data.max_length else "model.max_sequence_length"

    def require_length(self, smallest: int) -> None:
        """Check that `max_length` is enough for the texts of a record.

        Args:
            smallest: the fewest tokens with which a record of this task has a part of each of its texts.

        Raises:
            ConfigError: `max_length` is smaller.
        """
        if self.max_length >= smallest:
            return
        setting, given = self.length_setting, self.max_length
        if setting == "model.max_sequence_length":
            given, smallest = self.config.model.max_sequence_length, smallest * self.num_sides
        raise ConfigError(
            f"{setting}={given} leaves no tokens for the texts of task={self.config.task}, since ends, roles and "
            f"prefixes need tokens too; the smallest value of use is {setting}={smallest}"
        )

    def cut(self, ids: list[int], limit: int, where: str = "end") -> list[int]:
        """Return at most `limit` ids, without those at the end, the start, or the middle.

        Raises:
            BadRecordError: there are more ids, and data.too_long=refuse.
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

    def padded(self, rows: Sequence[Sequence[int] | np.ndarray], fill: int, *, are_short: bool = False) -> Tensor:
        """Pad rows on the right to a common length of which there are few; return int64 [B, T].

        Args:
            are_short: whether padding costs a CPU more than many shapes.
        """
        if are_short and not torch.cuda.is_available():
            return padded(rows, fill)
        longest = max((len(row) for row in rows), default=0)
        return padded(rows, fill, length=padded_length(longest, self.config.model.max_sequence_length))


def some_ids(tokenizer: Tokenizer, name: str, text: str) -> list[int]:
    """Encode the text of a record's field.

    Raises:
        BadRecordError: the text has no tokens: a tokenizer may drop, for example, invisible characters.
    """
    ids = tokenizer.encode(text)
    if not ids:
        raise BadRecordError(f"the tokenizer makes no token of the field {name!r}: {text[:40]!r}")
    return ids


def public(prediction: Mapping[str, Any]) -> Prediction:
    """Return a prediction without the keys that are only for `metrics`."""
    return {key: value for key, value in prediction.items() if not key.startswith("_")}
