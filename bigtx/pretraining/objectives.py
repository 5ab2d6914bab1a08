"""Objectives: they turn a row of text into the model's input and labels.

    row of T tokens ─▶ causal            predict each next token
                       fill_in_middle    the same, for documents whose middle was moved to their end
                       masked            predict M masked tokens; the encoder reads the rest in both directions
                       span_corruption   predict removed spans; the decoder generates them
                       prefix            predict the text after a first part, which is read in both directions

An objective transforms batches in the loader's thread. All its random draws follow from (seed, sequence number), so
there is no state to save, and the numbers of ranks and of micro batches have no effect.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch

from bigtx.config.schema import PretrainConfig
from bigtx.data.stream.rows import IGNORED_LABEL, Batch
from bigtx.model.loss import Loss
from bigtx.tokenizer.tokenizer import Tokenizer
from bigtx.tokenizer.words import is_unspaced
from bigtx.utils.errors import ConfigError
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

    def prepare(self, batch: Batch) -> Batch:
        """Return the model's batch for a batch of the stream: by default the same."""
        return batch

    @property
    def lengths(self) -> Lengths:
        """Return the lengths of every row: by default the whole row, in the decoder."""
        return Lengths(0, self.length, self.length)

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
        return tensor(columns >= batch.text_lengths.numpy()[:, None], batch)


def documents_of(batch: Batch, row: int, length: int) -> np.ndarray:
    """Return the document of each token of a row's text, int64 [length]; zeros where documents are not kept apart."""
    return np.zeros(length, np.int64) if batch.segment_ids is None else batch.segment_ids.numpy()[row, :length]


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

    def loss(self, model: Callable[..., Any], batch: Batch) -> Loss:
        """Return the differentiable loss, and the plain cross-entropy, in nats."""
        loss: Loss = model(**batch.inputs(), z_loss=self.z_loss)
        return loss


class Causal(Objective):
    """Predict each next token."""

    bits_per_byte = True

    def describe(self) -> str:
        """Return a short description."""
        return "every next token"


NUM_MARKS = 3


