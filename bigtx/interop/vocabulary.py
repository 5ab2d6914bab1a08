"""Shapes on both sides of the links, and the rows that pad bigtx's vocabulary."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bigtx.config.schema.model import ModelConfig
from bigtx.interop.maps import Link
from bigtx.model.size import parameter_shapes

PADDED = ("embedding.weight", "head.weight", "head.bias")
"""Parameters with a row for each token id; foreign ones have vocab_size rows, bigtx's a multiple of 128."""


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
