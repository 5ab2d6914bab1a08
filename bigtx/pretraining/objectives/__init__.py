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

from bigtx.config.schema import PretrainConfig
from bigtx.pretraining.objectives.objective import Lengths, Objective
from bigtx.tokenizer.tokenizer import Tokenizer


def make_objective(config: PretrainConfig, tokenizer: Tokenizer, *, purpose: str) -> Objective:
    """Return the objective of a run.

    Args:
        purpose: "train", or "validation", whose draws are the same for every seed.

    Raises:
        ConfigError: the tokenizer lacks ids that the objective needs.
    """
    from bigtx.pretraining.objectives.causal import Causal
    from bigtx.pretraining.objectives.fill_in_middle import FillInMiddle
    from bigtx.pretraining.objectives.masked import Masked
    from bigtx.pretraining.objectives.prefix import DecoderPrefix, SourcePrefix
    from bigtx.pretraining.objectives.span_corruption import SpanCorruption

    kinds: dict[str, type[Objective]] = {
        "causal": Causal,
        "fill_in_middle": FillInMiddle,
        "masked": Masked,
        "span_corruption": SpanCorruption,
        "prefix": DecoderPrefix if config.model.shape == "decoder" else SourcePrefix,
    }
    return kinds[config.objective.name](config, tokenizer, purpose)


__all__ = ["Lengths", "Objective", "make_objective"]
