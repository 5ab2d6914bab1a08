"""The micro batches of all tasks, and the tensors that they are made of."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bigtx.model.loss import IGNORED

LENGTH_MULTIPLE, GPU_LENGTH_MULTIPLE = 16, 64
"""Batches are padded to a multiple of the first number of columns, so that there are few shapes. On a GPU, those longer
than the second number are padded to a multiple of that: kernels work on tiles, and are prepared for each shape.
"""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """A micro batch of B rows: the arguments of a Transformer, and what a loss needs besides. A task has some of them.

    Attributes:
        labels: int64 [B, T] tokens, or [B] classes; IGNORED where nothing is predicted.
        num_tokens: the number of tokens, or of columns of recordings, without padding.
        tokens: int64 [B, T].
        features, feature_lengths: fp32 [B, F, M], recordings of up to F frames and M mel bins, padded with zeros; int64
            [B], their numbers of frames.
        positions: int64 [B, T]; they restart with each text of a row.
        segment_ids: int64 [B, T], where each text of a row is a segment, and the padding is one; or bool [B, T], True
            for padding, where a row has one text.
        token_types: int64 [B, T].
        prefix_mask: bool [B, T], the source in a decoder with prefix attention.
        target_tokens: int64 [B, T], the input of an encoder-decoder's decoder.
        pool: fp32 [B, T], the weight of each column of a text in its summary.
        sequence_ids: int64 [B], the numbers of the rows in the run; None if nothing is drawn.
        text_lengths: int64 [B], for a decoder the number of columns of each row without padding.
        weights: fp32 [B], the weight of each text in the loss.
        reference: fp32 [B / 2, 2], the log-probabilities of both answers of each pair before the first step.
        ctc_lengths: the columns of the encoder, and the labels, of each row. They stay on the host, where CTC's kernel
            reads them.
    """

    labels: Tensor
    num_tokens: int
    tokens: Tensor | None = None
    features: Tensor | None = None
    feature_lengths: Tensor | None = None
    positions: Tensor | None = None
    segment_ids: Tensor | None = None
    token_types: Tensor | None = None
    prefix_mask: Tensor | None = None
    target_tokens: Tensor | None = None
    pool: Tensor | None = None
    sequence_ids: Tensor | None = None
    text_lengths: Tensor | None = None
    weights: Tensor | None = None
    reference: Tensor | None = None
    ctc_lengths: tuple[list[int], list[int]] | None = None

    @property
    def num_labels(self) -> int:
        """Return the number of labels, or of pairs. Call this before `to`; later it waits for the device."""
        return int((self.labels != IGNORED).sum()) if self.reference is None else len(self.reference)

    def to(self, device: torch.device) -> Batch:
        """Return the batch on a device; the copy is asynchronous if its memory is pinned."""
        moved: dict[str, Any] = {name: part.to(device, non_blocking=True) for name, part in self._tensors().items()}
        return dataclasses.replace(self, **moved)

    def inputs(self, *, labels: bool = True) -> dict[str, Tensor]:
        """Return the arguments of the model.

        Args:
            labels: whether the labels are among them, and the input of a decoder that is made of them.
        """
        omitted = ("weights", "reference", *(() if labels else ("labels", "target_tokens")))
        return {name: part for name, part in self._tensors().items() if name not in omitted}

    def _tensors(self) -> dict[str, Tensor]:
        return {name: part for name, part in vars(self).items() if torch.is_tensor(part)}


def padded_length(longest: int, most: int) -> int:
    """Round the length of the longest row up (see `LENGTH_MULTIPLE`), but not above the `most` of the model."""
    multiple = GPU_LENGTH_MULTIPLE if longest > GPU_LENGTH_MULTIPLE and torch.cuda.is_available() else LENGTH_MULTIPLE
    return max(longest, min(-(-longest // multiple) * multiple, most))


def padded(rows: Sequence[Sequence[int] | np.ndarray], fill: int, *, length: int | None = None) -> Tensor:
    """Pad rows on the right to a length, by default that of the longest; return int64 [B, T]."""
    length = max((len(row) for row in rows), default=0) if length is None else length
    result = np.full((len(rows), length), fill, np.int64)
    for place, row in enumerate(rows):
        result[place, : len(row)] = row
    return pinned(result)


def padding_segments(lengths: np.ndarray, num_columns: int) -> Tensor:
    """Return segment ids, bool [B, T], that separate texts of these lengths, int64 [B], from padding."""
    return pinned(np.arange(num_columns) >= lengths[:, None])


def ids_of(numbers: Sequence[int] | None) -> Tensor | None:
    """Return the numbers of the rows in the run as int64 [B], or None if nothing is drawn."""
    return None if numbers is None else pinned(np.array(numbers, np.int64))


def pinned(array: np.ndarray) -> Tensor:
    """Return the array as a tensor, in pinned memory if there is a GPU."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory() if torch.cuda.is_available() else tensor
