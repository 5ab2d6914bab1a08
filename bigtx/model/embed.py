"""The input of a stack: embedded tokens or spectrograms, with their positions.

The front end of a spectrogram is convolutions over frames (arXiv:2212.04356). A convolution is computed as a matrix
product of concatenated neighbouring frames: the same arithmetic, in a form that is fast in bf16 on every device. Shape
letters: B batch, T tokens of a text, S columns, D hidden size, F frames of a recording, M mel bins.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bigtx.config import shape
from bigtx.config.schema import ModelConfig
from bigtx.model.cache import KeyValueCache, Text
from bigtx.model.layers import Bigrams, Dropout, Embedding, Linear, Norm
from bigtx.model.positions import sinusoids


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
        x = self._placed(x, torch.cat([part.positions for part in parts], dim=1), token_types)
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
        return Text(x, positions, (positions >= num_columns[:, None]).long())

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
    """Return int64 [B, T]: 0, 1, ... in every row of columns [B, T]."""
    return torch.arange(columns.shape[1], device=columns.device).expand_as(columns)


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