class FillInMiddle(Objective):
    """Rearrange some of the documents, and predict each next token.

    A rearranged document is three tokens longer; a row that becomes too long is truncated at its end.
    """

    def __init__(self, config: PretrainConfig, tokenizer: Tokenizer, purpose: str) -> None:
        """Raises:
        ConfigError: the tokenizer has fewer than three sentinels.
        """
        super().__init__(config, tokenizer, purpose)
        if len(tokenizer.sentinel_ids) < NUM_MARKS:
            raise ConfigError(
                "objective.name=fill_in_middle marks the parts of a document with the tokenizer's last three "
                f"sentinels, and this tokenizer has {len(tokenizer.sentinel_ids)}; `bigtx tokenizer train` makes 100"
            )
        self.marks = [np.array([mark]) for mark in tokenizer.sentinel_ids[-NUM_MARKS:]]

    def describe(self) -> str:
        """Return a short description."""
        return f"every next token, {self.settings.fill_in_middle_rate:.0%} of the documents rearranged"

    def prepare(self, batch: Batch) -> Batch:
        """Return the batch with rearranged documents, and their labels, positions and segments."""
        tokens, labels = filled(batch, self.length, self.tokenizer.pad_id), filled(batch, self.length, IGNORED_LABEL)
        segments, positions = filled(batch, self.length, -1), filled(batch, self.length, 0)
        lengths = np.zeros(len(tokens), np.int64)
        raw_labels = batch.labels.numpy()
        for row, text, generator in self.rows(batch):
            pieces = [self._rearrange(piece, generator) for piece in self._documents(text)]
            joined = np.concatenate(pieces)
            owner = np.repeat(np.arange(len(pieces)), [len(piece) for piece in pieces])
            lengths[row] = length = min(self.length, len(joined))
            tokens[row, :length] = joined[:length]
            # The last label counts if nothing was moved; otherwise its column is truncated or followed by padding.
            following = np.append(joined[1:], raw_labels[row, len(text) - 1])[:length]
            if self.document_mask:
                following = np.where(
                    np.append(owner[1:], owner[-1])[:length] == owner[:length], following, IGNORED_LABEL
                )
            labels[row, :length] = following
            segments[row, :length], positions[row, :length] = owner[:length], positions_of(owner[:length])
        changed = replace(
            batch, tokens=tensor(tokens, batch), labels=tensor(labels, batch), text_lengths=tensor(lengths, batch)
        )
        if not self.document_mask:
            return changed
        return replace(changed, segment_ids=tensor(segments, batch), positions=tensor(positions, batch))

    def _documents(self, text: np.ndarray) -> list[np.ndarray]:
        """Return the documents of a row, or the parts of them in it; each but the last ends with the end id."""
        ends = np.flatnonzero(text == self.tokenizer.end_id) + 1
        return [piece for piece in np.split(text, ends) if len(piece)]

    def _rearrange(self, piece: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        moved, suffix_first, *cuts = generator.random(4)
        if moved >= self.settings.fill_in_middle_rate:
            return piece
        end = piece[-1:] if piece[-1] == self.tokenizer.end_id else piece[:0]
        begin_ids = self.tokenizer.begin_ids
        begin = piece[: len(begin_ids)] if piece[: len(begin_ids)].tolist() == begin_ids else piece[:0]
        body = piece[len(begin) : len(piece) - len(end)]
        first, second = sorted(int(cut * (len(body) + 1)) for cut in cuts)
        prefix, middle, suffix = body[:first], body[first:second], body[second:]
        of_prefix, of_suffix, of_middle = self.marks
        if suffix_first < self.settings.suffix_first_rate:
            return np.concatenate((begin, of_prefix, of_suffix, suffix, of_middle, prefix, middle, end))
        return np.concatenate((begin, of_prefix, prefix, of_suffix, suffix, of_middle, middle, end))


_BEGIN_MARKS = ("\u2581", "\u0120", " ")
"""The marks of spaces in sentencepiece, byte-level BPE and the exports of bigtx."""
_CONTINUATION_MARK = "##"
"""The mark of WordPiece."""


@functools.lru_cache(maxsize=1)  # Training and validation need the same.
def begins_word(tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """Return which pieces are at borders of words.

    In a script without spaces, each piece is a word: otherwise a sentence would be one.

    Returns:
        bool [vocab_size] twice: pieces that begin a word, and pieces of only white space, after which one begins.
    """
    pieces = [tokenizer.id_to_piece(i) for i in range(tokenizer.vocab_size)]
    # Bytes, too, have a text only when they are decoded.
    texts = [tokenizer.decode([i]) for i in range(tokenizer.vocab_size)]
    spaces = np.array([text.isspace() or piece in _BEGIN_MARKS for text, piece in zip(texts, pieces, strict=True)])
    alone = np.array([any(map(is_unspaced, text)) for text in texts])
    has_begin_marks = any(piece.startswith(_BEGIN_MARKS) for piece in pieces)
    if not has_begin_marks and any(piece.startswith(_CONTINUATION_MARK) for piece in pieces):
        begins = np.array([not piece.startswith(_CONTINUATION_MARK) for piece in pieces])
    else:
        begins = np.array([piece.startswith(_BEGIN_MARKS) for piece in pieces])
    return begins | spaces | alone, spaces


SHARE_MASKED, SHARE_RANDOM = 0.8, 0.1


class Masked(Objective):
    """Mask some tokens, optionally whole words, and predict them."""

    def __init__(self, config: PretrainConfig, tokenizer: Tokenizer, purpose: str) -> None:
        """Raises:
        ConfigError: the tokenizer has no mask.
        """
        super().__init__(config, tokenizer, purpose)
        if tokenizer.mask_id is None:
            raise ConfigError(
                "objective.name=masked needs a tokenizer with a mask id, and this one has none; "
                "`bigtx tokenizer train` makes one"
            )
        self.mask_id = tokenizer.mask_id
        self.is_special = np.zeros(tokenizer.vocab_size, bool)
        self.is_special[list(tokenizer.special.all())] = True
        self.ordinary_ids = np.flatnonzero(~self.is_special)
        self.begins_word, self.is_space = begins_word(tokenizer)
        self.count = max(1, round(self.settings.mask_rate * self.length))

    @property
    def lengths(self) -> Lengths:
        """Return the whole row in the encoder, and the number of tokens to predict."""
        return Lengths(self.length, 0, self.count)

    def describe(self) -> str:
        """Return a short description."""
        words = ", whole words" if self.settings.whole_words else ""
        return f"{self.count} masked tokens of every {self.length}{words}"

    def prepare(self, batch: Batch) -> Batch:
        """Return the batch with some tokens masked, and the columns and labels of these."""
        tokens = batch.tokens.numpy().copy()
        columns, labels = filled(batch, self.count, 0), filled(batch, self.count, IGNORED_LABEL)
        for row, text, generator in self.rows(batch):
            chosen = self._choose(text, generator)
            columns[row, : len(chosen)], labels[row, : len(chosen)] = chosen, text[chosen]
            tokens[row, chosen] = self._mask(text[chosen], generator)
        return replace(
            batch,
            tokens=tensor(tokens, batch),
            labels=tensor(labels, batch),
            columns=tensor(columns, batch),
            segment_ids=self.padding_apart(batch),
        )

    def _choose(self, text: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """Return the columns to predict, ascending: exactly `count` in a full row, if it has enough ordinary tokens."""
        special = self.is_special[text]
        candidates = np.flatnonzero(~special)
        count = self.count if len(text) == self.length else max(1, round(self.settings.mask_rate * len(text)))
        if not self.settings.whole_words:
            return np.sort(generator.permutation(candidates)[:count])
        begins = self.begins_word[text]
        begins[:1] = True
        begins[1:] |= special[:-1] | self.is_space[text[:-1]]
        word = np.cumsum(begins)[candidates]
        rank = generator.permutation(len(text) + 1)
        # Words are taken in random order; only a part of the last one may be taken, so that the count is exact.
        return np.sort(candidates[np.argsort(rank[word], kind="stable")[:count]])

    def _mask(self, tokens: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        draw = generator.random(len(tokens))
        other = self.ordinary_ids[generator.integers(len(self.ordinary_ids), size=len(tokens))]
        replaced = np.where(draw < SHARE_MASKED + SHARE_RANDOM, other, tokens)
        return np.where(draw < SHARE_MASKED, self.mask_id, replaced)
