"""One text into another: translation, summaries, or any other sequence to sequence.

encoder-decoder    source </s>  ─▶ encoder ─▶ decoder, which begins with padding ─▶ target </s>
decoder            source <0> target </s>           <0>: the tokenizer's first sentinel, or its </s> if it has none

The loss is on the target and its end alone. What is reported of it knows no smoothing.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from bigtx.config.schema import FinetuneConfig
from bigtx.data.records.record import Record
from bigtx.engine.task import TaskLoss
from bigtx.finetuning.tasks.task import (
    LENGTH_MULTIPLE,
    Lengths,
    Model,
    Prediction,
    RecordTask,
    ids_of,
    on_device,
    padded,
    pinned,
    some_ids,
)
from bigtx.model.beam import Beam, Found, beam_search
from bigtx.model.loss import IGNORED
from bigtx.tokenizer.tokenizer import Tokenizer
from bigtx.track.tracker import Better
from bigtx.utils.errors import ConfigError, LaunchError


@dataclass(frozen=True, slots=True)
class PairExample:
    """Two texts as ids.

    Attributes:
        source: int32, what is read, with the end or the separator that follows it.
        target: int32, what is written, with its end; empty where it is not known.
        reference: the target as it came, or "".
        num_cut: ids of both that were too many.
    """

    source: np.ndarray
    target: np.ndarray
    reference: str
    num_cut: int

    @property
    def length(self) -> int:
        """Tokens of the longer side: sorted by it, batches have the least padding on both (10 % on Multi30k, and 20 %
        sorted by the sum)."""
        return max(len(self.source), len(self.target))


@dataclass(frozen=True)
class PairBatch:
    """B pairs, of S source and T target columns; on a decoder one row each, of T columns.

    Attributes:
        tokens: int64 [B, S], or of a decoder both sides [B, T].
        segment_ids: int64 [B, S]: padding is of another segment; None for a decoder.
        target_tokens: int64 [B, T], what the decoder of an encoder-decoder reads; None for a decoder.
        prefix_mask: bool [B, T], the source in a decoder with prefix attention; else None.
        labels: int64 [B, T].
        num_tokens: that are read, padding left out.
        sequence_ids: int64 [B], numbers of the records in the run; None where nothing is drawn.
        text_lengths: int64 [B], of a decoder: the columns of each row that are no padding; else None.
    """

    tokens: Tensor
    segment_ids: Tensor | None
    target_tokens: Tensor | None
    prefix_mask: Tensor | None
    labels: Tensor
    num_tokens: int
    sequence_ids: Tensor | None = None
    text_lengths: Tensor | None = None

    @property
    def num_labels(self) -> int:
        """Tokens that are predicted."""
        return int((self.labels != IGNORED).sum())

    def to(self, device: torch.device) -> PairBatch:
        """The batch on a device."""
        return on_device(self, device)

    def inputs(self) -> dict[str, Tensor | None]:
        """What the model is called with."""
        return {name: part for name, part in vars(self).items() if name != "num_tokens"}


class Translate(RecordTask):
    """Write a text that belongs to another one."""

    metric = "bleu"
    better: ClassVar[Mapping[str, Better]] = {"bleu": "higher", "chrf": "higher", "loss": "lower"}
    generates = True

    def __init__(self, config: FinetuneConfig, tokenizer: Tokenizer) -> None:
        super().__init__(config, tokenizer)
        self.settings = config.translate
        self.is_decoder = config.model.shape == "decoder"
        # A decoder has both sides in one text.
        self.num_sides = 2 if self.is_decoder else 1
        self.max_length = config.data.max_length or config.model.max_sequence_length // self.num_sides
        self.require_length(len(tokenizer.encode(self.settings.prefix)) + 2)
        # Sentences are short: columns to no purpose cost more than shapes, unless each shape is compiled.
        self.multiple = LENGTH_MULTIPLE if config.engine.compile else 1

    @classmethod
    def resolve(cls, config: FinetuneConfig, tokenizer: Tokenizer, records: Sequence[Record]) -> FinetuneConfig:
        """Nothing follows from the records.

        Raises:
            LaunchError: the extra `translate` is not installed.
            ConfigError: an encoder, or sides that do not fit the model together.
        """
        require_sacrebleu()
        model, longest = config.model, config.data.max_length
        if model.shape == "encoder":
            raise ConfigError("task=translate wants an encoder_decoder or a decoder: an encoder writes no texts")
        if model.shape == "decoder" and longest and 2 * longest > model.max_sequence_length:
            raise ConfigError(
                f"data.max_length={longest} is of each side, and the decoder has both in one text of at most "
                f"model.max_sequence_length={model.max_sequence_length} tokens; lower the one or raise the other"
            )
        return super().resolve(config, tokenizer, records)

    @property
    def limit(self) -> str:
        """Of each side."""
        return f"{self.max_length:,} tokens of a side (data.max_length)"

    @property
    def text_field(self) -> str | None:
        """What is read."""
        return self.fields.source

    def encode(self, record: Record, *, for_training: bool = True) -> PairExample:
        """The ids of both texts."""
        text = record.text(self.fields.source, setting="data.fields.source")
        some_ids(self.tokenizer, self.fields.source, text)
        source = self.tokenizer.encode(self.settings.prefix + text)
        before, after = self._around_source()
        kept = self.cut(source, self.max_length - len(before) - len(after))
        num_cut = len(source) - len(kept)
        reference, target = "", list[int]()
        if for_training or record.has_text(self.fields.target):
            reference = record.text(self.fields.target, setting="data.fields.target")
            whole = [*some_ids(self.tokenizer, self.fields.target, reference), self.tokenizer.end_id]
            target = self.cut(whole, self.max_length)  # What was cut does not end there, and so is not taught to.
            num_cut += len(whole) - len(target)
        return PairExample(np.array([*before, *kept, *after], np.int32), np.array(target, np.int32), reference, num_cut)

    def _around_source(self) -> tuple[list[int], list[int]]:
        """The special ids before and after a source."""
        tokenizer = self.tokenizer
        if not self.is_decoder:
            return tokenizer.source_ids
        return tokenizer.begin_ids, [tokenizer.sentinel_ids[0] if tokenizer.sentinel_ids else tokenizer.end_id]

    def collate(self, examples: Sequence[PairExample], numbers: Sequence[int] | None = None) -> PairBatch:
        """Pairs side by side."""
        if self.is_decoder:
            return self._rows(examples, numbers)
        tokens = self._padded([example.source for example in examples], self.tokenizer.pad_id)
        lengths = np.array([len(example.source) for example in examples])
        return PairBatch(
            tokens=tokens,
            segment_ids=pinned((np.arange(tokens.shape[1]) >= lengths[:, None]).astype(np.int64)),
            # The decoder reads what it has to write, one step late.
            target_tokens=self._padded([self._before(example) for example in examples], self.tokenizer.pad_id),
            prefix_mask=None,
            labels=self._padded([example.target for example in examples], IGNORED),
            num_tokens=sum(len(example.source) + len(example.target) for example in examples),
            sequence_ids=ids_of(numbers),
        )

    def _before(self, example: PairExample) -> np.ndarray:
        return np.concatenate(([self.tokenizer.pad_id], example.target[:-1]))

    def _rows(self, examples: Sequence[PairExample], numbers: Sequence[int] | None) -> PairBatch:
        """Source and target in one text; what is asked for after each token is the next one, of the target alone."""
        texts = [np.concatenate((example.source, example.target)) for example in examples]
        # After the source's last token the target is asked for; where that is not known, nothing is.
        labels = [np.concatenate((np.full(len(example.source) - 1, IGNORED), example.target)) for example in examples]
        tokens = self._padded([text[:-1] for text in texts], self.tokenizer.pad_id)
        text_lengths = np.array([len(text) - 1 for text in texts])
        prefix_mask = None
        if self.config.model.prefix_attention:
            lengths = np.array([len(example.source) for example in examples])
            prefix_mask = pinned(np.arange(tokens.shape[1]) < lengths[:, None])
        return PairBatch(
            tokens=tokens,
            segment_ids=None,
            target_tokens=None,
            prefix_mask=prefix_mask,
            labels=self._padded(labels, IGNORED),
            num_tokens=int(text_lengths.sum()),
            sequence_ids=ids_of(numbers),
            text_lengths=pinned(text_lengths),
        )

    def _padded(self, rows: Sequence[Sequence[int] | np.ndarray], fill: int) -> Tensor:
        return padded(rows, fill, multiple=self.multiple)

    def loss(self, model: Model, batch: PairBatch) -> TaskLoss:
        """Smoothed cross-entropy in nats; what is reported is the plain one."""
        return TaskLoss.of(model(**batch.inputs(), label_smoothing=self.settings.label_smoothing))

    def predict(self, model: Model, examples: Sequence[PairExample], device: torch.device) -> list[Prediction]:
        """The best text of a beam search."""
        return self._predict(model, examples, device, self.settings.num_beams)

    def predict_in_run(self, model: Model, examples: Sequence[PairExample], device: torch.device) -> list[Prediction]:
        """The likeliest token each time: it tells better models from worse ones in a fraction of the time."""
        return self._predict(model, examples, device, 1)

    @torch.no_grad()
    def _predict(
        self, model: Model, examples: Sequence[PairExample], device: torch.device, num_beams: int
    ) -> list[Prediction]:
        found = self._search(model, examples, device, num_beams)
        losses = self._losses(model, examples, device)
        predictions: list[Prediction] = []
        for example, best, loss in zip(examples, found, losses, strict=True):
            prediction: Prediction = {"translation": self.tokenizer.decode(best.ids), "score": best.score}
            if example.reference:
                prediction |= {"_reference": example.reference, "_loss": loss, "_num_labels": len(example.target)}
            predictions.append(prediction)
        return predictions

    def _search(
        self, model: Model, examples: Sequence[PairExample], device: torch.device, num_beams: int
    ) -> list[Found]:
        settings = self.settings
        limits = [
            min(self.max_length - 1, round(settings.max_ratio * len(example.source)) + settings.max_added)
            for example in examples
        ]
        return beam_search(
            model,
            self.config.model,
            [example.source.tolist() for example in examples],
            max_new_tokens=limits,
            beam=Beam(size=num_beams, length_penalty=settings.length_penalty),
            end_ids=self.tokenizer.end_ids,
            num_ids=self.tokenizer.vocab_size,
            start_id=self.tokenizer.pad_id,
            device=device,
        )

    def _losses(self, model: Model, examples: Sequence[PairExample], device: torch.device) -> list[float]:
        """Cross-entropy of each target in nats; 0 where it is not known."""
        if not any(len(example.target) for example in examples):
            return [0.0] * len(examples)
        batch = self.collate(examples).to(device)
        losses: list[float] = (-model(**batch.inputs(), score_tokens=True).log_probs.sum(dim=1)).tolist()
        return losses

    def metrics(self, predictions: Sequence[Prediction]) -> dict[str, float]:
        """BLEU (arXiv:1804.08771: cased, on the texts as they came, 13a) and chrF2 (M. Popović, chrF, WMT 2015) in %;
        and the mean loss of a token in nats.

        Raises:
            LaunchError: the extra `translate` is not installed.
        """
        require_sacrebleu()
        from sacrebleu.metrics import BLEU, CHRF

        written = [prediction["translation"] for prediction in predictions]
        right = [[prediction["_reference"] for prediction in predictions]]
        losses, labels = (sum(prediction[key] for prediction in predictions) for key in ("_loss", "_num_labels"))
        return {
            "bleu": BLEU().corpus_score(written, right).score,
            "chrf": CHRF().corpus_score(written, right).score,
            "loss": losses / max(1, labels),
        }

    def mean_tokens(self, examples: Sequence[PairExample]) -> float:
        """Of both sides; of a decoder all but the last, after which nothing comes."""
        return float(np.mean([len(example.source) + len(example.target) - self.is_decoder for example in examples]))

    def lengths(self, examples: Sequence[PairExample]) -> Lengths:
        """Mean tokens of both sides."""
        source, target = (
            float(np.mean([len(getattr(example, name)) for example in examples])) for name in ("source", "target")
        )
        return (
            Lengths(0, source + target - 1, source + target - 1) if self.is_decoder else Lengths(source, target, target)
        )

    def shown(self, record: Record) -> str:
        """The source."""
        return str(record.value(self.fields.source) or "")

    def answer(self, record: Record) -> str:
        """The target."""
        return str(record.value(self.fields.target) or "")


def require_sacrebleu() -> None:
    """Do nothing where sacrebleu is installed.

    Raises:
        LaunchError: it is not.
    """
    if importlib.util.find_spec("sacrebleu") is None:
        raise LaunchError(
            "task=translate measures with sacrebleu, which is not installed: pip install 'bigtx[translate]'"
        )
