"""Links between parameters of bigtx and tensors of a foreign checkpoint, and the shapes on both sides.

A link's two functions only cut, join, transpose and reorder, so they lose nothing, and they run on meta tensors too:
so the shapes of the tensors of a checkpoint are known before any byte of it is read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bigtx.config.schema.model import ModelConfig
from bigtx.model.size import parameter_shapes

Convert = Callable[[list[Tensor]], list[Tensor]]

PADDED = ("embedding.weight", "head.weight", "head.bias")
"""Parameters with a row for each token id; foreign ones have vocab_size rows, bigtx's a multiple of 128."""


@dataclass(frozen=True)
class Link:
    """Some parameters of bigtx and the foreign tensors with the same numbers.

    Attributes:
        names: the names of bigtx's parameters.
        keys: the keys of the foreign tensors.
        to_bigtx: converts tensors in the order of `keys` to tensors in the order of `names`.
        to_foreign: its inverse.
    """

    names: tuple[str, ...]
    keys: tuple[str, ...]
    to_bigtx: Convert
    to_foreign: Convert


def same(name: str, key: str) -> Link:
    """Link one parameter that both sides store in the same form."""
    return Link((name,), (key,), list, list)


def transposed(name: str, key: str) -> Link:
    """Link a matrix that the other side stores as [inputs, outputs]."""
    return Link((name,), (key,), _transpose, _transpose)


def split_rows(names: Sequence[str], key: str, sizes: Sequence[int] | None = None, *, transpose: bool = False) -> Link:
    """Link parameters that the other side stores as one tensor, one below the other.

    Args:
        sizes: the rows of each; equal if left out.
        transpose: the fused matrix is [inputs, outputs], as in GPT-2's Conv1D.
    """

    def to_bigtx(tensors: list[Tensor]) -> list[Tensor]:
        fused = tensors[0].T if transpose else tensors[0]
        parts = fused.chunk(len(names)) if sizes is None else torch.split(fused, list(sizes))
        return [part.contiguous() for part in parts]

    def to_foreign(tensors: list[Tensor]) -> list[Tensor]:
        fused = torch.cat(tensors)
        return [fused.T.contiguous() if transpose else fused]

    return Link(tuple(names), (key,), to_bigtx, to_foreign)


def stacked(name: str, keys: Sequence[str]) -> Link:
    """Link one parameter [E, ...] that the other side stores as E tensors [...]."""

    def to_bigtx(tensors: list[Tensor]) -> list[Tensor]:
        return [torch.stack(tensors)]

    def to_foreign(tensors: list[Tensor]) -> list[Tensor]:
        return list(tensors[0].unbind())

    return Link((name,), tuple(keys), to_bigtx, to_foreign)


def swapped_halves(name: str, key: str, width: int) -> Link:
    """Link the rows of a query or key projection whose heads the other side rotates in another order.

    Rotary positions rotate the plane of dimensions (i, i + C/2) by an angle; with the two halves of a head swapped, the
    same formula rotates it by the opposite angle. Products of queries and keys depend only on the difference of
    positions, and a swap on both sides has no other effect.

    Args:
        width: the width C of one head; the tensor has [heads * C, ...] rows.
    """

    def swap(tensors: list[Tensor]) -> list[Tensor]:
        heads = torch.unflatten(tensors[0], 0, (-1, 2, width // 2))
        return [heads.flip(1).flatten(0, 2)]

    return Link((name,), (key,), swap, swap)


def spelled(name: str, outer: Mapping[str, str], block: Mapping[str, str], layers: str) -> str:
    """Return the key of a parameter whose modules only have other names.

    Args:
        name: the name of bigtx's parameter, e.g. decoder.blocks.3.attention.query.weight.
        outer: the foreign names of the modules outside of blocks.
        block: the foreign names of the modules of a block.
        layers: the foreign name of the list of blocks, e.g. model.layers.
    """
    module, _, part = name.rpartition(".")
    found = re.fullmatch(r"(?:encoder|decoder)\.blocks\.(\d+)\.(.+)", module)
    return f"{layers}.{found[1]}.{block[found[2]]}.{part}" if found else f"{outer[module]}.{part}"


def _transpose(tensors: list[Tensor]) -> list[Tensor]:
    return [tensors[0].T.contiguous()]


def check_links(links: Sequence[Link], config: ModelConfig) -> None:
    """Assert that every parameter is in exactly one link, and every key too."""
    names = [name for link in links for name in link.names]
    keys = [key for link in links for key in link.keys]
    assert sorted(names) == sorted(parameter_shapes(config)), set(names) ^ set(parameter_shapes(config))
    assert len(set(keys)) == len(keys), "two links have the same key"


def foreign_shapes(links: Sequence[Link], config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of every foreign tensor, in the order of the links."""
    shapes: dict[str, tuple[int, ...]] = {}
    sizes = parameter_shapes(config)
    for link in links:
        tensors = [cut(name, torch.empty(sizes[name], device="meta"), config) for name in link.names]
        made = link.to_foreign(tensors)
        shapes |= {key: tuple(tensor.shape) for key, tensor in zip(link.keys, made, strict=True)}
    return shapes


def cut(name: str, tensor: Tensor, config: ModelConfig) -> Tensor:
    """Return a parameter without the rows that pad the vocabulary."""
    return tensor[: config.vocab_size] if name in PADDED else tensor


def padded(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """Return a parameter with rows of zeros up to its shape."""
    missing = shape[0] - tensor.shape[0]
    return torch.cat((tensor, tensor.new_zeros(missing, *tensor.shape[1:]))) if missing else tensor
