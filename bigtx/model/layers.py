"""The parts of a block besides attention: linear maps, embeddings, norms, the feed-forward, dropout and adapters.

No module here initializes its own weights: construction leaves memory unwritten (or on the meta device, or sharded),
and initial.py fills each parameter from its name.

The masks of dropout depend only on the seed, the row's number in the run and the place in the model: not on the number
of ranks, the micro batch, or the padding of its rows, and a forward pass that is recomputed for the backward pass drops
the same. The numbers come from a counter-based generator similar to SplitMix64 (Steele, Lea and Flood, OOPSLA 2014),
with four numbers of 16 bits in a word.

Low-rank adapters (arXiv:2106.09685) are y = W x + alpha / rank * B A x, where A and B are trained and W is fixed. B is
initialized with zeros, so new adapters do not change the output of a model. Which matrices have one depends on the
config only (see bigtx.config.lora), so an adapted model is built, saved and opened like any other. The adapter of
decoder.blocks.3.attention.query has the parameters ...query.adapter.a and ...query.adapter.b. Shape letters: B batch,
T tokens, D hidden size.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bigtx.config import shape
from bigtx.config.schema import LoraConfig, ModelConfig
from bigtx.config.shape import adapted_matrices, in_block


def operator(name: str) -> Callable[[Callable[..., Any]], Any]:
    """Decorate a function that becomes an operator of torch, on every device.

    `torch.library.custom_op` does the same, but imports torch's compiler at the first call: more than a second at the
    start of every run. What this function returns needs it only where something is compiled.

    Args:
        name: the name in `torch.ops`, e.g. bigtx::expert_products.

    Returns:
        A decorator for a function that changes none of its arguments and has annotated types; see
        `torch.library.register_fake` and `register_autograd` for what an operator needs in addition.
    """

    def register(function: Callable[..., Any]) -> Any:
        schema = torch.library.infer_schema(function, mutates_args=())
        torch.library.define(name, schema, tags=torch.Tag.pt2_compliant_tag)
        torch.library.impl(name, "default", function)
        namespace, _, short = name.partition("::")
        return getattr(getattr(torch.ops, namespace), short).default

    return register


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


class Linear(nn.Linear):
    """torch's linear map without its own initial values.

    Attributes:
        adapter: the adapter that adds to its product, if any (an `Adapter`).
    """

    def __init__(self, num_inputs: int, num_outputs: int, *, bias: bool = True) -> None:
        super().__init__(num_inputs, num_outputs, bias=bias)
        self.adapter: nn.Module | None = None

    def reset_parameters(self) -> None:
        """Leave the weights to initial.py."""

    def forward(self, x: Tensor, seeds: Tensor | None = None) -> Tensor:
        """Map x [..., inputs] to [..., outputs].

        Args:
            seeds: int64 [B] of the rows of x, the seeds of an adapter's dropout; None: no dropout.
        """
        product = super().forward(x)
        return product if self.adapter is None else product + self.adapter(x, seeds)


class Embedding(nn.Embedding):
    """torch's table without its own initial values."""

    def reset_parameters(self) -> None:
        """Leave the weights to initial.py."""


class Bigrams(nn.Module):
    """Embeddings of pairs of adjacent tokens (over-encoding, arXiv:2501.16975).

    Attributes:
        table: rows that are shared by all pairs with the same hash.
        widen: the map from the rows to the width of the embeddings, if they are narrower.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        size = shape.bigram_size(config)
        self.table = Embedding(config.bigram_rows, size)
        self.widen = None if size == config.hidden_size else Linear(size, config.hidden_size, bias=False)

    def forward(self, tokens: Tensor, before: Tensor) -> Tensor:
        """Return the embeddings [B, T, D] of int64 tokens [B, T] and the previous tokens, -1 where a text begins."""
        x = self.table(hashed_pairs(before, tokens, self.table.num_embeddings))
        return x if self.widen is None else self.widen(x)


def hashed_pairs(before: Tensor, tokens: Tensor, num_rows: int) -> Tensor:
    """Hash pairs of ids to rows. Each id is at least -1 and below 2**24: multiplicative hashing (Knuth, TAOCP 3,
    section 6.4).
    """
    mixed = (before + 1) * 0x9E3779B1 + tokens * 0x85EBCA77
    return (mixed & 0xFFFFFFFF) * num_rows >> 32


class Norm(nn.Module):
    """RMSNorm (arXiv:1910.07467) or LayerNorm over the last dimension, computed in fp32 for any type of input."""

    def __init__(self, kind: str, size: int, *, eps: float, scale: bool, bias: bool = False) -> None:
        super().__init__()
        self.kind = kind
        self.shape = (size,)
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size)) if scale else None
        self.bias = nn.Parameter(torch.empty(size)) if bias and kind == "layer" else None

    def forward(self, x: Tensor) -> Tensor:
        """Normalize x [..., size]; the result has x's type."""
        weight = None if self.weight is None else self.weight.float()
        if self.kind == "rms":
            return F.rms_norm(x.float(), self.shape, weight, self.eps).to(x.dtype)
        bias = None if self.bias is None else self.bias.float()
        return F.layer_norm(x.float(), self.shape, weight, bias, self.eps).to(x.dtype)

    @classmethod
    def of(cls, config: ModelConfig) -> Norm:
        """Return a norm of the residual stream."""
        return cls(config.norm, config.hidden_size, eps=config.norm_eps, scale=config.norm_scale, bias=config.norm_bias)


