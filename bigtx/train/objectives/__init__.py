"""What a row of text is turned into: what the model reads, and what it is asked for.

    row of T tokens ─▶ causal            the next token, everywhere
                       fill_in_middle    the same, of documents whose middle was moved to their end
                       masked            M tokens that are hidden; the encoder reads the rest both ways
                       span_corruption   spans that were cut out; the decoder writes them down
                       prefix            what follows the first part, which is read both ways

An objective makes batches of batches, in the loader's thread, and all that it draws follows from (seed, number of the
sequence): there is no state to save, and neither ranks nor micro batches change anything.
"""

from __future__ import annotations

from bigtx.config.schema import PretrainConfig
from bigtx.tokenizer.tokenizer import Tokenizer
from bigtx.train.objectives.objective import Lengths, Objective


def make_objective(config: PretrainConfig, tokenizer: Tokenizer, *, purpose: str) -> Objective:
    """The objective of a run.

    Args:
        purpose: train or validation: each draws its own.

    Raises:
        ConfigError: the tokenizer lacks ids that the objective needs, or its rows are too long or short for it.
    """
    from bigtx.train.objectives.causal import Causal
    from bigtx.train.objectives.fill_in_middle import FillInMiddle
    from bigtx.train.objectives.masked import Masked
    from bigtx.train.objectives.prefix import DecoderPrefix, SourcePrefix
    from bigtx.train.objectives.span_corruption import SpanCorruption

    kinds: dict[str, type[Objective]] = {
        "causal": Causal,
        "fill_in_middle": FillInMiddle,
        "masked": Masked,
        "span_corruption": SpanCorruption,
        "prefix": DecoderPrefix if config.model.shape == "decoder" else SourcePrefix,
    }
    return kinds[config.objective.name](config, tokenizer, purpose)


__all__ = ["Lengths", "Objective", "make_objective"]
