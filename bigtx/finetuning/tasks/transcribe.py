"""Transcription of speech.

seq2seq    features ─▶ encoder ─▶ decoder ─▶ text </s>     Whisper's shape (arXiv:2212.04356)
ctc        features ─▶ encoder ─▶ a token or the blank in each column; repeats and blanks are removed
                                  (A. Graves et al., Connectionist Temporal Classification, ICML 2006)

The blank of CTC and the start id of the decoder are the padding id, which no text contains.
"""

from __future__ import annotations

import contextlib
import itertools
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bigtx.config import shape
from bigtx.config.schema import FinetuneConfig
from bigtx.config.schema.tasks import METRICS
from bigtx.data.recordings import AudioPlace, require_speech
from bigtx.data.records.record import BadRecordError, Record
from bigtx.finetuning.tasks.batch import Batch, ids_of
from bigtx.finetuning.tasks.speech import SpeechExample, SpeechFeatures
from bigtx.finetuning.tasks.task import Lengths, Look, Model, Prediction, RecordTask, some_ids
from bigtx.model.beam import Beam
from bigtx.model.cache import KeyValueCache
from bigtx.model.embed import Text
from bigtx.model.loss import IGNORED, Loss
from bigtx.tokenizer.tokenizer import Tokenizer

APOSTROPHES = "'’"


