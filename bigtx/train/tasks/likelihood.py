"""Pretraining: the likelihood of the labels that an objective made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bigtx.config.schema import ExpertsConfig
from bigtx.data.stream.rows import Batch
from bigtx.engine.task import TaskLoss
from bigtx.model.loss import IGNORED
from bigtx.train.expert_losses import with_expert_losses


class LikelihoodTask:
    """Maximum likelihood of a batch's labels, with z-loss if asked for, and the losses of experts if there are any."""

    def __init__(self, *, z_loss: float, experts: ExpertsConfig) -> None:
        self.z_loss, self.experts = z_loss, experts

    def loss(self, model: Callable[..., Any], batch: Batch) -> TaskLoss:
        """The differentiable loss, and the plain cross-entropy, in nats."""
        result = model(**batch.inputs(), z_loss=self.z_loss)
        return with_expert_losses(result, (batch.labels != IGNORED).sum(), self.experts)
