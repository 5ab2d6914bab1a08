"""The input of a stack: embedded tokens or spectrograms, with their positions.

The front end of a spectrogram is convolutions over frames (arXiv:2212.04356). A convolution is computed as a matrix
product of concatenated neighbouring frames: the same arithmetic, in a form that is fast in bf16 on every device. Shape
letters: B batch (1 if all rows agree), T tokens of a text, S columns or key tokens, D hidden size, C head width, H
heads, F frames of a recording, M mel bins.

Positions are rotations, sinusoids, or T5's relative buckets. They are computed in fp32, once per forward pass, and
shared by all blocks. There are no tables in buffers: DeepSpeed would cast them to bf16, in which position 257 and
position 258 are the same number.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bigtx.config import shape
from bigtx.config.schema import ModelConfig
from bigtx.model.layers import Bigrams, Dropout, Embedding, Linear, Norm

if TYPE_CHECKING:
    from bigtx.model.cache import KeyValueCache


class Text(NamedTuple):
    """The hidden states of tokens in a stack, with their positions and segments."""

    x: Tensor
    """The hidden states [B, T, D]."""
    positions: Tensor
    """int64 [B or 1, T], the position of each token in its text."""
    segment_ids: Tensor | None = None
    """[B, T]: the text of a row that a token belongs to; it attends only to that text. int64, or bool, True, for
    padding."""


class Embedder(nn.Module):
    """The tables of a Transformer and its front end. A Transformer inherits from it, so that their names have no
    prefix.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        size = config.hidden_size
        self.embedding = Embedding(shape.padded_vocab_size(config), size) if shape.has_embedding(config) else None
        self.bigrams = Bigrams(config) if config.bigram_rows else None
        self.audio = FrontEnd(config) if config.audio.num_mel_bins else None
        num_rows = config.max_sequence_length + config.position_offset
        self.position_embedding = Embedding(num_rows, size) if config.positions == "learned" else None
        self.type_embedding = Embedding(config.num_token_types, size) if config.num_token_types else None
        self.embedding_norm = Norm.of(config) if config.embedding_norm else None
        self.dropouts = [Dropout(config.dropout, f"embeddings of text {number}") for number in range(2)]

    def embed(
        self,
        *texts: tuple[Tensor, Tensor | None, Tensor | None],
        token_types: Tensor | None = None,
        heard: Text | None = None,
        cache: KeyValueCache | None = None,
        seeds: Tensor | None = None,
    ) -> list[Text]:
        """Embed the audio, if any, and the tokens, positions and segment ids of each text as the inputs of stacks.
        With a cache the last text is the decoder's; int64 seeds [B] are the seeds of dropout.

        Source and target use the tables together: DeepSpeed's ZeRO-2 has summed wrong gradients if a
        module ran twice in a step.
        """
        parts = [] if heard is None else [heard]
        if texts:
            assert self.embedding is not None, "an audio encoder reads no tokens"
            read = [tokens for tokens, _, _ in texts]
            placed = [_counted(tokens) if positions is None else positions for tokens, positions, _ in texts]
            together = torch.cat(read, dim=1)
            x = self.embedding(together)
            if self.bigrams is not None:
                caches = [*[None] * (len(texts) - 1), cache]
                before = list(map(_before, read, placed, caches))
                x = x + self.bigrams(together, torch.cat(before, dim=1))
            own = x.split([tokens.shape[1] for tokens in read], dim=1)
            parts += map(Text, own, placed, [segment_ids for _, _, segment_ids in texts])
        x = torch.cat([part.x for part in parts], dim=1)
        num_rows = max(len(part.positions) for part in parts)
        positions = torch.cat([part.positions.expand(num_rows, -1) for part in parts], dim=1)
        x = self._placed(x, positions, token_types)
        lengths = [part.positions.shape[1] for part in parts]
        # Each by itself: the place of the target next to the source depends on the padding of the source.
        dropped = (drop(own, seeds) for drop, own in zip(self.dropouts, x.split(lengths, dim=1), strict=False))
        return [part._replace(x=own) for part, own in zip(parts, dropped, strict=True)]

    def hear(self, features: Tensor | None, lengths: Tensor | None) -> Text | None:
        """Return spectrograms [B, F, M] of `lengths` [B] frames as columns; those after the end of a recording are in
        a segment that no token attends to.
        """
        if features is None:
            return None
        assert self.audio is not None and lengths is not None, "only a model with an audio front end reads audio"
        x, num_columns = self.audio(features, lengths)
        positions = _counted(x[..., 0])
        return Text(x, positions, positions >= num_columns[:, None])

    def _placed(self, x: Tensor, positions: Tensor, token_types: Tensor | None) -> Tensor:
        """Return embeddings with their positions added."""
        config = self.config
        if self.position_embedding is not None:
            x = x + self.position_embedding(positions + config.position_offset)
        if self.type_embedding is not None:
            x = x + self.type_embedding(torch.zeros_like(positions) if token_types is None else token_types)
        if config.positions == "sinusoidal":
            # Scaled, so that waves of amplitude one do not dominate the embeddings (arXiv:1706.03762, section 3.4).
            x = x * math.sqrt(config.hidden_size) + sinusoids(positions, config.hidden_size).to(x.dtype)
        if self.embedding_norm is not None:
            x = self.embedding_norm(x)
        return x


def _before(tokens: Tensor, positions: Tensor, cache: KeyValueCache | None) -> Tensor:
    """Return int64 [B, T]: the previous token of each; -1 where its text or, without a cache, its row starts."""
    before = F.pad(tokens, (1, -1), value=-1) if cache is None else cache.tokens_before(tokens, positions)
    return before.masked_fill(positions == 0, -1)


def _counted(columns: Tensor) -> Tensor:
    """Return int64 [1, T]: 0, 1, ... for every row of columns [B, T]."""
    return torch.arange(columns.shape[1], device=columns.device)[None]


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
