"""Objectives that split rows into a source and a target for an encoder-decoder, and the prefixes of a decoder.

Prefix language modeling predicts the text after a bidirectional prefix (arXiv:1910.10683, section 3.2.3). Span
corruption (T5, the same article) removes spans of a text, and an encoder-decoder generates them:

    a row       Thank you for inviting me to your party last week
    source      Thank you <0> me to your party <1> week </s>
    target      <0> for inviting <1> last </s>

The numbers of removed tokens and of spans are the same for every row, so that both sides of a full row have known
lengths without padding.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace

import numpy as np
import torch

from bigtx.config.schema import PretrainConfig
from bigtx.config.shape import noise_counts, side_lengths
from bigtx.data.stream.rows import IGNORED_LABEL, Batch
from bigtx.pretraining.objectives import Lengths, Objective, documents_of, filled, positions_of, tensor
from bigtx.tokenizer.tokenizer import Tokenizer
from bigtx.utils.errors import ConfigError

PADDING_SEGMENT = -1


class TwoSided(Objective):
    """An objective that makes a source and a target of each row."""

    @property
    def lengths(self) -> Lengths:
        """Return the lengths of both sides."""
        source, target = side_lengths(self.settings, self.length)
        return Lengths(source, target, target)

    def prepare(self, batch: Batch) -> Batch:
        """Return the batch with a source and a target of each row."""
        sides = Sides(
            batch,
            source_length=self.lengths.source,
            target_length=self.lengths.target,
            pad_id=self.tokenizer.pad_id,
            document_mask=self.document_mask,
        )
        for row, text, generator in self.rows(batch):
            self.put(sides, row, text, documents_of(batch, row, len(text)), generator)
        return sides.batch_of_both()

    @abstractmethod
    def put(
        self, sides: Sides, row: int, text: np.ndarray, documents: np.ndarray, generator: np.random.Generator
    ) -> None:
        """Fill a row of the sides.

        Args:
            text: the tokens of the row.
            documents: the document of each token.
            generator: the generator for the row's draws.
        """


class Sides:
    """The source and the target of every row of a batch, filled row by row.

    The decoder reads its labels shifted by one: a start id, and all but the last label.

    Args:
        source_length, target_length: numbers of columns.
        pad_id: the id of padding, and the start id of the decoder, as in T5 (arXiv:1910.10683).
        document_mask: whether documents are separate on both sides.
    """

    def __init__(
        self, batch: Batch, *, source_length: int, target_length: int, pad_id: int, document_mask: bool
    ) -> None:
        self.batch, self.pad_id, self.document_mask = batch, pad_id, document_mask
        self.tokens, self.segments, self.positions = (
            filled(batch, source_length, value) for value in (pad_id, PADDING_SEGMENT, 0)
        )
        self.target_tokens, self.labels, self.target_segments, self.target_positions = (
            filled(batch, target_length, value) for value in (pad_id, IGNORED_LABEL, PADDING_SEGMENT, 0)
        )

    def put(
        self, row: int, source: np.ndarray, source_segments: np.ndarray, labels: np.ndarray, segments: np.ndarray
    ) -> None:
        """Fill a row.

        Args:
            labels: the ids that the decoder generates.
            source_segments, segments: the document of each token of the source and of the labels, or zeros.
        """
        length, target_length = len(source), len(labels)
        self.tokens[row, :length], self.segments[row, :length] = source, source_segments
        self.positions[row, :length] = positions_of(source_segments)
        positions = positions_of(segments)
        self.labels[row, :target_length], self.target_segments[row, :target_length] = labels, segments
        self.target_positions[row, :target_length] = positions
        # Every document begins with a start id, not with the end of another document.
        before = np.append([self.pad_id], labels[:-1])
        self.target_tokens[row, :target_length] = np.where(positions == 0, self.pad_id, before)

    def ignore(self, row: int, columns: np.ndarray) -> None:
        """Exclude these columns of the target from the loss."""
        self.labels[row, columns] = IGNORED_LABEL

    def batch_of_both(self) -> Batch:
        """Return the model's batch; it has no segment ids if there are no separate documents and no padding."""
        apart = self.document_mask or bool((self.segments == PADDING_SEGMENT).any())
        return replace(
            self.batch,
            tokens=tensor(self.tokens, self.batch),
            labels=tensor(self.labels, self.batch),
            positions=tensor(self.positions, self.batch) if self.document_mask else None,
            segment_ids=self._apart(self.segments) if apart else None,
            target_tokens=tensor(self.target_tokens, self.batch),
            target_positions=tensor(self.target_positions, self.batch) if self.document_mask else None,
            target_segment_ids=self._apart(self.target_segments) if apart else None,
        )

    def _apart(self, segments: np.ndarray) -> torch.Tensor:
        """Return the segments [B, T] for the model: of documents, or only of padding."""
        return tensor(segments if self.document_mask else segments == PADDING_SEGMENT, self.batch)


