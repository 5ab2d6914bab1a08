"""The number of batches of a run, and the division of a batch over the ranks."""

from __future__ import annotations

from collections.abc import Iterator

from bigtx.config.nodes import Problem
from bigtx.config.schema.training import PretrainConfig, RhythmConfig


def batch_problems(train: RhythmConfig, num_ranks: int) -> Iterator[Problem]:
    """Yield a problem where so many ranks cannot share the global batch evenly."""
    total = train.global_batch_size
    if total % num_ranks:
        below, above = total // num_ranks * num_ranks, -(-total // num_ranks) * num_ranks
        fitting = f"{below} or {above}" if below else str(above)
        yield Problem(
            "train.global_batch_size",
            str(total),
            f"cannot be divided over {num_ranks} ranks; {fitting} can, or use another number of ranks",
        )


def micro_batch_size_of(train: RhythmConfig, num_ranks: int) -> int:
    """Return the number of sequences of a micro batch: the largest that divides a rank's share and is not above what
    the config allows.
    """
    share = train.global_batch_size // num_ranks
    return next(size for size in range(min(train.micro_batch_size, share), 0, -1) if share % size == 0)


def total_steps(config: PretrainConfig) -> int:
    """Optimizer steps of a pretraining."""
    train = config.train
    if train.max_steps is not None:
        return train.max_steps
    assert train.max_tokens is not None
    return -(-train.max_tokens // (train.global_batch_size * train.sequence_length))
