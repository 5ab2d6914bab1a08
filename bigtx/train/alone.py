"""A model on one device with the interface of an engine and its ranks, for `bigtx evaluate`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from bigtx.engine.task import Task
from bigtx.model.transformer import Transformer


class Alone:
    """The engine of a measurement with a single process.

    Attributes:
        rank, world_size: always 0 and 1.
        module: the model, in evaluation mode.
    """

    rank, world_size = 0, 1

    def __init__(self, model: Transformer) -> None:
        self.module = model.eval()

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Any], task: Task) -> tuple[float, int]:
        """Return the reported loss summed over all labels, and their number, as `Engine.evaluate` does."""
        device = next(self.module.parameters()).device
        loss_sum, num_labels = torch.zeros((), dtype=torch.float64, device=device), 0
        for batch in batches:
            num_labels += batch.num_labels
            loss_sum += task.loss(self.module, batch.to(device)).reported_sum
        return float(loss_sum), num_labels

    def from_first(self, value: Any) -> Any:
        """Return the value: this process is rank 0."""
        return value
