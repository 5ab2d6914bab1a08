"""Rows of tokens from blocks: the tensors that one forward pass reads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from bigtx.data.corpus.blocks import BlockReader
from bigtx.data.stream.order import Places

IGNORED_LABEL = -100
"""Label of a position that is not predicted (torch's `ignore_index`)."""
PADDING_SEQUENCE = -1
"""Sequence id of a row that is only padding."""


@dataclass(frozen=True)
class Batch:
    """One micro batch: B rows of T positions from the stream, or as changed by an objective.

    Attributes:
        tokens: int64 [B, T].
        labels: int64 [B, T], the next token, or IGNORED_LABEL. An objective may have fewer: [B, M] with `columns`.
        positions: int64 [B, T], restarting at each document; None unless the document mask is on.
        segment_ids: int64 [B, T], counting the documents of a row; None unless the document mask is on.
        sequence_ids: int64 [B], each row's number in the global order, or PADDING_SEQUENCE.
        text_lengths: int64 [B], tokens of text in each row; the rest is padding.
        columns: int64 [B, M], the positions of the labels; None: all.
        prefix_mask: bool [B, T], tokens that all tokens of their segment see.
        target_tokens, target_positions, target_segment_ids: int64 [B, U], the input of the decoder of an
            encoder-decoder; the labels are then those of the decoder.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    positions: torch.Tensor | None
    segment_ids: torch.Tensor | None
    sequence_ids: torch.Tensor
    text_lengths: torch.Tensor
    columns: torch.Tensor | None = None
    prefix_mask: torch.Tensor | None = None
    target_tokens: torch.Tensor | None = None
    target_positions: torch.Tensor | None = None
    target_segment_ids: torch.Tensor | None = None

    @property
    def num_labels(self) -> int:
        """Return the number of predicted positions. Call this before `to`; later it waits for the device."""
        return int((self.labels != IGNORED_LABEL).sum())

    def inputs(self) -> dict[str, torch.Tensor]:
        """Return the arguments of a Transformer."""
        return {name: part for name, part in vars(self).items() if part is not None and name != "text_lengths"}

    def to(self, device: torch.device) -> Batch:
        """Return the batch on a device, copied without waiting if its memory is pinned."""
        moved = {name: part.to(device, non_blocking=True) for name, part in vars(self).items() if part is not None}
        return replace(self, **moved)


Prepare = Callable[[Batch], Batch]
"""A function by which an objective changes rows, on the CPU and ahead of time."""


def as_they_are(batch: Batch) -> Batch:
    """Return the rows unchanged, for the prediction of the next token."""
    return batch


@dataclass(frozen=True, kw_only=True)
class RowFormat:
    """How rows are cut and padded: T, the id of padding, whether documents are separated and memory is pinned."""

    sequence_length: int
    pad_id: int
    document_mask: bool
    pin_memory: bool = field(default_factory=torch.cuda.is_available)


def read_rows(
    readers: list[BlockReader], places: Places, sequences: np.ndarray, num_rows: int, form: RowFormat
) -> Batch:
    """Read the rows at `places`, then pad with empty rows.

    Args:
        readers: one for each source index in `places`.
        places: the places of at most num_rows rows.
        sequences: each row's number in the global order.
        num_rows: the number of rows B.
    """
    length, count = form.sequence_length, len(places.block)
    tokens, labels = _empty(num_rows, form), _empty(num_rows, form)
    token_rows, label_rows = tokens.numpy(), labels.numpy()
    # Whether a document, or the padding, begins at a position of a row (T: at the row's end).
    begins = np.zeros((num_rows, length + 1), bool) if form.document_mask else None
    text_lengths = torch.zeros(num_rows, dtype=torch.int64, pin_memory=form.pin_memory)
    located = zip(places.source.tolist(), places.block.tolist(), places.row.tolist(), strict=True)
    for i, (source, block, row) in enumerate(located):
        block_tokens, starts = readers[source].block(block)
        begin = row * length
        inputs = block_tokens[begin : begin + length]
        targets = block_tokens[begin + 1 : begin + length + 1]
        token_rows[i, : len(inputs)] = inputs
        label_rows[i, : len(targets)] = targets
        text_lengths[i] = len(inputs)
        if len(targets) < length:
            token_rows[i, len(inputs) :] = form.pad_id
            label_rows[i, len(targets) :] = IGNORED_LABEL
        if begins is not None:
            begins[i, len(inputs)] = len(inputs) < length
            first, last = np.searchsorted(starts, (begin, begin + length + 1))
            begins[i, starts[first:last].astype(np.int64) - begin] = True
    token_rows[count:] = form.pad_id
    label_rows[count:] = IGNORED_LABEL
    positions = segment_ids = None
    if begins is not None:
        label_rows[begins[:, 1:]] = IGNORED_LABEL
        positions, segment_ids = _positions_and_segments(begins, form)
    # Pinned like the others: a copy from pageable memory may wait for all work of the device.
    sequence_ids = torch.full((num_rows,), PADDING_SEQUENCE, dtype=torch.int64, pin_memory=form.pin_memory)
    sequence_ids[:count] = torch.from_numpy(sequences)
    return Batch(tokens, labels, positions, segment_ids, sequence_ids, text_lengths)


def _empty(num_rows: int, form: RowFormat) -> torch.Tensor:
    return torch.empty((num_rows, form.sequence_length), dtype=torch.int64, pin_memory=form.pin_memory)


def _positions_and_segments(begins: np.ndarray, form: RowFormat) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the positions since the last beginning, and the number of beginnings after a row's first position."""
    num_rows, length = len(begins), form.sequence_length
    positions, segment_ids = _empty(num_rows, form), _empty(num_rows, form)
    # A row starts a segment of its own, whether a document starts there or continues.
    inner = begins[:, :length].copy()
    inner[:, 0] = False
    np.cumsum(inner, axis=1, out=segment_ids.numpy())
    places = np.arange(length)
    np.subtract(places, np.maximum.accumulate(np.where(inner, places, 0), axis=1), out=positions.numpy())
    return positions, segment_ids
