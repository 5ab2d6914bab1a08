"""Classification of a text or of a pair of texts.

encoder    </s> text </s> [ pair </s> ]     pooled by the first token or the mean
decoder    </s> text </s> [ pair </s> ]     pooled by the last token, which attends to all others

These are the special ids of tokenizers that bigtx trains; the tokenizer of an imported model has its own, such as
[CLS] text [SEP] pair [SEP].
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F

from bigtx.config.schema import FinetuneConfig, ModelConfig
from bigtx.config.schema.tasks import METRICS
from bigtx.data.records.record import BadRecordError, Broken, Record
from bigtx.finetuning.tasks.batch import Batch, ids_of, padding_segments, pinned
from bigtx.finetuning.tasks.task import Examples, Lengths, Model, Prediction, RecordTask, some_ids
from bigtx.model.layers import pooling_weights
from bigtx.model.loss import IGNORED, Loss
from bigtx.tokenizer.tokenizer import Tokenizer
from bigtx.utils.errors import DataError
from bigtx.utils.units import format_names

NO_LABEL = -1
MAX_LISTED = 12
"""The number of classes that a message names."""
CALIBRATION_BINS = 15
"""The number of bins, of equal width as in arXiv:1706.04599."""


@dataclass(frozen=True, slots=True)
class TextExample:
    """A text as ids.

    Attributes:
        ids: the ids, special ones included.
        types: 0 or 1 for each id, as the tokenizer defines it: usually 1 for ids of the pair.
        label: the number of the class, or NO_LABEL.
        num_cut: the number of ids that were left out.
    """

    ids: np.ndarray
    types: np.ndarray
    label: int
    num_cut: int

    @property
    def length(self) -> int:
        """Return the number of tokens."""
        return len(self.ids)


class Classify(RecordTask):
    """The task of classifying texts."""

    metric = "accuracy"
    better = METRICS["classify"]

    def __init__(self, config: FinetuneConfig, tokenizer: Tokenizer) -> None:
        super().__init__(config, tokenizer)
        self.settings = config.classify
        self.classes = list(config.classify.classes)
        self.number = {name: number for number, name in enumerate(self.classes)}
        self.pooling = config.classify.pooling
        self.has_types = config.model.num_token_types > 1
        self.class_weights = np.ones(len(self.classes), np.float32)

    @classmethod
    def resolve(cls, config: FinetuneConfig, tokenizer: Tokenizer, records: Sequence[Record]) -> FinetuneConfig:
        """Return the config with the names of the classes, the number of logits, and the pooling.

        Raises:
            DataError: there are fewer than two classes.
        """
        shape, settings = config.model.shape, config.classify
        classes = settings.classes or _classes_of(records, config)
        head, pooling = config.model.class_head, settings.pooling
        if head is None and config.model.num_classes is None:
            head = _class_head(config.model)
        if pooling == "auto":
            pooling = "last" if shape == "decoder" else "first" if head == "pooler" else "mean"
        return dataclasses.replace(
            config,
            classify=dataclasses.replace(settings, classes=classes, pooling=pooling),
            model=dataclasses.replace(config.model, num_classes=len(classes), class_head=head),
        )

    @classmethod
    def group_of(cls, record: Record, config: FinetuneConfig) -> Any:
        """Return the class of a record."""
        return _label(record, config)

    def review(self, splits: Mapping[str, Examples]) -> list[str]:
        """Return a line with the numbers of records of each class, and warnings about missing classes."""
        counts = {
            name: Counter(example.label for example in split.examples)
            for name, split in splits.items()
            if split.examples
        }
        shown = [
            f"{name!r} {' + '.join(f'{found[number]:,}' for found in counts.values())}"
            for number, name in enumerate(self.classes)
        ]
        said = [f"{len(self.classes):,} classes, records of each ({' + '.join(counts)}): {format_names(shown, 24)}"]
        for split, found in counts.items():
            without = [repr(name) for number, name in enumerate(self.classes) if not found[number]]
            if without:
                what = ", which the model cannot learn" if split == "train" else ""
                said.append(f"warning: classes without a {split} record: {format_names(without, MAX_LISTED)}{what}")
        return said

    def begin(self, examples: Sequence[TextExample]) -> None:
        """Give each class of the training examples the same total weight, if the config says so."""
        if self.settings.balance:
            counts = Counter(example.label for example in examples)
            for label, count in counts.items():
                self.class_weights[label] = len(examples) / (len(counts) * count)

    @property
    def text_field(self) -> str | None:
        """Return the field of the text; None if the task reads pairs."""
        return None if self.fields.pair else self.fields.text

    def encode(self, record: Record, *, for_training: bool = True) -> TextExample:
        """Encode a text or a pair of texts."""
        texts = [(self.fields.text, record.text(self.fields.text, setting="data.fields.text"))]
        if self.fields.pair:
            texts.append((self.fields.pair, record.text(self.fields.pair, setting="data.fields.pair")))
        sides = [some_ids(self.tokenizer, name, text) for name, text in texts]
        num_special, total = self.tokenizer.num_special(len(sides)), sum(map(len, sides))
        self.require_length(num_special + len(sides))
        limits = _limits([len(side) for side in sides], self.max_length - num_special)
        sides = [self.cut(side, limit, self.settings.truncate) for side, limit in zip(sides, limits, strict=True)]
        ids, types = self.tokenizer.join(*sides)
        label = self._number(record, for_training)
        return TextExample(np.array(ids, np.int32), np.array(types, np.int8), label, total - sum(map(len, sides)))

    def _number(self, record: Record, is_needed: bool) -> int:
        if not is_needed:
            return self.number.get(_label(record, self.config) or "", NO_LABEL)
        name = _needed_label(record, self.config)
        if name not in self.number:
            similar = difflib.get_close_matches(name, self.classes, 1, 0.6)
            known = format_names(list(map(repr, self.classes)), MAX_LISTED)
            hint = f"did you mean {similar[0]!r}?" if similar else f"there are {known}"
            raise BadRecordError(
                f"the class {name!r} is unknown to the model: no training record has it, or classify.classes does not "
                f"name it; {hint}"
            )
        return self.number[name]

    def collate(self, examples: Sequence[TextExample], numbers: Sequence[int] | None = None) -> Batch:
        """Return a batch of texts."""
        tokens = self.padded([example.ids for example in examples], self.tokenizer.pad_id)
        lengths = np.array([len(example.ids) for example in examples])
        labels = np.array([example.label if example.label >= 0 else IGNORED for example in examples])
        weights = np.where(labels >= 0, self.class_weights[np.maximum(labels, 0)], 0).astype(np.float32)
        return Batch(
            tokens=tokens,
            segment_ids=padding_segments(lengths, tokens.shape[1]),
            token_types=self.padded([example.types for example in examples], 0) if self.has_types else None,
            pool=pinned(pooling_weights(self.pooling, lengths, tokens.shape[1])),
            labels=pinned(labels.astype(np.int64)),
            weights=pinned(weights),
            num_tokens=int(lengths.sum()),
            sequence_ids=ids_of(numbers),
        )

    def loss(self, model: Model, batch: Batch) -> Loss:
        """Return the cross-entropy in nats; the reported loss is without smoothing and weights."""
        assert batch.weights is not None
        logits = model(**batch.inputs(labels=False))
        losses = functools.partial(F.cross_entropy, logits, batch.labels, ignore_index=IGNORED, reduction="none")
        plain, smoothed = losses(), losses(label_smoothing=self.settings.label_smoothing)
        return Loss((smoothed * batch.weights).sum(), plain.detach().sum())

    @torch.no_grad()
    def predict(self, model: Model, examples: Sequence[TextExample], device: torch.device) -> list[Prediction]:
        """Return the most likely class, and the probability of each class."""
        batch = self.collate(examples).to(device)
        probabilities = model(**batch.inputs(labels=False)).double().softmax(dim=-1).cpu().numpy()
        found = []
        for example, row in zip(examples, probabilities, strict=True):
            prediction: Prediction = {
                "label": self.classes[int(row.argmax())],
                "probabilities": {name: float(value) for name, value in zip(self.classes, row, strict=True)},
            }
            found.append(prediction | ({"_label": example.label} if example.label >= 0 else {}))
        return found

    def metrics(self, predictions: Sequence[Prediction]) -> dict[str, float]:
        """Return the accuracy, the share of the largest class (the accuracy of always predicting that class), macro F1,
        the mean cross-entropy in nats, and the expected calibration error."""
        labels, probabilities, matrix = self._arrays(predictions)
        of_label = np.maximum(probabilities[np.arange(len(labels)), labels], np.finfo(np.float64).tiny)
        return {
            "accuracy": float(np.trace(matrix) / max(1, matrix.sum())),
            "largest_class": float(matrix.sum(axis=1).max() / max(1, matrix.sum())),
            "macro_f1": macro_f1(matrix),
            "loss": float(-np.log(of_label).mean()),
            "calibration_error": calibration_error(probabilities, labels),
        }

    def tables(self, predictions: Sequence[Prediction]) -> dict[str, list[dict[str, Any]]]:
        """Return the confusion matrix: the number of records by true and predicted class."""
        *_, matrix = self._arrays(predictions)
        return {
            "confusion": [
                {"class": name} | {f"as {other}": int(count) for other, count in zip(self.classes, row, strict=True)}
                for name, row in zip(self.classes, matrix, strict=True)
            ]
        }

    def _arrays(self, predictions: Sequence[Prediction]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the labels, the probabilities of the classes, and the confusion matrix."""
        labels = np.array([prediction["_label"] for prediction in predictions])
        rows = np.array([[each["probabilities"][name] for name in self.classes] for each in predictions])
        return labels, rows, confusion(labels, rows.argmax(axis=1), len(self.classes))

    def answer(self, record: Record) -> str:
        """Return the name of the record's class."""
        return _label(record, self.config) or ""

    def lengths(self, examples: Sequence[TextExample]) -> Lengths:
        """Return the mean tokens of a text, in the model's only stack."""
        mean = self.mean_tokens(examples)
        return Lengths(0, mean, 0) if self.config.model.shape == "decoder" else Lengths(mean, 0, 0)