class DecoderPrefix(Objective):
    """The objective of a decoder: a row, or each of its separate documents, is split at a random position."""

    def describe(self) -> str:
        """Return a short description."""
        return "every next token after a prefix of random length"

    def prepare(self, batch: Batch) -> Batch:
        """Return the batch with a mask of the prefixes, and labels only after them."""
        labels, prefix_mask = batch.labels.numpy().copy(), filled(batch, self.length, 0).astype(bool)
        for row, text, generator in self.rows(batch):
            documents = documents_of(batch, row, len(text))
            lengths = np.bincount(documents)
            # A prefix has from one token to all but one; a document of a single token has no prefix.
            prefixes = 1 + np.floor(generator.random(len(lengths)) * np.maximum(lengths - 1, 0)).astype(np.int64)
            prefixes = np.where(lengths > 1, np.minimum(prefixes, lengths - 1), 0)
            positions, of_token = positions_of(documents), prefixes[documents]
            prefix_mask[row, : len(text)] = positions < of_token
            labels[row, : len(text)][positions < of_token - 1] = IGNORED_LABEL
        return replace(batch, labels=tensor(labels, batch), prefix_mask=tensor(prefix_mask, batch))


class SourcePrefix(TwoSided):
    """The objective of an encoder-decoder: the first half of a row is the source, the second the target."""

    def describe(self) -> str:
        """Return a short description."""
        source, target, _ = self.lengths
        return f"the second half of every {self.length} tokens; the encoder reads {source} tokens, the decoder {target}"

    def put(
        self, sides: Sides, row: int, text: np.ndarray, documents: np.ndarray, generator: np.random.Generator
    ) -> None:
        """Split the row in the middle."""
        half = len(text) // 2
        source = np.append(text[:half], self.tokenizer.end_id)
        source_documents = np.append(documents[:half], documents[max(half - 1, 0)])
        sides.put(row, source, source_documents, text[half:], documents[half:])


class SpanCorruption(TwoSided):
    """Remove spans from the source; they are the target."""

    def __init__(self, config: PretrainConfig, tokenizer: Tokenizer, purpose: str) -> None:
        """Raises:
        ConfigError: a row has more spans than the tokenizer has sentinels.
        """
        super().__init__(config, tokenizer, purpose)
        self.num_noise, self.num_spans = noise_counts(self.settings, self.length)
        if self.num_spans > len(tokenizer.sentinel_ids):
            raise ConfigError(
                f"objective.name=span_corruption removes {self.num_spans} spans of a row of {self.length} tokens, and "
                f"the tokenizer has only {len(tokenizer.sentinel_ids)} sentinels to mark them; lower "
                "train.sequence_length or objective.noise_density, or raise objective.mean_span_length"
            )
        self.sentinels = np.array(tokenizer.sentinel_ids)

    def describe(self) -> str:
        """Return a short description."""
        source, target, _ = self.lengths
        return (
            f"{self.num_spans} spans of {self.num_noise} tokens in all are removed from every {self.length}; the "
            f"encoder reads {source} tokens, the decoder {target}"
        )

    def put(
        self, sides: Sides, row: int, text: np.ndarray, documents: np.ndarray, generator: np.random.Generator
    ) -> None:
        """Remove random spans."""
        if len(text) == 1:
            return  # A single token has no span to remove.
        num_noise, num_spans = noise_counts(self.settings, len(text))
        kept = _random_parts(len(text) - num_noise, num_spans, generator)
        cut = _random_parts(num_noise, num_spans, generator)
        begins = np.cumsum(kept + cut) - cut
        is_noise = np.repeat(np.tile([False, True], num_spans), np.stack((kept, cut), axis=1).ravel())
        spans = np.arange(num_spans)
        source_marks, target_marks = np.cumsum(kept) + spans, np.cumsum(cut) - cut + spans
        from_source = _with_marks(np.flatnonzero(~is_noise), begins, source_marks, end=len(text) - 1)
        from_target = _with_marks(np.flatnonzero(is_noise), begins, target_marks, end=len(text) - 1)
        source, target = text[from_source], text[from_target]
        source[source_marks] = target[target_marks] = self.sentinels[:num_spans]
        source[-1] = target[-1] = self.tokenizer.end_id
        sides.put(row, source, documents[from_source], target, documents[from_target])
        # The part of a span beyond the end of its document cannot be predicted.
        begun = np.repeat(documents[begins], cut + 1)
        sides.ignore(row, np.flatnonzero(documents[from_target[:-1]] != begun))


def _with_marks(columns: np.ndarray, begins: np.ndarray, marks: np.ndarray, *, end: int) -> np.ndarray:
    """Return for each token of a side the column of the row whose document it belongs to.

    Args:
        columns: the columns of the row's tokens on this side.
        begins: the first column of each span, to which its sentinel belongs.
        marks: the positions of the sentinels on this side.
        end: the column of the side's last token.
    """
    result = np.empty(len(columns) + len(marks) + 1, np.int64)
    is_copied = np.ones(len(result), bool)
    is_copied[marks] = is_copied[-1] = False
    result[is_copied], result[marks], result[-1] = columns, begins, end
    return result


def _random_parts(total: int, count: int, generator: np.random.Generator) -> np.ndarray:
    """Return `count` positive integers that sum to `total`, with every such choice equally likely."""
    cuts = np.sort(generator.permutation(total - 1)[: count - 1]) + 1
    return np.diff(np.concatenate(([0], cuts, [total])))
