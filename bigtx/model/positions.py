"""How a token knows where it stands: rotations, sinusoids, and T5's relative buckets.

Everything is computed in fp32 from the positions, once in a forward pass, and shared by all blocks. There are no
tables held as buffers: DeepSpeed would cast those to bf16, in which position 257 and position 258 are one number.
Shape letters: B batch (1 where all rows agree), T query tokens, S key tokens, C head width, H heads.
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


def rotation(config: ModelConfig, positions: Tensor) -> Rotation:
    """The rotary angles (arXiv:2104.09864) of positions [B, T]."""
    frequencies, magnitude = rotary_frequencies(config, positions.device)
    angles = positions[:, None, :, None].float() * frequencies  # B 1 T C/2
    return angles.cos() * magnitude, angles.sin() * magnitude


def rotate(x: Tensor, by: Rotation) -> Tensor:
    """Rotate x [B, heads, T, C] in fp32: dimension i turns with i + C/2, the layout of Llama's published weights.

    Returns:
        The rotated x, of x's type.
    """
    cos, sin = by
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def rotary_frequencies(config: ModelConfig, device: torch.device | str) -> tuple[Tensor, float]:
    """Radians per position of each pair of dimensions, fp32 [C/2], and the factor that YaRN puts on cos and sin."""
    width, scaling = shape.head_width(config), config.rope_scaling
    assert width % 2 == 0, "rotary positions turn pairs of dimensions: the head width must be even"
    exponents = torch.arange(0, width, 2, dtype=torch.float32, device=device) / width
    frequencies = config.rope_theta**-exponents
    if scaling.method == "none":
        return frequencies, 1.0
    stretched = frequencies / scaling.factor
    if scaling.method == "linear":
        return stretched, 1.0
    if scaling.method == "llama3":
        # The share of each frequency that stays as it was, by how often it turns within the original length.
        turns = scaling.original_length * frequencies / (2 * math.pi)
        low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
        kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)
        return stretched + (frequencies - stretched) * kept, 1.0
    low, high = (_yarn_dimension(config, width, beta) for beta in (scaling.beta_fast, scaling.beta_slow))
    low, high = max(math.floor(low), 0), min(math.ceil(high), width - 1)
    index = torch.arange(width // 2, dtype=torch.float32, device=device)
    kept = 1.0 - ((index - low) / max(high - low, 1e-3)).clamp(0.0, 1.0)
    return stretched + (frequencies - stretched) * kept, 0.1 * math.log(scaling.factor) + 1.0


def _yarn_dimension(config: ModelConfig, width: int, turns: float) -> float:
    """The pair of dimensions that makes this many turns within the original length (arXiv:2309.00071, section 3.2)."""
    per_radian = config.rope_scaling.original_length / (turns * 2 * math.pi)
    return width * math.log(per_radian) / (2 * math.log(config.rope_theta))


def sinusoids(positions: Tensor, size: int) -> Tensor:
    """Fixed waves (arXiv:1706.03762), fp32 [B, T, size], of positions [B, T]: sines, then cosines."""
    half = (size + 1) // 2
    exponents = torch.arange(half, dtype=torch.float32, device=positions.device) / half
    angles = positions[..., None].float() * 10_000.0**-exponents  # B T D/2
    return torch.cat((angles.sin(), angles.cos()), dim=-1)[..., :size]


class RelativeBias(nn.Module):
    """T5's bias on attention scores by bucketed distance (arXiv:1910.10683), one table for all blocks."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_buckets = config.relative_num_buckets
        self.max_distance = config.relative_max_distance
        self.table = Embedding(config.relative_num_buckets, config.num_heads)

    def forward(self, query_positions: Tensor, key_positions: Tensor) -> Tensor:
        """The bias [B, H, T, S] for query positions [B, T] and key positions [B, S]."""
        distance = (query_positions[:, :, None] - key_positions[:, None, :]).clamp(min=0)  # B T S
        return self.table(self.bucket(distance)).permute(0, 3, 1, 2)

    def bucket(self, distance: Tensor) -> Tensor:
        """Bucket of each distance back: exact for the first half of the buckets, then by its logarithm."""
        exact = self.num_buckets // 2
        octaves = torch.log(distance.clamp(min=1).float() / exact) / math.log(self.max_distance / exact)
        far = exact + (octaves * (self.num_buckets - exact)).long()
        return torch.where(distance < exact, distance, far.clamp(max=self.num_buckets - 1))
