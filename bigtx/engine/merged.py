"""Read a checkpoint as one of a model without adapters: W + alpha / rank * B A (see bigtx.model.lora)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bigtx.engine.checkpoint import WEIGHT_KINDS, Checkpoint
from bigtx.engine.trainable import is_adapter


class MergedCheckpoint(Checkpoint):
    """A checkpoint, read as if its adapters had been added to their matrices. One without adapters is read as it is."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of each parameter, without the adapters."""
        return {name: shape for name, shape in super().shapes.items() if not is_adapter(name)}

    def read(self, name: str, kind: str, start: int, stop: int) -> Tensor:
        """Read the elements [start, stop) of a flattened parameter or state.

        Returns:
            fp32 [stop - start].

        Raises:
            CheckpointError: the checkpoint does not have all of them.
        """
        value = super().read(name, kind, start, stop)
        module, _, which = name.rpartition(".")
        a, b = f"{module}.adapter.a", f"{module}.adapter.b"
        shapes = super().shapes
        if which != "weight" or a not in shapes or kind not in WEIGHT_KINDS:
            return value
        read_own = super().read
        matrices = [read_own(part, kind, 0, math.prod(shapes[part])).view(shapes[part]) for part in (b, a)]
        # Compute the whole product for any range: with other shapes the sums may have another order, and an engine
        # would get other last bits than the files.
        product = torch.mm(*matrices).view(-1)
        return value.add_(product[start:stop], alpha=self.manifest["adapter_scale"])
