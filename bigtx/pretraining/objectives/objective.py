"""What all objectives share: their randomness, their tensors, and the parts of a packed row."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

from bigtx.config.schema import PretrainConfig
from bigtx.data.stream.rows import Batch
from bigtx.tokenizer.tokenizer import Tokenizer
from bigtx.utils.seeds import derive_seed


class Lengths(NamedTuple):
    """Columns of what an objective makes of a row."""

    source: int
    """Tokens that the encoder reads; 0 without one."""
    target: int
    """Tokens that the decoder reads; 0 without one."""
    predicted: int
    """Columns whose logits are made."""


class Objective(ABC):
    """Turns rows of the stream into what a model reads and predicts."""

    bits_per_byte = False
    """Whether the loss per token says how well text is compressed: every token predicted once from those before it."""

    def __init__(self, config: PretrainConfig, tokenizer: Tokenizer, purpose: str) -> None:
        """Args: see `make_objective`."""
        self.settings = config.objective
        self.tokenizer = tokenizer
        self.length = config.train.sequence_length
        self.document_mask = config.data.document_mask
        # Runs of different seeds are measured by the same questions.
        self._key = derive_seed("objective", config.seed if purpose == "train" else 0, purpose)

    @abstractmethod
    def prepare(self, batch: Batch) -> Batch:
        """Return the batch that the model is called with, made of one from the stream."""

    @property
    @abstractmethod
    def lengths(self) -> Lengths:
        """Return the lengths of every row."""

    @abstractmethod
    def describe(self) -> str:
        """Return a few words for the log."""

    def generator(self, sequence_id: int) -> np.random.Generator:
        """Return the generator of all that a row draws."""
        return np.random.Generator(np.random.Philox(key=[self._key, sequence_id]))

    def rows(self, batch: Batch) -> Iterator[tuple[int, np.ndarray, np.random.Generator]]:
        """Number, tokens and generator of each row that has text."""
        texts = zip(batch.tokens.numpy(), batch.text_lengths.tolist(), batch.sequence_ids.tolist(), strict=True)
        for row, (tokens, length, sequence_id) in enumerate(texts):
            if length:
                yield row, tokens[:length], self.generator(sequence_id)

    def padding_apart(self, batch: Batch) -> torch.Tensor | None:
        """Segment ids that keep padding from being seen, where there is any: a model may read it both ways."""
        if batch.segment_ids is not None or int(batch.text_lengths.min()) == self.length:
            return batch.segment_ids
        columns = np.arange(self.length)
        return tensor((columns >= batch.text_lengths.numpy()[:, None]).astype(np.int64), batch)


def documents_of(batch: Batch, row: int, length: int) -> np.ndarray:
    """Return the document of each token of a row's text, int64 [length]; zeros where documents are not kept apart."""
    if batch.segment_ids is None:
        return np.zeros(length, np.int64)
    return batch.segment_ids.numpy()[row, :length]


def tensor(array: np.ndarray, batch: Batch) -> torch.Tensor:
    """Return the array in memory of the batch's kind, so that it reaches the device as fast."""
    result = torch.from_numpy(array)
    return result.pin_memory() if batch.tokens.is_pinned() else result


def filled(batch: Batch, length: int, value: int) -> np.ndarray:
    """Return int64 [B, length] of one value."""
    return np.full((len(batch.tokens), length), value, np.int64)


def positions_of(segments: np.ndarray) -> np.ndarray:
    """Positions within each segment: int64 like the segment ids [T], which change where another begins."""
    places = np.arange(len(segments))
    begins = np.empty(len(segments), bool)
    begins[:1] = True
    begins[1:] = segments[1:] != segments[:-1]
    return places - np.maximum.accumulate(np.where(begins, places, 0))
