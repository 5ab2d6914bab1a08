"""What the engine trains: a task turns batches into losses. This module does not import deepspeed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from bigtx.model.experts import Routing
from bigtx.model.loss import Loss


class TaskLoss(NamedTuple):
    """What a task makes of a batch."""

    loss_sum: Tensor
    """fp32 scalar with a gradient, summed over the batch's labels."""
    reported_sum: Tensor
    """fp32 scalar: the part of it that is reported."""
    routing: Routing | None = None
    """Where the tokens went, if there are experts; what that costs is added by the engine."""

    @classmethod
    def of(cls, loss: Loss) -> TaskLoss:
        """A model's own loss, of which the cross-entropy is reported."""
        return cls(loss.loss_sum, loss.cross_entropy_sum, loss.routing)


class Task(Protocol):
    """What a batch means: see bigtx.finetuning.tasks."""

    def loss(self, model: Callable[..., Any], batch: Any) -> TaskLoss:
        """The loss of a batch."""