def _class_head(model: ModelConfig) -> Literal["transform", "pooler", "score"]:
    """Return the form of the head in the most similar family of Hugging Face models, so that export is possible."""
    if model.shape == "decoder":
        return "score"
    return "pooler" if model.norm_placement == "post" else "transform"


def _limits(lengths: Sequence[int], limit: int) -> list[int]:
    """Return the most tokens of each of one or two texts, `limit` together: the longer text is cut, as in BERT."""
    if len(lengths) == 1:
        return [limit]
    first = max(limit - lengths[1], min(lengths[0], limit - limit // 2))
    return [first, limit - first]


def _label(record: Record, config: FinetuneConfig) -> str | None:
    """Return the name of a record's class, a text or a whole number, without surrounding spaces; else None."""
    value = record.value(config.data.fields.label)
    if isinstance(value, bool) or not isinstance(value, str | int):
        return None
    return str(value).strip() or None


def _needed_label(record: Record, config: FinetuneConfig) -> str:
    """Return the name of a record's class, as `_label`.

    Raises:
        BadRecordError: the record has no class.
    """
    name = config.data.fields.label
    label, value = _label(record, config), record.value(name)
    if label is not None:
        return label
    if value is None:
        raise record.missing(name, setting="data.fields.label")
    if isinstance(value, str):
        raise BadRecordError(f"the field {name!r} of the class is empty")
    shown = json.dumps(value, ensure_ascii=False, default=str)
    raise BadRecordError(
        f"the field {name!r} is {shown[:40]} ({type(value).__name__}), and a class is a text or a whole number, e.g. "
        f'"yes" or 1; see data.fields.label'
    )


def _classes_of(records: Sequence[Record], config: FinetuneConfig) -> list[str]:
    """Return the classes of training records, sorted.

    Raises:
        DataError: there are fewer than two.
    """
    classes, broken = set(), Broken()
    for record in records:
        try:
            classes.add(_needed_label(record, config))
        except BadRecordError as error:
            broken.add(record.file, record.line, str(error))
    if len(classes) < 2:
        broken.check()
        found = f"one class, {classes.pop()!r}" if classes else "no classes"
        raise DataError(
            f"the training records have {found}, and the task needs two or more; data.fields.label names the field "
            "of the class"
        )
    return sorted(classes)


def confusion(labels: np.ndarray, predicted: np.ndarray, num_classes: int) -> np.ndarray:
    """Return the confusion matrix, int64 [classes, classes]: rows are true classes, columns predicted ones."""
    matrix = np.zeros((num_classes, num_classes), np.int64)
    np.add.at(matrix, (labels, predicted), 1)
    return matrix


def macro_f1(matrix: np.ndarray) -> float:
    """Return the mean over classes of 2 TP / (2 TP + FP + FN), without classes that neither occur nor are predicted."""
    hits = np.diag(matrix)
    total = matrix.sum(axis=0) + matrix.sum(axis=1)
    present = total > 0
    return float((2 * hits[present] / total[present]).mean()) if present.any() else 0.0


def calibration_error(probabilities: np.ndarray, labels: np.ndarray, num_bins: int = CALIBRATION_BINS) -> float:
    """Return the expected calibration error (arXiv:1706.04599, equation 3): the mean gap of confidence and accuracy.

    Args:
        probabilities: fp64 [N, classes].
        labels: int [N].
    """
    confidence, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    bins = np.clip(np.ceil(confidence * num_bins).astype(int) - 1, 0, num_bins - 1)
    gaps = np.bincount(bins, weights=right - confidence, minlength=num_bins)
    return float(np.abs(gaps).sum() / max(1, len(labels)))
