"""The interface between the engine and a task, which turns batches into losses. It does not import deepspeed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from bigtx.model.experts import Routing
from bigtx.model.loss import Loss


class TaskLoss(NamedTuple):
    """The loss of a batch."""

    loss_sum: Tensor
    """fp32 scalar with a gradient, summed over the batch's labels."""
    reported_sum: Tensor
    """fp32 scalar: the part of the loss that is reported."""
    routing: Routing | None = None
    """The routing of the tokens, if there are experts; the engine adds the losses that it causes."""

    @classmethod
    def of(cls, loss: Loss) -> TaskLoss:
        """Return a model's loss, with the cross-entropy as the reported part."""
        return cls(loss.loss_sum, loss.cross_entropy_sum, loss.routing)


class Task(Protocol):
    """The meaning of a batch; see bigtx.finetuning.tasks."""

    def loss(self, model: Callable[..., Any], batch: Any) -> TaskLoss:
        """Return the loss of a batch."""
