"""Masked language modeling (BERT, arXiv:1810.04805): an encoder predicts masked tokens.

80 % of the tokens to predict are replaced by the mask, 10 % by a random token, and 10 % are unchanged. Every row
predicts the same number of tokens, so that the head reads only these columns and shapes never change.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from bigtx.config.schema import PretrainConfig
from bigtx.data.stream.rows import IGNORED_LABEL, Batch
from bigtx.pretraining.objectives.objective import Lengths, Objective, filled, tensor
from bigtx.tokenizer.tokenizer import Tokenizer
from bigtx.tokenizer.word_marks import begins_word
from bigtx.utils.errors import ConfigError

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
