"""Decide which parameters a run trains, and how each is updated. The others are frozen: no gradient, no optimizer state
and no master copy.

full fine-tuning, pretraining     all but optimizer.freeze
with model.lora                   the adapters, the head of classes and optimizer.train_also, without optimizer.freeze
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from bigtx.config.schema import OptimizerConfig, RunConfig
from bigtx.utils.errors import ConfigError
from bigtx.utils.units import format_names

if TYPE_CHECKING:
    from torch import Tensor, nn

PART_MULTIPLE = 64
"""The elements of a rank's part of a flat tensor are a multiple of this number: 128 bytes in bf16."""
_BLOCK = re.compile(r"(?P<stack>\w+)\.blocks\.(?P<layer>\d+)\.")
_ABOVE_BLOCKS = ("head.", "encoder.norm.", "decoder.norm.")
ADAPTERS = ("*.adapter.a", "*.adapter.b")
WITH_ADAPTERS = (*ADAPTERS, "head.classes.*", "head.pooler.*")
"""Parameters that are always trained with model.lora. A base rarely has a head of classes."""


def freeze(model: nn.Module, config: RunConfig) -> list[str]:
    """Turn off the gradients of the parameters that are not trained. Returns their names."""
    parameters = dict(model.named_parameters())
    frozen = frozen_parameters(config, parameters)
    for name in frozen:
        parameters[name].requires_grad_(False)
    return frozen


def is_adapter(name: str) -> bool:
    """Return whether a parameter is one of the two matrices of an adapter."""
    return any(fnmatchcase(name, glob) for glob in ADAPTERS)


def frozen_parameters(config: RunConfig, names: Iterable[str]) -> list[str]:
    """Return the parameters that are not trained, in their order.

    Args:
        config: the config of the run.
        names: the names of all parameters of the model.

    Raises:
        ConfigError: a glob matches no parameter, or no parameter is left to train.
    """
    names, optimizer = list(names), config.optimizer
    for key, globs in (("freeze", optimizer.freeze), ("train_also", optimizer.train_also)):
        for glob in globs:
            if not any(fnmatchcase(name, glob) for name in names):
                raise ConfigError(f"optimizer.{key}: {glob!r} matches no parameter of the model; {_near(glob, names)}")
    frozen = [name for name in names if not is_trained(config, name)]
    if len(frozen) == len(names):
        raise ConfigError(
            f"optimizer.freeze=[{', '.join(optimizer.freeze)}] matches every parameter that would be trained; "
            "leave one out"
        )
    return frozen


def is_trained(config: RunConfig, name: str, *, also: Sequence[str] = ()) -> bool:
    """Return whether a run trains a parameter.

    Args:
        config: the config of the run.
        name: the parameter's name.
        also: globs that optimizer.train_also might have in addition to its own.
    """
    trained = [*_trained_with_adapters(config), *also] if config.model.lora.rank else ["*"]
    return _matches(name, trained) and not _matches(name, config.optimizer.freeze)


def refuse_untrained(names: Iterable[str], frozen: Iterable[str], config: RunConfig) -> None:
    """Refuse to freeze parameters that begin from the seed: they would keep their random values.

    Args:
        names: the parameters that the base does not have, or has only in part.
        frozen: the names of the parameters that are not trained.
        config: the config of the run.

    Raises:
        ConfigError: there are such parameters; the message says what to write.
    """
    still = set(frozen)
    untrained = [name for name in names if name in still]
    if not untrained:
        return
    shown = format_names(untrained, 5)
    advice = []
    if any(_matches(name, config.optimizer.freeze) for name in untrained):
        advice.append("leave them out of optimizer.freeze")
    if config.model.lora.rank and not all(_matches(name, _trained_with_adapters(config)) for name in untrained):
        advice.append("name them in optimizer.train_also")
    what = f"{shown}: new in this run, so they begin from the seed, but they would not be trained"
    raise ConfigError(f"{what}; {' and '.join(advice)}")


def _trained_with_adapters(config: RunConfig) -> list[str]:
    return [*WITH_ADAPTERS, *config.optimizer.train_also]


def _matches(name: str, globs: Iterable[str]) -> bool:
    return any(fnmatchcase(name, glob) for glob in globs)


def _near(glob: str, names: list[str]) -> str:
    similar = difflib.get_close_matches(glob, names, 3, 0.5)
    if similar:
        return f"did you mean {' or '.join(similar)}?"
    parts = list(dict.fromkeys(".".join(name.split(".")[:2]) + ".*" for name in names))
    return f"there are {', '.join(parts[:8])}"


