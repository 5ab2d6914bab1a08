"""A family of Hugging Face models that can be read and written: its table, and the links between bigtx's parameters and
the tensors of a foreign checkpoint.

A link's two functions only cut, join, transpose and reorder, so they lose nothing, and they run on meta tensors too:
so the shapes of the tensors of a checkpoint are known before any byte of it is read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bigtx.config.schema.model import ModelConfig
from bigtx.interop.classes import Classifier
from bigtx.interop.table import Fields, Row
from bigtx.model.size import parameter_shapes
from bigtx.tokenizer.tokenizer import Tokenizer

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


def split_rows(names: Sequence[str], key: str, *, transpose: bool) -> Link:
    """Link parameters of one shape that the other side stores as one tensor, one below the other.

    Args:
        transpose: the fused matrix is [inputs, outputs], as in GPT-2's Conv1D.
    """

    def to_bigtx(tensors: list[Tensor]) -> list[Tensor]:
        fused = tensors[0].T if transpose else tensors[0]
        return [part.contiguous() for part in fused.chunk(len(names))]

    def to_foreign(tensors: list[Tensor]) -> list[Tensor]:
        fused = torch.cat(tensors)
        return [fused.T.contiguous() if transpose else fused]

    return Link(tuple(names), (key,), to_bigtx, to_foreign)


def stacked(name: str, keys: Sequence[str]) -> Link:
    """Link one parameter [E, ...] that the other side stores as E tensors [...]."""
    return Link((name,), tuple(keys), lambda tensors: [torch.stack(tensors)], lambda tensors: list(tensors[0].unbind()))


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


@dataclass(frozen=True, kw_only=True)
class Family:
    """A kind of model of transformers, and its expression by bigtx's fields and parameters.

    Families do not handle the vocabulary's padding: links name embedding.weight, head.weight and head.bias,
    whose foreign tensors have vocab_size rows.

    Attributes:
        model_type: the family's name in config.json.
        architecture: the class that config.json's `architectures` names.
        auto_class: the class of transformers that loads it: AutoModelForCausalLM, ..MaskedLM or ..Seq2SeqLM.
        table: the fields of the config.
        classifier: its class that classifies texts; None: transformers has none, or bigtx does not write it.
        outer, block: the foreign names of bigtx's modules, outside of blocks and in a block.
        layers: the foreign name of the list of blocks.
        fused: modules of a block that are one module there, under the name of the first.
        transposed: parts of the names of parameters whose matrices are stored as [inputs, outputs] there.
        bare: the beginnings of the keys of a model that was saved without its head, which lack `prefix`.
        unneeded: regular expressions of whole foreign keys that may exist and are not needed: buffers, poolers. Import
            reports them as dropped.
        copies: the same for the copies of tied tensors.
    """

    model_type: str
    architecture: str
    auto_class: str
    table: tuple[Row, ...]
    classifier: Classifier | None = None
    outer: Mapping[str, str]
    block: Mapping[str, str] = field(default_factory=dict)
    layers: str = "model.layers"
    fused: tuple[tuple[str, ...], ...] = ()
    transposed: tuple[str, ...] = ()
    prefix: str = "model"
    bare: tuple[str, ...] = ()
    unneeded: tuple[str, ...] = ()
    copies: tuple[str, ...] = (r"lm_head\.weight",)

    def read_config(self, values: dict[str, Any]) -> ModelConfig:
        """Return bigtx's config of a config.json; vocab_size is set.

        Raises:
            ConfigError: bigtx cannot express a value; the message names every such field.
        """
        fields, config = Fields(values), ModelConfig()
        for row in self.table:
            row.read(fields, config)
        fields.finish()
        return config

    def settled(self, config: ModelConfig, keys: Collection[str]) -> ModelConfig:
        """Return the config after the names of the tensors are known, for what config.json does not contain."""
        return config

    def problems(self, config: ModelConfig) -> list[str]:
        """Return the fields that the family cannot express, each as "model.FIELD=VALUE: why"."""
        return [problem for row in self.table for problem in row.problems(config)]

    def write_config(self, config: ModelConfig, tokenizer: Tokenizer) -> dict[str, Any]:
        """Return the config.json of a config without problems, model_type and architectures included; `read_config`
        inverts it. Every relevant field is written, so that another release's defaults have no effect.

        Raises:
            ConfigError: the tokenizer does not fit.
        """
        values: dict[str, Any] = {"model_type": self.model_type, "architectures": [self.architecture]}
        for row in self.table:
            values |= row.write(config)
        return values | self.special_ids(tokenizer)

    def special_ids(self, tokenizer: Tokenizer) -> dict[str, Any]:
        """Return the special ids for config.json; several ids that end a text are a list."""
        return {
            "bos_token_id": tokenizer.begin_id,
            "eos_token_id": tokenizer.end_ids if len(tokenizer.end_ids) > 1 else tokenizer.end_id,
            "pad_token_id": tokenizer.pad_id,
        }

    def links(self, config: ModelConfig) -> list[Link]:
        """Return links with every parameter of bigtx exactly once, in the best order for writing a checkpoint."""
        return [link for name in parameter_shapes(config) if (link := self.link(name, config)) is not None]

    def link(self, name: str, config: ModelConfig) -> Link | None:
        """Return the link of a parameter; None if it is part of another link."""
        transpose = name.endswith(".weight") and any(part in name for part in self.transposed)
        for first, *others in self.fused:
            if any(f".{module}." in name for module in others):
                return None
            if f".{first}." in name:
                names = [name, *(name.replace(first, module) for module in others)]
                return split_rows(names, self.key(name, config), transpose=transpose)
        key = self.key(name, config)
        return split_rows([name], key, transpose=True) if transpose else same(name, key)

    def key(self, name: str, config: ModelConfig) -> str:
        """Return the foreign key of a parameter."""
        return spelled(name, self.outer, self.block, self.layers)

    def rename(self, key: str) -> str:
        """Return an older spelling of a foreign key (another prefix, gamma for weight) as `links` spells it; else the
        key.
        """
        return f"{self.prefix}.{key}" if key.startswith(self.bare) else key

    def unused(self, config: ModelConfig) -> Sequence[str]:
        """Return the regular expressions of keys that are not needed for a config."""
        return (*self.unneeded, *self.copies) if config.tie_embeddings else self.unneeded
