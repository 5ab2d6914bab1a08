"""The initial weights of each parameter, from the seed and the parameter's name.

So the initial weights do not depend on the number of ranks or the order of initialization, and any rank can
compute only the piece that it owns: values are drawn in runs of a fixed length, each from its own generator.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
import torch
from torch import Tensor

from bigtx.config import shape as shapes
from bigtx.config.schema import ModelConfig

RUN = 2**20
"""The number of values from one generator; it is part of the meaning of (seed, name), so it never changes."""

PROJECTIONS = ("attention.output.weight", "mlp.down.weight", "mlp.down", "mlp.shared.down.weight")
"""The matrices that write into the residual stream; those of experts too, all in one parameter."""


def initial_value(
    name: str, shape: tuple[int, ...], config: ModelConfig, seed: int, start: int = 0, stop: int | None = None
) -> Tensor:
    """Return the initial value of one parameter, or of a piece of it.

    Args:
        name: the name in `named_parameters()`.
        shape: the shape of the whole parameter.
        start, stop: the piece, as a range of the flattened parameter; the default is the whole parameter.

    Returns:
        fp32 on the CPU: of `shape` without a range, else flat [stop - start].
    """
    total = math.prod(shape)
    whole = start == 0 and stop is None
    stop = total if stop is None else stop
    assert 0 <= start <= stop <= total, f"{name}: no piece {start}:{stop} of {total} values"
    deviation = 1 / math.sqrt(3 * shape[1]) if name.endswith(".adapter.a") else _deviation(name, config)
    if name.endswith("norm.weight"):
        value = torch.ones(stop - start)
    elif name.endswith((".bias", ".adapter.b")) or deviation == 0.0:
        value = torch.zeros(stop - start)
    else:
        value = torch.from_numpy(_normal(name, seed, start, stop)).mul_(deviation)
    return value.view(shape) if whole else value


def _deviation(name: str, config: ModelConfig) -> float:
    if name == "bigrams.table.weight":
        return 0.0  # So that a new table does not change a model's output at first.
    if name == "bigrams.widen.weight":
        return 1 / math.sqrt(shapes.bigram_size(config))
    if name.endswith("attention.query.weight") and config.attention_scale:
        # So that the initial scores are as large as with the usual scale.
        return config.init_std / (config.attention_scale * math.sqrt(shapes.head_width(config)))
    if not name.endswith(PROJECTIONS) or config.init == "normal":
        return config.init_std
    if config.init == "zero_projections":
        return 0.0
    across = config.shape == "encoder_decoder" and name.startswith("decoder.")
    num_sums = 3 * shapes.num_decoder_layers(config) if across else 2 * config.num_layers
    return config.init_std / math.sqrt(num_sums)


def _normal(name: str, seed: int, start: int, stop: int) -> np.ndarray:
    """Return the standard normal values start:stop of the endless sequence of (seed, name)."""
    values = np.empty(stop - start, dtype=np.float32)
    for run in range(start // RUN, -(-stop // RUN)):
        key = hashlib.sha256(f"{seed}/{name}/{run}".encode()).digest()
        generator = np.random.Generator(np.random.PCG64(int.from_bytes(key[:16], "little")))
        first, last = max(start, run * RUN), min(stop, (run + 1) * RUN)
        drawn = generator.standard_normal(last - run * RUN, dtype=np.float32)
        values[first - start : last - start] = drawn[first - run * RUN :]
    return values
