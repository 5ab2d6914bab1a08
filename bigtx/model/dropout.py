"""Dropout whose masks depend only on the seed, the row's number in the run and the place in the model.

So the masks do not depend on the number of ranks, the micro batch, or the padding of its rows, and a
forward pass that is recomputed for the backward pass drops the same. The numbers come from a counter-based generator
similar to SplitMix64 (Steele, Lea and Flood, OOPSLA 2014), with four numbers of 16 bits in a word.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

STEPS = 2**16
"""The number of values of a random number; a rate is rounded to a multiple of 1 / STEPS."""
_PER_WORD = 4


def fold(seeds: Tensor, number: int | Tensor) -> Tensor:
    """Combine int64 seeds [...] with a number, or with numbers that broadcast together, to new seeds."""
    x = (seeds + number) * -0x61C8864680B583EB
    # torch shifts in copies of the sign, which costs a bit of 64; each product spreads the others over all higher
    # lanes.
    x.bitwise_xor_(x >> 32).mul_(-0x40A7B892E31B1A47).bitwise_xor_(x >> 29).mul_(-0x6B2FB644ECCEEE15)
    return x


def dropout_mask(shape: Sequence[int], rate: float, seeds: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the factors of dropout: 0, or 1 / (1 - rate).

    Args:
        shape: [B, ..., N]. An element depends on its own row's seed and its own indices within the row, not on the
            other lengths.
        rate: the probability of 0.
        seeds: int64 [B].
    """
    *middle, width = shape[1:]
    words = seeds
    for length in (*middle, -(-width // _PER_WORD)):
        words = fold(words[..., None], torch.arange(length, device=seeds.device))
    numbers = words.view(torch.int16)[..., :width]  # -STEPS / 2 ... STEPS / 2 - 1
    dropped = round(rate * STEPS)
    # Compared in place, because torch converts booleans to numbers slowly on a CPU.
    return numbers.ge_(dropped - STEPS // 2).to(dtype).mul_(STEPS / (STEPS - dropped))


class Dropout:
    """Dropout at one place of a model.

    Attributes:
        rate: the probability of dropping an element.
    """

    def __init__(self, rate: float, place: str) -> None:
        """Args: place: its name, unique among all with the same seeds."""
        self.rate, self._place = rate, zlib.crc32(place.encode())

    def __call__(self, x: Tensor, seeds: Tensor | None) -> Tensor:
        """Drop elements of x [B, ..., N], by int64 seeds [B]; return x itself without seeds or without a rate."""
        mask = self.mask(x.shape, seeds, x.dtype)
        return x if mask is None else x * mask

    def mask(self, shape: Sequence[int], seeds: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """Return the factors for an x of this shape, or None if nothing is dropped."""
        if seeds is None or not self.rate:
            return None
        return dropout_mask(shape, self.rate, fold(seeds, self._place), dtype)
