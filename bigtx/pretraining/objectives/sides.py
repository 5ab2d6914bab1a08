"""Objectives that split rows into a source and a target for an encoder-decoder."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace

import numpy as np

from bigtx.config.shape import side_lengths
from bigtx.data.stream.rows import IGNORED_LABEL, Batch
from bigtx.pretraining.objectives.objective import Lengths, Objective, documents_of, filled, positions_of, tensor

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
            segment_ids=tensor(self.segments, self.batch) if apart else None,
            target_tokens=tensor(self.target_tokens, self.batch),
            target_positions=tensor(self.target_positions, self.batch) if self.document_mask else None,
            target_segment_ids=tensor(self.target_segments, self.batch) if apart else None,
        )
