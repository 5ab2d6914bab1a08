"""Messages of fine-tuning before its first step: its length, and embeddings that it needs but does not train."""

from __future__ import annotations

import math
from fnmatch import fnmatchcase

from bigtx.config.load import load_run_config
from bigtx.config.schema import FinetuneConfig, RunConfig
from bigtx.config.schema.tasks import ANSWERING
from bigtx.engine.trainable import is_trained
from bigtx.utils.errors import BigtxError
from bigtx.utils.shell import setting

FEW_STEPS = 30
"""Fewer steps than this train little: most of them belong to the learning rate's warm-up and decay."""
SOME_STEPS = 100
"""The number of steps that the warning about too few steps suggests."""
TABLE = "embedding.weight"
"""The parameter with a row for each token."""


def total_steps(config: FinetuneConfig, num_rows: int) -> int:
    """Return the number of optimizer steps of a run.

    Args:
        num_rows: the rows of an epoch: records, or packed rows of them.
    """
    train = config.train
    if train.max_steps is not None:
        return train.max_steps
    assert train.epochs is not None
    return max(train.min_steps, _steps_of_epochs(config, num_rows))


def length_setting(config: FinetuneConfig, num_rows: int) -> str:
    """Return the setting that determines the length of a run."""
    if config.train.max_steps is not None:
        return "train.max_steps"
    return "train.min_steps" if config.train.min_steps > _steps_of_epochs(config, num_rows) else "train.epochs"


def _steps_of_epochs(config: FinetuneConfig, num_rows: int) -> int:
    assert config.train.epochs is not None
    return max(1, -(-round(config.train.epochs * num_rows) // config.train.global_batch_size))


def describe_length(config: FinetuneConfig, total_steps: int, num_rows: int) -> list[str]:
    """Describe the steps and epochs of a run, with a warning if there are few steps.

    Args:
        total_steps: the number of steps of the whole run.
        num_rows: the rows of an epoch: records, or packed rows of them.
    """
    train = config.train
    size = train.global_batch_size
    asked = ""
    if train.epochs is not None:
        asked = f" (train.epochs={train.epochs:g} in whole steps)"
        if length_setting(config, num_rows) == "train.min_steps":
            alone = _steps_of_epochs(config, num_rows)
            asked = (
                f" (train.min_steps={train.min_steps}, since train.epochs={train.epochs:g} would be {alone:,} steps)"
            )
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


def describe_held_out(config: FinetuneConfig) -> str:
    """Return the message that there are no validation records, and why."""
    data = config.data
    why = "data.validation_fraction"
    if data.validation_fraction and data.min_held_out:
        why = f"{setting('data.validation_fraction', data.validation_fraction)} would hold out fewer than "
        why += setting("data.min_held_out", data.min_held_out)
    return f"no validation records: the newest checkpoint counts as the best ({why})"


def describe_trained(config: FinetuneConfig, *, is_all: bool) -> str:
    """Return the learning rate, and that all parameters are trained, if they are."""
    rate = f"peak learning rate {config.optimizer.learning_rate:.3g}"
    roles = ", with the embeddings of the chat roles" if knows_chats(config) else ""
    return f"trained: all parameters{roles}; {rate}" if is_all else rate


def untrained_roles(config: FinetuneConfig, base: str) -> str:
    """Return the warning that the embeddings of chat roles are untrained and frozen, or "".

    Args:
        base: the run that the weights come from.
    """
    if not knows_chats(config) or is_trained(config, TABLE) or _knows_roles(base):
        return ""
    optimizer = config.optimizer
    if config.model.lora.rank and is_trained(config, TABLE, also=[TABLE]):
        key, names = "optimizer.train_also", [*optimizer.train_also, "embedding.*"]
    else:
        key, names = "optimizer.freeze", [name for name in optimizer.freeze if not fnmatchcase(TABLE, name)]
    return (
        f"warning: {base} was not trained on chats, so the embeddings of the chat roles are still random, and they "
        f"are frozen in this run: the model cannot distinguish the roles; write {setting(key, names)}"
    )


def knows_chats(config: RunConfig) -> bool:
    """Return whether a run trains on chats in the format with roles."""
    return isinstance(config, FinetuneConfig) and config.chat.format == "chat" and config.task in ANSWERING


def _knows_roles(base: str | None) -> bool:
    """Return whether a run, or one of its bases, has trained the embeddings of chat roles; True if it is unknown."""
    while base is not None:
        try:
            config = load_run_config(base)
        except BigtxError:
            return True
        if knows_chats(config) and is_trained(config, TABLE):
            return True
        base = config.base if isinstance(config, FinetuneConfig) else None
    return False
