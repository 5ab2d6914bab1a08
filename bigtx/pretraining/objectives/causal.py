"""Causal language modeling: predict each next token, as in GPT."""

from __future__ import annotations

from bigtx.data.stream.rows import Batch
from bigtx.pretraining.objectives.objective import Lengths, Objective


class Causal(Objective):
    """Predict each next token."""

    bits_per_byte = True

    def prepare(self, batch: Batch) -> Batch:
        """Return the batch unchanged."""
        return batch

    @property
    def lengths(self) -> Lengths:
        """Return the whole row, in the decoder."""
        return Lengths(0, self.length, self.length)

    def describe(self) -> str:
        """Return a short description."""
        return "every next token"
