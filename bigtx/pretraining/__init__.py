"""Pretraining: its inputs, its objectives, and the run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bigtx.utils import imported

if TYPE_CHECKING:
    from bigtx.config.schema import PretrainConfig
    from bigtx.pretraining.objectives import Objective
    from bigtx.tokenizer.tokenizer import Tokenizer

OBJECTIVES = {
    "causal": "bigtx.pretraining.objectives:Causal",
    "fill_in_middle": "bigtx.pretraining.objectives:FillInMiddle",
    "masked": "bigtx.pretraining.objectives:Masked",
    "span_corruption": "bigtx.pretraining.source_and_target:SpanCorruption",
    "prefix": "bigtx.pretraining.source_and_target:SourcePrefix",
    "prefix of a decoder": "bigtx.pretraining.source_and_target:DecoderPrefix",
}
"""The class of each `objective.name`."""


def make_objective(config: PretrainConfig, tokenizer: Tokenizer, *, purpose: str) -> Objective:
    """Return the objective of a run.

    Args:
        purpose: "train", or "validation", whose draws are the same for every seed.

    Raises:
        ConfigError: the tokenizer lacks ids that the objective needs.
    """
    is_of_decoder = config.objective.name == "prefix" and config.model.shape == "decoder"
    kind: type[Objective] = imported(OBJECTIVES["prefix of a decoder" if is_of_decoder else config.objective.name])
    return kind(config, tokenizer, purpose)