def parameter_groups(config: OptimizerConfig, parameters: Iterable[tuple[str, nn.Parameter]]) -> list[dict[str, Any]]:
    """Group parameters by how they are updated. Norms, biases and other vectors have no weight decay.

    Args:
        config: the config of the optimizer.
        parameters: names and parameters; a parameter that ZeRO-3 has partitioned has its shape in `ds_shape`.

    Returns:
        Groups with `name`, `method`, `peak_learning_rate` and `weight_decay`. With a layer_decay several groups have
        the same name, the one with the highest rate first.
    """
    parameters = list(parameters)
    kinds = _kinds(config)
    factors = layer_factors([name for name, _ in parameters], config.layer_decay)
    groups: dict[tuple[str, float], dict[str, Any]] = {
        (kind, factor): {**settings, "name": kind, "params": []}
        for kind, settings in kinds.items()
        for factor in sorted(set(factors.values()), reverse=True)
    }
    for name, parameter in parameters:
        if parameter.requires_grad:
            groups[_group_of(name, parameter), factors[name]]["params"].append(parameter)
    for (_, factor), group in groups.items():
        group["peak_learning_rate"] *= factor
        group["lr"] = group["peak_learning_rate"]
    return [group for group in groups.values() if group["params"]]


def layer_factors(names: list[str], decay: float) -> dict[str, float]:
    """Return factors on the learning rates of parameters (discriminative fine-tuning, arXiv:1801.06146).

    The factor is 1 for the head, a stack's last norm and its last block. It is multiplied by `decay` for each block
    below, and again for the embeddings and everything else before the first block.
    """
    blocks = {name: match for name in names if (match := _BLOCK.match(name))}
    num_layers: dict[str, int] = {}
    for match in blocks.values():
        num_layers[match["stack"]] = max(num_layers.get(match["stack"], 0), int(match["layer"]) + 1)
    depth = max(num_layers.values(), default=0)
    factors = {}
    for name in names:
        if name in blocks:
            match = blocks[name]
            factors[name] = decay ** (num_layers[match["stack"]] - 1 - int(match["layer"]))
        else:
            factors[name] = 1.0 if name.startswith(_ABOVE_BLOCKS) else decay**depth
    return factors


def _kinds(config: OptimizerConfig) -> dict[str, dict[str, Any]]:
    """Return the settings by which each kind of parameter is updated."""
    embedding_decay = config.weight_decay if config.decay_embeddings else 0.0
    assert config.learning_rate is not None, "the loader fills it in"
    embedding_rate = config.learning_rate * config.embedding_learning_rate_scale
    usual = _settings("adamw", config.learning_rate, config.weight_decay)
    muon = _settings("muon", config.muon_learning_rate, config.muon_weight_decay)
    return {
        "matrices": muon if config.name == "muon" else usual,
        "routers": usual,
        # Also with Muon: the product of an adapter's two matrices acts on the activations, and orthogonal steps of both
        # matrices do not make an orthogonal step of the product. One of them begins as zeros.
        "adapters": usual,
        "embeddings": _settings("adamw", embedding_rate, embedding_decay),
        "vectors": _settings("adamw", config.learning_rate, 0.0),
    }


def _settings(method: str, rate: float | None, decay: float | None) -> dict[str, Any]:
    return {"method": method, "peak_learning_rate": rate, "weight_decay": decay}


def _group_of(name: str, parameter: nn.Parameter) -> str:
    if len(getattr(parameter, "ds_shape", parameter.shape)) < 2:
        return "vectors"
    if is_adapter(name):
        return "adapters"
    # Each of their rows makes one score, as the rows of a head do, which AdamW updates too. Muon would move all rows
    # equally, including those of experts that receive almost no tokens.
    if name.endswith((".router.weight", ".shared_gate.weight")):
        return "routers"
    return "matrices" if ".blocks." in name else "embeddings"


def in_buckets(groups: Sequence[dict[str, Any]], size: int) -> list[dict[str, Any]]:
    """Split parameter groups, so that each has at most `size` elements or one parameter.

    They are filled from the end of the model, where the gradients are complete first. So the smaller rest of a group is
    reduced last, when no arithmetic is left to hide it.
    """
    buckets = []
    for group in groups:
        parts: list[list[Tensor]] = []
        room = 0
        for parameter in reversed(group["params"]):
            if not parts or parameter.numel() > room:
                parts.append([])
                room = size
            parts[-1].insert(0, parameter)
            room -= parameter.numel()
        buckets += [{**group, "params": part} for part in parts]
    return buckets


def align_parts() -> None:
    """Have DeepSpeed's BF16_Optimizer cut flat tensors into parts of whole `PART_MULTIPLE` elements.

    Its own parts are of whole 2 elements. Where the number of ranks does not divide the sizes of the matrices, as with
    24 ranks, parts then begin between the units of 16 bytes in which NCCL and the fused AdamW read fastest.
    """
    from deepspeed.runtime import bf16_optimizer

    def flatten(self: Any, tensors: list[Tensor], alignment: int) -> Tensor:
        num_ranks = alignment // self.nccl_start_alignment_factor
        flat: Tensor = self.flatten(bf16_optimizer.align_dense_tensors(tensors, PART_MULTIPLE * num_ranks))
        return flat

    bf16_optimizer.BF16_Optimizer._flatten_dense_tensors_aligned = flatten
