"""The task of pretraining: the likelihood of an objective's labels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bigtx.data.stream.rows import Batch
from bigtx.engine.task import TaskLoss


class LikelihoodTask:
    """Maximum likelihood of a batch's labels, with an optional z-loss."""

    def __init__(self, *, z_loss: float) -> None:
        self.z_loss = z_loss

    def loss(self, model: Callable[..., Any], batch: Batch) -> TaskLoss:
        """Return the differentiable loss, and the plain cross-entropy, in nats."""
        return TaskLoss.of(model(**batch.inputs(), z_loss=self.z_loss))
