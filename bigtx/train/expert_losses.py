"""What a mixture of experts adds to the loss."""

from __future__ import annotations

from torch import Tensor

from bigtx.config.schema import ExpertsConfig
from bigtx.engine.task import TaskLoss
from bigtx.model.loss import Loss


def with_expert_losses(loss: Loss, num_labels: Tensor, settings: ExpertsConfig) -> TaskLoss:
    """Add the losses of the routing, if there is any; what is reported stays the cross-entropy.

    Args:
        loss: the model's, of one micro batch.
        num_labels: its labels, a scalar: sums are divided by all labels later, and these losses are means already.
        settings: their weights.

    Returns:
        The loss, to be returned by a task.
    """
    loss_sum, routing = loss.loss_sum, loss.routing
    if routing is not None:
        added = settings.balance_loss * routing.balance + settings.router_z_loss * routing.z
        loss_sum = loss_sum + added * num_labels
    return TaskLoss(loss_sum, loss.cross_entropy_sum, routing)
