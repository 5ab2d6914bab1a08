"""Dropout, with four random numbers to a word on a CPU: torch draws a word for each element there, and one after the
other, which takes longer than the matrix product before it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

STEPS = 2**16
"""Values of a random number; a rate is rounded to a multiple of 1 / STEPS."""


def dropout(x: Tensor, rate: float, training: bool = True) -> Tensor:
    """x with each element zero with probability `rate`, the others divided by 1 - rate; x itself if not training."""
    if not (training and rate):
        return x
    return x * dropout_mask(x.shape, rate, x) if x.device.type == "cpu" else F.dropout(x, rate)


def dropout_mask(shape: Sequence[int], rate: float, like: Tensor) -> Tensor:
    """What dropout multiplies with: 0, or 1 / (1 - rate); of the dtype and the device of `like`."""
    if like.device.type != "cpu":
        return F.dropout(like.new_ones(tuple(shape)), rate)
    count, dropped = torch.Size(shape).numel(), round(rate * STEPS)
    words = torch.empty(-(-count // 4), dtype=torch.int64).random_(-(2**63), None)
    numbers = words.view(torch.int16)[:count].view(tuple(shape))  # -STEPS / 2 ... STEPS / 2 - 1
    return (numbers >= dropped - STEPS // 2).to(like.dtype).mul_(STEPS / (STEPS - dropped))
