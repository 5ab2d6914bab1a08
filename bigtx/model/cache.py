"""The cache of earlier tokens: the keys and values of every layer and, for models of pairs of tokens, the tokens.

Columns of a cache are positions of the text: the token at position p of row b is in column p of row b. Shape letters:
B rows, T tokens being read, S columns in use, K key heads, C head width, D hidden size.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from bigtx.model.embed import Text


class KeyValueCache:
    """The keys and values of earlier tokens.

    On a GPU attention reads a multiple of 64 columns, of which causality hides the unused ones: cuDNN prepares for each
    new length, which takes longer than a token.

    Attributes:
        layers: the cache of each block of the decoder.
        source: in an encoder-decoder, the encoder's states of the rows' sources, once it has read them.
    """

    MULTIPLE: ClassVar[dict[str, int]] = {"cuda": 64}
    """By type of device, the multiple of columns in use."""

    def __init__(self, num_layers: int) -> None:
        self.source: Text | None = None
        self.layers = [LayerCache(self) for _ in range(num_layers)]
        self.tokens = torch.empty(0, 0, dtype=torch.long)  # B columns, for models of pairs of tokens
        self.positions = torch.empty(0, 0, dtype=torch.long)  # B T, the columns of the tokens being read
        self.num_columns = 0

    def place(self, positions: Tensor) -> Tensor:
        """Set the positions of the next tokens, int64 [B, T]; return the positions [S] of all columns in use."""
        self.positions, multiple = positions, self.MULTIPLE.get(positions.device.type, 1)
        self.num_columns = max(self.num_columns, -(-(int(positions.max()) + 1) // multiple) * multiple)
        return torch.arange(self.num_columns, device=positions.device)

    def tokens_before(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Store tokens [B, T]; return those one position before them, arbitrary ones at the first position."""
        missing = int(positions.max()) + 1 - self.tokens.shape[-1]
        if not len(self.tokens):
            self.tokens = tokens.new_zeros(len(tokens), missing)
        elif missing > 0:
            self.tokens = F.pad(self.tokens, (0, missing))
        self.tokens.scatter_(1, positions, tokens)
        return self.tokens.gather(1, (positions - 1).clamp(min=0))

    def keep(self, rows: Tensor) -> None:
        """Remove all rows except these, int64 [rows]."""
        if self.source is not None:
            x, positions, segment_ids = self.source
            positions = positions[rows] if len(positions) == len(x) else positions  # Else one row for all.
            self.source = Text(x[rows], positions, None if segment_ids is None else segment_ids[rows])
        if len(self.tokens):
            self.tokens = self.tokens[rows]
        for layer in self.layers:
            layer.keys, layer.values = layer.keys[rows], layer.values[rows]
            if layer.source is not None:
                layer.source = layer.source[0][rows], layer.source[1][rows]

    def exchange(self, rows: Tensor) -> None:
        """Make row b continue row rows[b], int64 [B], which has the same source."""
        used = self.num_columns
        if len(self.tokens):
            self.tokens = self.tokens[rows]
        for layer in self.layers:
            layer.keys[:, :, :used] = layer.keys[rows, :, :used]
            layer.values[:, :, :used] = layer.values[rows, :, :used]


class LayerCache:
    """One layer's keys and values [B, K, columns, C]; columns grow in steps, so that most tokens copy nothing.

    Attributes:
        source: in an encoder-decoder, the keys and values [B, K, S, C] of the source, once they are computed.
    """

    GROWTH = 32
    """The least number of columns of a step, small so that short texts have few unused ones."""

    def __init__(self, cache: KeyValueCache) -> None:
        self.cache = cache
        self.keys = self.values = torch.empty(0)
        self.source: tuple[Tensor, Tensor] | None = None

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write keys and values [B, K, T, C] to their columns; return those of all columns in use [B, K, S, C]."""
        columns, used = self.cache.positions, self.cache.num_columns
        self.keys, self.values = self._with_room(self.keys, keys, used), self._with_room(self.values, values, used)
        rows = torch.arange(keys.shape[0], device=keys.device)[:, None]  # B 1
        self.keys[rows, :, columns] = keys.transpose(1, 2)
        self.values[rows, :, columns] = values.transpose(1, 2)
        return self.keys[:, :, :used], self.values[:, :, :used]

    def _with_room(self, held: Tensor, like: Tensor, used: int) -> Tensor:
        if held.dim() == 4 and held.shape[2] >= used:
            return held
        rows, heads, _, width = like.shape
        larger = like.new_zeros(rows, heads, used + max(self.GROWTH, used // 4), width)
        if held.dim() == 4:
            larger[:, :, : held.shape[2]] = held
        return larger
