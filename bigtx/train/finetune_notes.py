"""What a fine-tuning says before its first step about its length, and about embeddings that it needs and does not
train."""

from __future__ import annotations

import math

from bigtx.config.load import load_run_config
from bigtx.config.schema import FinetuneConfig, RunConfig
from bigtx.config.schema.finetuning import ANSWERING
from bigtx.engine.trainable import is_trained
from bigtx.utils.errors import BigtxError
from bigtx.utils.shell import setting

FEW_STEPS = 30
"""Fewer steps than this hardly teach anything: the warm-up and the decay of the learning rate take most of them."""
SOME_STEPS = 100
"""Steps that the warning about too few offers."""
TABLE = "embedding.weight"
"""The parameter with a row for each token."""


def describe_length(config: FinetuneConfig, total_steps: int, num_rows: int) -> list[str]:
    """The steps of a run and the epochs that they make, and a warning if they are few.

    Args:
        total_steps: of the whole run.
        num_rows: what an epoch consists of: records, or packed rows of them.
    """
    train = config.train
    size = train.global_batch_size
    asked = f" (train.epochs={train.epochs:g} in whole steps)" if train.epochs is not None else ""
    said = [f"{total_steps:,} steps of {size:,} make {total_steps * size / num_rows:.3g} epochs{asked}"]
    if total_steps < FEW_STEPS:
        advice = f"train.max_steps={SOME_STEPS}"
        if train.epochs is not None:
            advice = f"train.epochs={math.ceil(SOME_STEPS * size / num_rows)}, which makes {SOME_STEPS} steps or more"
        said.append(
            f"warning: {total_steps:,} steps are so few that the model will hardly learn anything; write e.g. "
            f"{advice}, or a smaller train.global_batch_size"
        )
    return said


def untrained_roles(config: FinetuneConfig, base: str) -> str:
    """The warning that chat roles keep embeddings which nothing has ever trained, or "".

    Args:
        base: the run that the weights come from.
    """
    if not _has_roles(config) or is_trained(config, TABLE) or _knows_roles(base):
        return ""
    optimizer = config.optimizer
    if config.model.lora.rank and is_trained(config, TABLE, also=[TABLE]):
        advice = f"write {setting('optimizer.train_also', [*optimizer.train_also, 'embedding.*'])}"
    else:
        advice = f"take {TABLE} out of {setting('optimizer.freeze', optimizer.freeze)}"
    return (
        f"warning: {base} has never been trained on chats, so the embeddings of the chat roles are as the seed made "
        f"them, and they are frozen here: the model cannot tell who speaks; {advice}"
    )


def _has_roles(config: RunConfig) -> bool:
    return isinstance(config, FinetuneConfig) and config.chat.format == "chat" and config.task in ANSWERING


def _knows_roles(base: str | None) -> bool:
    """Whether a run, or one that it began from, has trained the embeddings of chat roles; also if nobody can tell."""
    while base is not None:
        try:
            config = load_run_config(base)
        except BigtxError:
            return True
        if _has_roles(config) and is_trained(config, TABLE):
            return True
        base = config.base if isinstance(config, FinetuneConfig) else None
    return False
