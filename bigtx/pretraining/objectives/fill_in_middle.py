"""Fill in the middle (arXiv:2207.14255): a decoder learns to generate the text between two others.

    a document              prefix middle suffix
    prefix, suffix first    <prefix> prefix <suffix> suffix <middle> middle
    suffix first            <prefix> <suffix> suffix <middle> prefix middle

The three marks are the tokenizer's last three sentinels.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from bigtx.config.schema import PretrainConfig
from bigtx.data.stream.rows import IGNORED_LABEL, Batch
from bigtx.pretraining.objectives.objective import Lengths, Objective, filled, positions_of, tensor
from bigtx.tokenizer.tokenizer import Tokenizer
from bigtx.utils.errors import ConfigError

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

    @property
    def lengths(self) -> Lengths:
        """Return the whole row, in the decoder."""
        return Lengths(0, self.length, self.length)

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