class Transcribe(RecordTask):
    """The task of transcribing recordings."""

    metric = "wer"
    better = METRICS["transcribe"]

    def __init__(self, config: FinetuneConfig, tokenizer: Tokenizer) -> None:
        super().__init__(config, tokenizer)
        self.settings = config.transcribe
        self.is_ctc = config.transcribe.method == "ctc"
        self.generates = not self.is_ctc  # type: ignore[misc]
        self.require_length(1 if self.is_ctc else 2)
        self.speech = SpeechFeatures(config)
        self.beam = Beam(size=self.settings.num_beams, length_penalty=self.settings.length_penalty)

    @classmethod
    def resolve(cls, config: FinetuneConfig, tokenizer: Tokenizer, records: Sequence[Record]) -> FinetuneConfig:
        """Check the config, and return it with a head of tokens.

        Raises:
            LaunchError: the extra `speech` is not installed.
        """
        require_speech()
        return super().resolve(config, tokenizer, records)

    @property
    def limit(self) -> str:
        """Return the limits of a recording and of its text."""
        return f"{self.settings.max_seconds:g} s (transcribe.max_seconds) or {super().limit}"

    def look_ahead(self, records: Iterable[Record], look: Look) -> None:
        """Decode all recordings in advance."""

        def places() -> Iterator[AudioPlace]:
            for record in records:
                with contextlib.suppress(BadRecordError):  # `encode` reports the error.
                    yield self.speech.place(record, self.fields.audio)

        self.speech.known = look(places())

    def encode(self, record: Record, *, for_training: bool = True) -> SpeechExample:
        """Encode the text of a recording, and determine the length of the recording."""
        place = self.speech.place(record, self.fields.audio)
        samples, num_cut = self.speech.num_samples(place)
        text = self._text(record, is_needed=for_training)
        ids = some_ids(self.tokenizer, self.fields.text, text) if text else []
        kept = self.cut(ids, self.max_length if self.is_ctc else self.max_length - 1)
        if for_training:
            self._check_columns(kept, samples)
        length = shape.num_columns(self.config.model, samples)
        num_cut = shape.num_columns(self.config.model, num_cut) + len(ids) - len(kept)
        example = SpeechExample(place, record.where, length, text, np.array(kept, np.int32), num_cut)
        if not for_training:
            self.speech.check(example)  # One bad recording must not end the predictions for others.
        return example

    def _text(self, record: Record, *, is_needed: bool) -> str:
        if not is_needed and not record.has_text(self.fields.text):
            return ""
        if record.value(self.fields.text) is None and isinstance(record.value(self.fields.audio), AudioPlace):
            raise BadRecordError("the recording has no text: there is no .txt of the same name in its folder")
        text = record.text(self.fields.text, setting="data.fields.text")
        normalized = normalize(text, self.settings.normalize)
        if not normalized and is_needed:
            raise BadRecordError(f"the text is empty after transcribe.normalize={self.settings.normalize}")
        return normalized

    def _check_columns(self, ids: Sequence[int], num_samples: int) -> None:
        """Check that a recording has enough columns: CTC needs one per token, and a blank between two equal tokens."""
        if not self.is_ctc:
            return
        needed = len(ids) + sum(first == second for first, second in itertools.pairwise(ids))
        columns = shape.num_columns(self.config.model, int(num_samples / (1.0 + self.settings.speed_change)))
        if needed > columns:
            raise BadRecordError(
                f"its text needs {needed} columns for CTC, and the recording has {columns} (is it the right text? "
                "smaller model.audio.strides give more columns)"
            )

    def collate(self, examples: Sequence[SpeechExample], numbers: Sequence[int] | None = None) -> Batch:
        """Return a batch of recordings."""
        features, lengths = self.speech.together(examples, numbers)
        texts = [example.ids.tolist() for example in examples]
        target_tokens, ctc_lengths = None, None
        if self.is_ctc:
            columns = -(-lengths // shape.frames_per_column(self.config.model))
            ctc_lengths = (columns.tolist(), [len(ids) for ids in texts])
        else:
            # The decoder reads its labels shifted by one.
            rows = [[self.tokenizer.pad_id, *ids] for ids in texts]
            target_tokens = self.padded(rows, self.tokenizer.pad_id, are_short=True)
            texts = [[*ids, self.tokenizer.end_id] for ids in texts]
        return Batch(
            features=features,
            feature_lengths=lengths,
            target_tokens=target_tokens,
            labels=self.padded(texts, IGNORED, are_short=True),
            num_tokens=sum(example.length for example in examples),
            sequence_ids=ids_of(numbers),
            ctc_lengths=ctc_lengths,
        )

    def loss(self, model: Model, batch: Batch) -> Loss:
        """Return the loss of all tokens of the texts in nats: cross-entropy, or CTC's negative log-likelihood."""
        if self.is_ctc:
            losses = self._ctc_losses(model(**batch.inputs(labels=False)), batch)
            return Loss(losses.sum(), losses.detach().sum())
        loss: Loss = model(**batch.inputs(), label_smoothing=self.settings.label_smoothing)
        return loss

    def _ctc_losses(self, logits: Tensor, batch: Batch) -> Tensor:
        """Return the losses of the texts, fp32 [B], on the logits' device."""
        log_probabilities = logits.log_softmax(dim=-1).transpose(0, 1)  # S B V
        if torch.are_deterministic_algorithms_enabled():
            log_probabilities = log_probabilities.cpu()  # The gradient of CTC is not deterministic on GPUs.
        columns: Any  # Lists, of which torch's annotation does not know.
        labels: Any
        assert batch.ctc_lengths is not None
        columns, labels = batch.ctc_lengths
        return F.ctc_loss(
            log_probabilities,
            batch.labels.clamp(min=0).to(log_probabilities.device),
            columns,
            labels,
            blank=self.tokenizer.pad_id,
            reduction="none",
        ).to(logits.device)

    @torch.no_grad()
    def predict(self, model: Model, examples: Sequence[SpeechExample], device: torch.device) -> list[Prediction]:
        """Return the texts, and for the metrics the true texts and their losses."""
        batch = self.collate(examples).to(device)
        texts, losses = self._decode_ctc(model, batch) if self.is_ctc else self._search(model, examples, batch)
        found = []
        for example, ids, loss in zip(examples, texts, losses.tolist(), strict=True):
            prediction: Prediction = {"text": self.tokenizer.decode(ids)}
            if example.text:
                num_labels = len(example.ids) + (not self.is_ctc)
                prediction |= {"_text": example.text, "_loss": loss, "_num_labels": num_labels}
            found.append(prediction)
        return found

    def _decode_ctc(self, model: Model, batch: Batch) -> tuple[list[list[int]], Tensor]:
        """Return the most likely token of each column, without repeats and blanks, and the losses of the true texts."""
        logits = model(**batch.inputs(labels=False))
        assert batch.ctc_lengths is not None
        rows = zip(logits.argmax(dim=-1).tolist(), batch.ctc_lengths[0], strict=True)
        return [collapse(row[:length], self.tokenizer.pad_id) for row, length in rows], self._ctc_losses(logits, batch)

    def _search(self, model: Model, examples: Sequence[SpeechExample], batch: Batch) -> tuple[list[list[int]], Tensor]:
        """Return the best texts of the beam search, and the losses of the true texts."""
        sources: list[Text] = []

        def forward(tokens: Tensor | None, **others: Any) -> Tensor:
            """Call the model with the recordings in the first call, in place of the source tokens of the search."""
            if tokens is None:
                result: Tensor = model(**others)
                return result
            rest = {key: value for key, value in others.items() if key != "segment_ids"}
            logits: Tensor = model(**batch.inputs(labels=False), **rest)
            sources.append(others["cache"].source)
            return logits

        # A text has at most as many tokens as its recording has columns, usually of 20 ms: speech is never faster, and
        # the limit ends the text of a model that has not learned to end it.
        limits = [min(self.max_length - 1, example.length + 1) for example in examples]
        prompts = [[self.tokenizer.pad_id]] * len(examples)
        found = self.best_texts(forward, prompts, limits, self.beam, batch.labels.device)
        cache = KeyValueCache(shape.num_decoder_layers(self.config.model))
        cache.source = sources[0]
        target = batch.target_tokens
        assert target is not None
        positions = torch.arange(target.shape[1], device=target.device).expand_as(target)
        logits = model(target_tokens=target, target_positions=positions, cache=cache)  # B T V
        losses = F.cross_entropy(logits.transpose(1, 2), batch.labels, ignore_index=IGNORED, reduction="none")
        return [text.ids for text in found], losses.sum(dim=1)

    def metrics(self, predictions: Sequence[Prediction]) -> dict[str, float]:
        """Return the word and character error rates, and the mean loss of a token in nats."""
        import jiwer

        right = [prediction["_text"] for prediction in predictions]
        written = [normalize(prediction["text"], self.settings.normalize) for prediction in predictions]
        return {
            "wer": float(jiwer.wer(right, written)),
            "cer": float(jiwer.cer(right, written)),
            "loss": sum(prediction["_loss"] for prediction in predictions)
            / sum(prediction["_num_labels"] for prediction in predictions),
        }

    def shown(self, record: Record) -> str:
        """Return the name of the recording."""
        value = record.value(self.fields.audio)
        return value.name if isinstance(value, AudioPlace) else str(value)

    def answer(self, record: Record) -> str:
        """Return the normalized text."""
        value = record.value(self.fields.text)
        return normalize(value, self.settings.normalize) if isinstance(value, str) else ""

    def lengths(self, examples: Sequence[SpeechExample]) -> Lengths:
        """Return the mean columns of the encoder, and the mean tokens of the text with its end."""
        columns = self.mean_tokens(examples)
        if self.is_ctc:
            return Lengths(columns, 0, columns)
        tokens = 1 + float(np.mean([len(example.ids) for example in examples]))
        return Lengths(columns, tokens, tokens)


def collapse(ids: Sequence[int], blank: int) -> list[int]:
    """Return the text of a CTC path: one id for each run of equal ids, without blanks (Graves 2006, section 3.1)."""
    return [own for own, before in zip(ids, [blank, *ids], strict=False) if own != before and own != blank]


def normalize(text: str, how: str) -> str:
    """Return a text with single spaces between its words; `lower`, or `words`: see TranscribeConfig.normalize."""
    if how != "none":
        text = text.lower()
    if how == "words":
        text = "".join(_kept(text, place) for place in range(len(text)))
    return " ".join(text.split())


def _kept(text: str, place: int) -> str:
    """Return a letter, mark, number, or apostrophe within a word unchanged, and a space for everything else."""
    sign = text[place]
    if unicodedata.category(sign)[0] in "LMN":
        return sign
    is_inside = 0 < place < len(text) - 1 and text[place - 1].isalnum() and text[place + 1].isalnum()
    return "'" if sign in APOSTROPHES and is_inside else " "
