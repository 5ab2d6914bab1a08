"""What a batch is for: a task turns a batch into a loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from bigtx.data.stream.rows import Batch


class LikelihoodTask:
    """Maximum likelihood of a batch's labels, with z-loss if asked for."""

    def __init__(self, *, z_loss: float) -> None:
        self.z_loss = z_loss

    def loss(self, model: Callable[..., Any], batch: Batch) -> tuple[Tensor, Tensor]:
        """Returns:
        The differentiable loss and the plain cross-entropy, fp32 scalars in nats summed over the batch's labels.
        """
        result = model(**batch.inputs(), z_loss=self.z_loss)
        return result.loss_sum, result.cross_entropy_sum
