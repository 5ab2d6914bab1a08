"""Distillation on plain text: every record is a text, and each token is predicted from those before it.

The teacher works as for every task (see bigtx.train.teacher). A text is an answer without a prompt:

    </s> text </s>      with loss on all but the first token, which marks the beginning of a text

(The tokenizer of an imported model may have its own begin ids instead.)

Corpora that do not fit into memory, and encoders and encoder-decoders, are distilled by pretraining with
`distill.teacher`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from bigtx.config.schema import FinetuneConfig
from bigtx.data.records.record import Record
from bigtx.finetuning.tasks.sft import ChatExample, Sft
from bigtx.finetuning.tasks.task import Examples, Model, Prediction, some_ids
from bigtx.tokenizer.tokenizer import Tokenizer


class Distill(Sft):
    """Learn the teacher's distribution over plain text; predictions are the likelihoods of texts."""

    generates = False

    def __init__(self, config: FinetuneConfig, tokenizer: Tokenizer) -> None:
        super(Sft, self).__init__(config, tokenizer)  # A text has no chat format.
        self.settings = config.sft
        self.require_length(2)

    @classmethod
    def resolve(cls, config: FinetuneConfig, tokenizer: Tokenizer, records: Sequence[Record]) -> FinetuneConfig:
        """Return the config with a head of tokens."""
        return super(Sft, cls).resolve(config, tokenizer, records)

    @property
    def text_field(self) -> str | None:
        """Return the field of the text."""
        return self.fields.text

    def encode(self, record: Record, *, for_training: bool = True) -> ChatExample:
        """Encode a text, with the begin ids of the tokenizer (or an end id) before it, and an end id after it."""
        ids = some_ids(self.tokenizer, self.fields.text, record.text(self.fields.text, setting="data.fields.text"))
        before = self.tokenizer.begin_ids or [self.tokenizer.end_id]
        kept = self.cut(ids, self.max_length - len(before))
        whole = [*before, *kept, self.tokenizer.end_id]
        is_answer = np.arange(len(whole)) >= len(before)
        return ChatExample(np.array(whole, np.int32), is_answer, len(before), len(ids) - len(kept))

    @torch.no_grad()
    def predict(self, model: Model, examples: Sequence[ChatExample], device: torch.device) -> list[Prediction]:
        """Return the mean cross-entropy of a text's tokens in nats, and their number."""
        return [
            {"loss": score["_loss_sum"] / score["_num_tokens"], "tokens": score["_num_tokens"]} | score
            for score in self.predict_in_run(model, examples, device)
        ]

    def review(self, splits: Mapping[str, Examples]) -> list[str]:
        """Return no warnings, since a text is not a chat."""
        return []

    def shown(self, record: Record) -> str:
        """Return the text."""
        return str(record.value(self.fields.text) or "")

    def answer(self, record: Record) -> str:
        """Return "", since a text has no answer."""
        return ""
