"""Positions of tokens: rotations, sinusoids, and T5's relative buckets.

Everything is computed in fp32 from the positions, once per forward pass, and shared by all blocks. There are no
tables in buffers: DeepSpeed would cast them to bf16, in which position 257 and position 258 are the same number.
Shape letters: B batch (1 if all rows agree), T query tokens, S key tokens, C head width, H heads.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from bigtx.config import shape
from bigtx.config.schema import ModelConfig
from bigtx.model.layers import Embedding

Rotation = tuple[Tensor, Tensor]
"""cos and sin of each position's angles, each fp32 [B, 1, T, C/2]."""


def rotation(config: ModelConfig, positions: Tensor, *, local: bool = False) -> Rotation:
    """Return the rotary angles (arXiv:2104.09864) of positions [B, T], in blocks with a window (`local`) or without."""
    theta = (config.local_rope_theta if local else None) or config.rope_theta
    frequencies, magnitude = rotary_frequencies(config, theta, positions.device)
    angles = positions[:, None, :, None].float() * frequencies  # B 1 T C/2
    return angles.cos() * magnitude, angles.sin() * magnitude


def rotate(x: Tensor, by: Rotation) -> Tensor:
    """Rotate x [B, heads, T, C] in fp32: dimension i rotates with i + C/2, the layout of Llama's published weights.

    Returns:
        The rotated x, of x's type.
    """
    cos, sin = by
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def rotary_frequencies(config: ModelConfig, theta: float, device: torch.device | str) -> tuple[Tensor, float]:
    """Return the radians per position of each pair of dimensions, fp32 [C/2], and YaRN's factor on cos and
    sin.
    """
    width, scaling = shape.head_width(config), config.rope_scaling
    assert width % 2 == 0, "rotary positions rotate pairs of dimensions: the head width must be even"
    exponents = torch.arange(0, width, 2, dtype=torch.float32, device=device) / width
    frequencies = theta**-exponents
    if scaling.method == "none":
        return frequencies, 1.0
    stretched = frequencies / scaling.factor
    if scaling.method == "linear":
        return stretched, 1.0
    if scaling.method == "llama3":
        # The share of each frequency that is not changed, by its rotations within the original length.
        turns = scaling.original_length * frequencies / (2 * math.pi)
        low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
        kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)
        return stretched + (frequencies - stretched) * kept, 1.0
    low, high = (_yarn_dimension(config, theta, width, beta) for beta in (scaling.beta_fast, scaling.beta_slow))
    low, high = max(math.floor(low), 0), min(math.ceil(high), width - 1)
    index = torch.arange(width // 2, dtype=torch.float32, device=device)
    kept = 1.0 - ((index - low) / max(high - low, 1e-3)).clamp(0.0, 1.0)
    return stretched + (frequencies - stretched) * kept, 0.1 * math.log(scaling.factor) + 1.0


def _yarn_dimension(config: ModelConfig, theta: float, width: int, turns: float) -> float:
    """Return the pair of dimensions with this many rotations within the original length (arXiv:2309.00071, section
    3.2).
    """
    per_radian = config.rope_scaling.original_length / (turns * 2 * math.pi)
    return width * math.log(per_radian) / (2 * math.log(theta))


def sinusoids(positions: Tensor, size: int) -> Tensor:
    """Return fixed waves (arXiv:1706.03762), fp32 [B, T, size], of positions [B, T]: sines, then cosines."""
    half = (size + 1) // 2
    exponents = torch.arange(half, dtype=torch.float32, device=positions.device) / half
    angles = positions[..., None].float() * 10_000.0**-exponents  # B T D/2
    return torch.cat((angles.sin(), angles.cos()), dim=-1)[..., :size]


class RelativeBias(nn.Module):
    """T5's bias on attention scores by bucketed distance (arXiv:1910.10683), one table for all blocks of a stack."""

    def __init__(self, config: ModelConfig, *, both_ways: bool) -> None:
        """Args: both_ways: whether tokens attend to later ones; half of the buckets are for these."""
        super().__init__()
        self.num_buckets = config.relative_num_buckets
        self.max_distance = config.relative_max_distance
        self.both_ways = both_ways
        self.table = Embedding(config.relative_num_buckets, config.num_heads)

    def forward(self, query_positions: Tensor, key_positions: Tensor) -> Tensor:
        """Return the bias [B, H, T, S] for query positions [B, T] and key positions [B, S]."""
        behind = query_positions[:, :, None] - key_positions[:, None, :]  # B T S
        return self.table(self.bucket(behind)).permute(0, 3, 1, 2)

    def bucket(self, behind: Tensor) -> Tensor:
        """Return the bucket of each distance back (negative for keys ahead): exact if small, else by its logarithm."""
        num_buckets = self.num_buckets // 2 if self.both_ways else self.num_buckets
        exact = num_buckets // 2
        distance = behind.abs() if self.both_ways else behind.clamp(min=0)
        octaves = torch.log(distance.clamp(min=1).float() / exact) / math.log(self.max_distance / exact)
        far = (exact + (octaves * (num_buckets - exact)).long()).clamp(max=num_buckets - 1)
        bucket = torch.where(distance < exact, distance, far)
        return bucket + num_buckets * (behind < 0) if self.both_ways else bucket
