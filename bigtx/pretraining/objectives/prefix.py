"""Prefix language modeling (arXiv:1910.10683, section 3.2.3): predict the text after a bidirectional prefix."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from bigtx.data.stream.rows import IGNORED_LABEL, Batch
from bigtx.pretraining.objectives.objective import Lengths, Objective, documents_of, filled, positions_of, tensor
from bigtx.pretraining.objectives.sides import Sides, TwoSided


class DecoderPrefix(Objective):
    """The objective of a decoder: a row, or each of its separate documents, is split at a random position."""

    @property
    def lengths(self) -> Lengths:
        """Return the whole row, in the decoder."""
        return Lengths(0, self.length, self.length)

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
