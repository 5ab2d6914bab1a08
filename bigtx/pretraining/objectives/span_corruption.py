"""Span corruption (T5, arXiv:1910.10683): spans of a text are removed, and an encoder-decoder generates them.

    a row       Thank you for inviting me to your party last week
    source      Thank you <0> me to your party <1> week </s>
    target      <0> for inviting <1> last </s>

The numbers of removed tokens and of spans are the same for every row, so that both sides of a full row have known
lengths without padding.
"""

from __future__ import annotations

import numpy as np

from bigtx.config.schema import PretrainConfig
from bigtx.config.shape import noise_counts
from bigtx.pretraining.objectives.sides import Sides, TwoSided
from bigtx.tokenizer.tokenizer import Tokenizer
from bigtx.utils.errors import ConfigError


class SpanCorruption(TwoSided):
    """Remove spans from the source; they are the target."""

    def __init__(self, config: PretrainConfig, tokenizer: Tokenizer, purpose: str) -> None:
        """Raises:
        ConfigError: a row has more spans than the tokenizer has sentinels.
        """
        super().__init__(config, tokenizer, purpose)
        self.num_noise, self.num_spans = noise_counts(self.settings, self.length)
        if self.num_spans > len(tokenizer.sentinel_ids):
            raise ConfigError(
                f"objective.name=span_corruption removes {self.num_spans} spans of a row of {self.length} tokens, and "
                f"the tokenizer has only {len(tokenizer.sentinel_ids)} sentinels to mark them; lower "
                "train.sequence_length or objective.noise_density, or raise objective.mean_span_length"
            )
        self.sentinels = np.array(tokenizer.sentinel_ids)

    def describe(self) -> str:
        """Return a short description."""
        source, target, _ = self.lengths
        return (
            f"{self.num_spans} spans of {self.num_noise} tokens in all are removed from every {self.length}; the "
            f"encoder reads {source} tokens, the decoder {target}"
        )

    def put(
        self, sides: Sides, row: int, text: np.ndarray, documents: np.ndarray, generator: np.random.Generator
    ) -> None:
        """Remove random spans."""
        if len(text) == 1:
            return  # A single token has no span to remove.
        num_noise, num_spans = noise_counts(self.settings, len(text))
        kept = _random_parts(len(text) - num_noise, num_spans, generator)
        cut = _random_parts(num_noise, num_spans, generator)
        begins = np.cumsum(kept + cut) - cut
        is_noise = np.repeat(np.tile([False, True], num_spans), np.stack((kept, cut), axis=1).ravel())
        spans = np.arange(num_spans)
        source_marks, target_marks = np.cumsum(kept) + spans, np.cumsum(cut) - cut + spans
        from_source = _with_marks(np.flatnonzero(~is_noise), begins, source_marks, end=len(text) - 1)
        from_target = _with_marks(np.flatnonzero(is_noise), begins, target_marks, end=len(text) - 1)
        source, target = text[from_source], text[from_target]
        source[source_marks] = target[target_marks] = self.sentinels[:num_spans]
        source[-1] = target[-1] = self.tokenizer.end_id
        sides.put(row, source, documents[from_source], target, documents[from_target])
        # The part of a span beyond the end of its document cannot be predicted.
        begun = np.repeat(documents[begins], cut + 1)
        sides.ignore(row, np.flatnonzero(documents[from_target[:-1]] != begun))


def _with_marks(columns: np.ndarray, begins: np.ndarray, marks: np.ndarray, *, end: int) -> np.ndarray:
    """Return for each token of a side the column of the row whose document it belongs to.

    Args:
        columns: the columns of the row's tokens on this side.
        begins: the first column of each span, to which its sentinel belongs.
        marks: the positions of the sentinels on this side.
        end: the column of the side's last token.
    """
    result = np.empty(len(columns) + len(marks) + 1, np.int64)
    is_copied = np.ones(len(result), bool)
    is_copied[marks] = is_copied[-1] = False
    result[is_copied], result[marks], result[-1] = columns, begins, end
    return result


def _random_parts(total: int, count: int, generator: np.random.Generator) -> np.ndarray:
    """Return `count` positive integers that sum to `total`, with every such choice equally likely."""
    cuts = np.sort(generator.permutation(total - 1)[: count - 1]) + 1
    return np.diff(np.concatenate(([0], cuts, [total])))
