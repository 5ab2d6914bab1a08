"""The matrices that have adapters, by the globs of a ModelConfig: for the checks, the model and the plan."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from fnmatch import fnmatchcase

from bigtx.config import shape
from bigtx.config.schema import ModelConfig


def adapted_matrices(config: ModelConfig) -> list[str]:
    """Return the modules with an adapter, e.g. decoder.blocks.3.attention.query; none without a rank."""
    if not config.lora.rank:
        return []
    globs = config.lora.targets or ["*"]
    return [name for name in _matrices(config) if any(_matches(name, glob) for glob in globs)]


def useless_targets(config: ModelConfig) -> dict[str, list[str]]:
    """Return the globs that match no matrix, each with matrices of a block that have similar names."""
    names = list(_matrices(config))
    of_block = list(dict.fromkeys(map(in_block, names)))
    return {
        glob: difflib.get_close_matches(glob, of_block, 3, 0.5) or of_block
        for glob in config.lora.targets
        if not any(_matches(name, glob) for name in names)
    }


def _matrices(config: ModelConfig) -> Iterator[str]:
    """Yield all matrices that can be adapted, by module.

    The matrices of a mixture's experts cannot: all experts of a block are one parameter with a product of its own.
    The router and the gate of the shared expert cannot either: their few rows are scores.
    """
    stacks = {"encoder": shape.num_encoder_layers(config), "decoder": shape.num_decoder_layers(config)}
    for stack, num_layers in stacks.items():
        across = stack == "decoder" and config.shape == "encoder_decoder"
        attentions = ("attention", "cross_attention") if across else ("attention",)
        in_block = [f"{name}.{part}" for name in attentions for part in ("query", "key", "value", "output")]
        experts = config.experts
        mlp = "mlp" if not experts.num_experts else "mlp.shared" if experts.shared_size else None
        if mlp is not None:
            parts = ("gate", "up", "down") if config.mlp in shape.GATED else ("up", "down")
            in_block += [f"{mlp}.{part}" for part in parts]
        yield from (f"{stack}.blocks.{layer}.{name}" for layer in range(num_layers) for name in in_block)


def _matches(name: str, glob: str) -> bool:
    """Return whether a glob matches a module, by its name in the model or in its block."""
    return fnmatchcase(name, glob) or fnmatchcase(in_block(name), glob)


def in_block(name: str) -> str:
    """Return a module's name within its block, given its name in the model."""
    return name.split(".", 3)[3]
