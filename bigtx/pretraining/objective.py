"""The base of all objectives: their randomness, their tensors, and the parts of a packed row."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch

from bigtx.config.schema import PretrainConfig
from bigtx.data.stream.rows import Batch
from bigtx.engine.task import TaskLoss
from bigtx.tokenizer.tokenizer import Tokenizer
from bigtx.utils.hashing import derive_seed


class Lengths(NamedTuple):
    """Numbers of columns that an objective makes of a row."""

    source: int
    """Tokens that the encoder reads; 0 without one."""
    target: int
    """Tokens that the decoder reads; 0 without one."""
    predicted: int
    """Columns whose logits are computed."""


class Objective(ABC):
    """A transformation of the stream's rows into a model's input and labels."""

    bits_per_byte = False
    """Whether the loss per token measures compression: every token is predicted once from the tokens before it."""

    def __init__(self, config: PretrainConfig, tokenizer: Tokenizer, purpose: str) -> None:
        """Args: see `make_objective`."""
        self.settings = config.objective
        self.tokenizer = tokenizer
        self.length = config.train.sequence_length
        self.document_mask = config.data.document_mask
        # Validation makes the same draws for all seeds.
        self._key = derive_seed("objective", config.seed if purpose == "train" else 0, purpose)

    @abstractmethod
    def prepare(self, batch: Batch) -> Batch:
        """Return the model's batch for a batch of the stream."""

    @property
    @abstractmethod
    def lengths(self) -> Lengths:
        """Return the lengths of every row."""

    @abstractmethod
    def describe(self) -> str:
        """Return a short description for the log."""

    def generator(self, sequence_id: int) -> np.random.Generator:
        """Return the generator for all random draws of a row."""
        return np.random.Generator(np.random.Philox(key=[self._key, sequence_id]))

    def rows(self, batch: Batch) -> Iterator[tuple[int, np.ndarray, np.random.Generator]]:
        """Yield index, tokens and generator of each row that has text."""
        texts = zip(batch.tokens.numpy(), batch.text_lengths.tolist(), batch.sequence_ids.tolist(), strict=True)
        for row, (tokens, length, sequence_id) in enumerate(texts):
            if length:
                yield row, tokens[:length], self.generator(sequence_id)

    def padding_apart(self, batch: Batch) -> torch.Tensor | None:
        """Return segment ids that separate text from padding, if there is any: bidirectional models attend to it."""
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
    """Return the array as a tensor, in pinned memory if the batch is pinned."""
    result = torch.from_numpy(array)
    return result.pin_memory() if batch.tokens.is_pinned() else result


def filled(batch: Batch, length: int, value: int) -> np.ndarray:
    """Return int64 [B, length] filled with one value."""
    return np.full((len(batch.tokens), length), value, np.int64)


def positions_of(segments: np.ndarray) -> np.ndarray:
    """Return the positions within each segment, int64 [T]; a segment starts where the id [T] changes."""
    places = np.arange(len(segments))
    begins = np.empty(len(segments), bool)
    begins[:1] = True
    begins[1:] = segments[1:] != segments[:-1]
    return places - np.maximum.accumulate(np.where(begins, places, 0))


class LikelihoodTask:
    """Maximum likelihood of a batch's labels, with an optional z-loss."""

    def __init__(self, *, z_loss: float) -> None:
        self.z_loss = z_loss

    def loss(self, model: Callable[..., Any], batch: Batch) -> TaskLoss:
        """Return the differentiable loss, and the plain cross-entropy, in nats."""
        return TaskLoss.of(model(**batch.inputs(), z_loss=self.z_loss))
