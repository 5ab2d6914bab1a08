"""The weights of a checkpoint as those of a model without adapters: W + alpha / rank * B A (see bigtx.model.lora)."""

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
        """Shape of each parameter, adapters left out."""
        return {name: shape for name, shape in super().shapes.items() if not is_adapter(name)}

    def read(self, name: str, kind: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of a flattened parameter or state, fp32 [stop - start].

        Raises:
            CheckpointError: the checkpoint does not hold them all.
        """
        value = super().read(name, kind, start, stop)
        module, _, which = name.rpartition(".")
        a, b = f"{module}.adapter.a", f"{module}.adapter.b"
        shapes = super().shapes
        if which != "weight" or a not in shapes or kind not in WEIGHT_KINDS:
            return value
        read_own = super().read
        matrices = [read_own(part, kind, 0, math.prod(shapes[part])).view(shapes[part]) for part in (b, a)]
        # The whole product for any range: other shapes may be added up in another order, and then other last bits would
        # reach an engine than the files.
        product = torch.mm(*matrices).view(-1)
        return value.add_(product[start:stop], alpha=self.manifest["adapter_scale"])
