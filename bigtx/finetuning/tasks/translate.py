"""Sequence to sequence: translation, summaries, or any other pairs of a source and a target text.

encoder-decoder    source </s>  ─▶ encoder ─▶ decoder, which begins with padding ─▶ target </s>
decoder            source <0> target </s>           <0>: the tokenizer's first sentinel, or its </s> if it has none

The loss is only on the target and its end. The reported loss is without smoothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bigtx.config.schema import FinetuneConfig
from bigtx.config.schema.tasks import METRICS
from bigtx.data.records.record import Record
from bigtx.finetuning.tasks.batch import Batch, ids_of, padding_segments, pinned
from bigtx.finetuning.tasks.task import Lengths, Model, Prediction, RecordTask, some_ids
from bigtx.model.beam import Beam, Found
from bigtx.model.loss import IGNORED, Loss
from bigtx.tokenizer.tokenizer import Tokenizer
from bigtx.utils.errors import require


@dataclass(frozen=True, slots=True)
class PairExample:
    """Two texts as ids.

    Attributes:
        source: int32, the source, with the end or the separator that follows it.
        target: int32, the target, with its end; empty if it is not known.
        reference: the text of the target, or "".
        num_cut: the number of ids of both that were left out.
    """

    source: np.ndarray
    target: np.ndarray
    reference: str
    num_cut: int

    @property
    def length(self) -> int:
        """Return the number of tokens of the longer side: sorting by it gives the least padding (10 % on Multi30k, and
        20 % when sorted by the sum)."""
        return max(len(self.source), len(self.target))


class Translate(RecordTask):
    """The task of generating a target text for a source text."""

    metric = "bleu"
    better = METRICS["translate"]
    generates = True
    text_from = "source"

    def __init__(self, config: FinetuneConfig, tokenizer: Tokenizer) -> None:
        super().__init__(config, tokenizer)
        self.settings = config.translate
        self.is_decoder = config.model.shape == "decoder"
        # A decoder has both sides in one text.
        self.num_sides = 2 if self.is_decoder else 1
        self.max_length = config.data.max_length or config.model.max_sequence_length // self.num_sides
        self.require_length(len(tokenizer.encode(self.settings.prefix)) + 2)
        # Sentences are short: padding costs more than many different shapes, unless each shape is compiled.
        self.are_short = config.engine.compile != "true"

    @classmethod
    def resolve(cls, config: FinetuneConfig, tokenizer: Tokenizer, records: Sequence[Record]) -> FinetuneConfig:
        """Check the config, and return it with a head of tokens.

        Raises:
            LaunchError: the extra `translate` is not installed.
        """
        require_sacrebleu()
        return super().resolve(config, tokenizer, records)

    @property
    def limit(self) -> str:
        """Return the limit of each side."""
        return f"{self.max_length:,} tokens of a side (data.max_length)"

    def encode(self, record: Record, *, for_training: bool = True) -> PairExample:
        """Encode both texts."""
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
            target = self.cut(whole, self.max_length)  # A cut target has no end id, because it does not end there.
            num_cut += len(whole) - len(target)
        return PairExample(np.array([*before, *kept, *after], np.int32), np.array(target, np.int32), reference, num_cut)

    def _around_source(self) -> tuple[list[int], list[int]]:
        """Return the special ids before and after a source."""
        tokenizer = self.tokenizer
        if not self.is_decoder:
            return tokenizer.source_ids
        return tokenizer.begin_ids, [tokenizer.sentinel_ids[0] if tokenizer.sentinel_ids else tokenizer.end_id]

    def collate(self, examples: Sequence[PairExample], numbers: Sequence[int] | None = None) -> Batch:
        """Return a batch of pairs."""
        if self.is_decoder:
            return self._rows(examples, numbers)
        tokens = self._padded([example.source for example in examples], self.tokenizer.pad_id)
        lengths = np.array([len(example.source) for example in examples])
        return Batch(
            tokens=tokens,
            segment_ids=padding_segments(lengths, tokens.shape[1]),
            # The decoder reads its labels shifted by one.
            target_tokens=self._padded([self._before(example) for example in examples], self.tokenizer.pad_id),
            labels=self._padded([example.target for example in examples], IGNORED),
            num_tokens=sum(len(example.source) + len(example.target) for example in examples),
            sequence_ids=ids_of(numbers),
        )

    def _before(self, example: PairExample) -> np.ndarray:
        return np.concatenate(([self.tokenizer.pad_id], example.target[:-1]))

    def _rows(self, examples: Sequence[PairExample], numbers: Sequence[int] | None) -> Batch:
        """Return rows of source and target in one text; the labels are the next tokens of the target only."""
        texts = [np.concatenate((example.source, example.target)) for example in examples]
        # The labels start after the source's last token; there are none if the target is not known.
        labels = [np.concatenate((np.full(len(example.source) - 1, IGNORED), example.target)) for example in examples]
        tokens = self._padded([text[:-1] for text in texts], self.tokenizer.pad_id)
        text_lengths = np.array([len(text) - 1 for text in texts])
        prefix_mask = None
        if self.config.model.prefix_attention:
            lengths = np.array([len(example.source) for example in examples])
            prefix_mask = pinned(np.arange(tokens.shape[1]) < lengths[:, None])
        return Batch(
            tokens=tokens,
            prefix_mask=prefix_mask,
            labels=self._padded(labels, IGNORED),
            num_tokens=int(text_lengths.sum()),
            sequence_ids=ids_of(numbers),
            text_lengths=pinned(text_lengths),
        )

    def _padded(self, rows: Sequence[Sequence[int] | np.ndarray], fill: int) -> Tensor:
        return self.padded(rows, fill, are_short=self.are_short)

    def loss(self, model: Model, batch: Batch) -> Loss:
        """Return the smoothed cross-entropy in nats; the reported loss is without smoothing."""
        loss: Loss = model(**batch.inputs(), label_smoothing=self.settings.label_smoothing)
        return loss

    def predict(self, model: Model, examples: Sequence[PairExample], device: torch.device) -> list[Prediction]:
        """Return the best text of a beam search."""
        return self._predict(model, examples, device, self.settings.num_beams)

    def predict_in_run(self, model: Model, examples: Sequence[PairExample], device: torch.device) -> list[Prediction]:
        """Return texts of the most likely tokens: they rank models in a fraction of the beam search's time."""
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
        prompts = [example.source.tolist() for example in examples]
        return self.best_texts(
            model, prompts, limits, Beam(size=num_beams, length_penalty=settings.length_penalty), device
        )

    def _losses(self, model: Model, examples: Sequence[PairExample], device: torch.device) -> list[float]:
        """Return the cross-entropy of each target in nats; 0 if it is not known."""
        if not any(len(example.target) for example in examples):
            return [0.0] * len(examples)
        batch = self.collate(examples).to(device)
        losses: list[float] = (-model(**batch.inputs(), score_tokens=True).log_probs.sum(dim=1)).tolist()
        return losses

    def metrics(self, predictions: Sequence[Prediction]) -> dict[str, float]:
        """Return BLEU (arXiv:1804.08771: cased, on the unchanged texts, 13a) and chrF2 (M. Popović, chrF, WMT 2015) in
        %, and the mean loss of a token in nats.

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
        """Return the mean tokens of both sides together; for a decoder without the last token."""
        return float(np.mean([len(example.source) + len(example.target) - self.is_decoder for example in examples]))

    def lengths(self, examples: Sequence[PairExample]) -> Lengths:
        """Return the mean tokens of both sides."""
        source, target = (
            float(np.mean([len(getattr(example, name)) for example in examples])) for name in ("source", "target")
        )
        return (
            Lengths(0, source + target - 1, source + target - 1) if self.is_decoder else Lengths(source, target, target)
        )

    def answer(self, record: Record) -> str:
        """Return the target."""
        return str(record.value(self.fields.target) or "")


def require_sacrebleu() -> None:
    """Check that sacrebleu is installed.

    Raises:
        LaunchError: sacrebleu is not installed.
    """
    what = "task=translate measures with sacrebleu, which is not installed: pip install 'bigtx[translate]'"
    require("sacrebleu", what)