_tanh_gelu = functools.partial(F.gelu, approximate="tanh")


def squared_relu(x: Tensor) -> Tensor:
    """Return max(x, 0) ** 2 (arXiv:2109.08668)."""
    return F.relu(x).square()


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "swiglu": F.silu,
    "geglu": F.gelu,
    "geglu_tanh": _tanh_gelu,
    "gelu": F.gelu,
    "gelu_tanh": _tanh_gelu,
    "relu": F.relu,
    "relu2": squared_relu,
}
"""The activation of each kind of feed-forward; in a gated one it is applied to the gate."""


class MLP(nn.Module):
    """The feed-forward: down(act(gate x) * up x) for the gated kinds, down(act(up x)) for the others."""

    def __init__(self, config: ModelConfig, size: int | None = None) -> None:
        """Args: size: the inner width, if it differs from that of the config."""
        super().__init__()
        self.kind = config.mlp
        inner, outer, bias = size or shape.mlp_size(config), config.hidden_size, config.mlp_bias
        self.gate = Linear(outer, inner, bias=bias) if config.mlp in shape.GATED else None
        self.up = Linear(outer, inner, bias=bias)
        self.down = Linear(inner, outer, bias=bias)

    def forward(self, x: Tensor, seeds: Tensor | None = None) -> Tensor:
        """Map x [B, T, D] to [B, T, D]; `seeds` as in `Linear`."""
        activation = ACTIVATIONS[self.kind]
        if self.gate is None:
            return self.down(activation(self.up(x, seeds)), seeds)
        return self.down(activation(self.gate(x, seeds)) * self.up(x, seeds), seeds)


class Adapter(nn.Module):
    """The term that is added to a matrix's product: alpha / rank * B A x."""

    def __init__(self, config: LoraConfig, num_inputs: int, num_outputs: int, name: str) -> None:
        """Args: name: the name of the matrix within its block."""
        super().__init__()
        self.scale, self.dropout = config.alpha / config.rank, Dropout(config.dropout, f"adapter of {name}")
        self.a = nn.Parameter(torch.empty(config.rank, num_inputs))
        self.b = nn.Parameter(torch.empty(num_outputs, config.rank))

    def forward(self, x: Tensor, seeds: Tensor | None = None) -> Tensor:
        """Map x [..., inputs] to [..., outputs]; `seeds` as in `Linear`."""
        return F.linear(F.linear(self.dropout(x, seeds), self.a), self.b) * self.scale


def add_adapters(model: nn.Module, config: ModelConfig) -> None:
    """Add adapters to the matrices that the config names."""
    for name in adapted_matrices(config):
        matrix = model.get_submodule(name)
        assert isinstance(matrix, Linear), name
        matrix.adapter = Adapter(config.lora, matrix.in_features, matrix.out_features, in_block(name))


def pooling_weights(pooling: str, lengths: np.ndarray, num_columns: int) -> np.ndarray:
    """Return fp32 [B, T]: 1 for the first token or for the last, or equal weights for all of them; padding has weight
    0.

    Args:
        pooling: first, last or mean.
        lengths: int [B], the tokens at the start of each row.
        num_columns: the number of columns T.
    """
    columns, lengths = np.arange(num_columns), lengths[:, None]
    weights = {"first": columns == 0, "last": columns == lengths - 1, "mean": (columns < lengths) / lengths}[pooling]
    return np.broadcast_to(weights, (len(lengths), num_columns)).astype(np.float32)
