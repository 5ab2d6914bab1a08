"""The front end from a log-mel spectrogram to the columns of an encoder: convolutions over frames (arXiv:2212.04356).

A convolution is computed as a matrix product of concatenated neighbouring frames: the same arithmetic, in a form
that is fast in bf16 on every device. Shape letters: B batch, F frames, M mel bins, S columns, D hidden size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bigtx.config import shape
from bigtx.config.schema import ModelConfig
from bigtx.model.layers import Linear


class FrontEnd(nn.Module):
    """Convolutions of width 3, each followed by GELU; all of them read zeros after the end of a recording."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        size, self.strides = config.hidden_size, list(config.audio.strides)
        inputs = [config.audio.num_mel_bins] + [size] * (len(self.strides) - 1)
        self.convolutions = nn.ModuleList(Linear(shape.CONVOLUTION_WIDTH * width, size, bias=True) for width in inputs)

    def forward(self, features: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Map features fp32 [B, F, M], of recordings with `lengths` int64 [B] frames, to columns.

        Returns:
            The columns [B, S, D], and the number of them that each recording has, int64 [B].
        """
        x: Tensor = features.to(self.convolutions[0].weight.dtype)  # type: ignore[arg-type]
        for convolution, stride in zip(self.convolutions, self.strides, strict=True):
            x = F.gelu(convolution(neighbours(_silenced(x, lengths), stride)))
            lengths = -(-lengths // stride)
        return x, lengths


def neighbours(x: Tensor, stride: int) -> Tensor:
    """Join the frames before and after to one of every `stride` frames of x [B, F, C]: [B, ceil(F / stride), 3 C]."""
    x = F.pad(x, (0, 0, 1, 1))
    frames = x.shape[1] - 2
    return torch.cat([x[:, start : start + frames : stride] for start in range(shape.CONVOLUTION_WIDTH)], dim=-1)


def _silenced(x: Tensor, lengths: Tensor) -> Tensor:
    """Return x [B, F, C] with zeros after the ends of recordings."""
    inside = torch.arange(x.shape[1], device=x.device) < lengths[:, None]
    return x * inside[..., None].to(x.dtype)
