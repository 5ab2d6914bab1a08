"""Export of a run with LoRA to a folder for PEFT: adapter_config.json and adapter_model.safetensors, for use with a
model of transformers.

PEFT has the same arithmetic, W x + alpha / r * B A x, and stores A as [r, inputs] and B as [outputs, r] in any layout
of W on the other side. Where that side stores several matrices as one (GPT-2's c_attn, ModernBERT's Wqkv), their
adapters become one with the sum of the ranks: the A's one below the other, the B's along a diagonal.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bigtx.config.schema import ModelConfig, RunConfig
from bigtx.config.shape import adapted_matrices
from bigtx.engine.checkpoint import Checkpoint
from bigtx.engine.trainable import is_adapter
from bigtx.engine.write_weights import SafetensorsWriter
from bigtx.interop.classes import auto_class
from bigtx.interop.exporter import ExportSettings, check_checkpoint, without_adapters
from bigtx.interop.families import family_of
from bigtx.interop.family import Family, Link, foreign_shapes
from bigtx.interop.read import ADAPTER_CONFIG, AUTO_CLASSES
from bigtx.utils.errors import ConfigError
from bigtx.utils.files import new_folder, write_json
from bigtx.utils.shell import command
from bigtx.utils.units import format_names

ADAPTER_WEIGHTS = "adapter_model.safetensors"

_TASK_TYPES = {auto_class: name for name, auto_class in AUTO_CLASSES.items()}


@dataclass(frozen=True)
class ForeignAdapter:
    """An adapter of one module of the other side.

    Attributes:
        module: its name there.
        a: fp32 [r, inputs].
        b: fp32 [outputs, r].
        transposed: whether the module stores its matrix as [inputs, outputs].
    """

    module: str
    a: Tensor
    b: Tensor
    transposed: bool


@dataclass(frozen=True)
class ExportedAdapters:
    """The result of an export.

    Attributes:
        folder: the folder of the export.
        family: the family of the model that the adapters belong to.
        num_modules: the number of modules with an adapter.
        num_parameters: the number of parameters of all adapters.
    """

    folder: Path
    family: Family
    num_modules: int
    num_parameters: int


def export_adapters(
    checkpoint: Path, run: RunConfig, folder: Path, settings: ExportSettings, *, base: str
) -> ExportedAdapters:
    """Write a checkpoint's adapters in PEFT's format; the folder has its name once it is complete.

    Args:
        run: the run's config, with model.vocab_size set.
        settings: the weights, and the family: the base's model_type.
        base: folder or name of the model in transformers' format to which PEFT is to add them.

    Raises:
        ConfigError: there are no adapters, other parameters were trained too, or no family can express the model.
        CheckpointError: the checkpoint is damaged, or does not have these weights.
        LaunchError: the folder cannot be written.
    """
    opened = _open(checkpoint, run.model, settings.weights)
    family, plain = family_of(run, settings.family), without_adapters(run.model)
    links = family.links(plain)
    adapters = [made for link in links if (made := _converted(link, opened, run.model, settings.weights)) is not None]
    opened.close()
    modules = [key.removesuffix(".weight") for key in foreign_shapes(links, plain) if key.endswith(".weight")]
    values = _config(adapters, modules, run.model, base, _TASK_TYPES.get(auto_class(family, plain)))
    tensors = {
        f"base_model.model.{adapter.module}.lora_{part}.weight": tensor.contiguous()
        for adapter in adapters
        for part, tensor in (("A", adapter.a), ("B", adapter.b))
    }
    with new_folder(folder) as partial:
        write_json(partial / ADAPTER_CONFIG, values)
        entries = [(key, tuple(tensor.shape), tensor.dtype) for key, tensor in tensors.items()]
        with SafetensorsWriter(partial / ADAPTER_WEIGHTS, entries, {"format": "pt"}) as writer:
            for tensor in tensors.values():
                writer.write(tensor)
            writer.finish()
    return ExportedAdapters(folder, family, len(adapters), sum(tensor.numel() for tensor in tensors.values()))


def _open(checkpoint: Path, config: ModelConfig, kind: str) -> Checkpoint:
    if not config.lora.rank:
        raise ConfigError(
            f"{checkpoint} has no adapters (model.lora.rank is 0): `{_export_of_all(checkpoint)}` writes the whole "
            "model"
        )
    opened = Checkpoint(checkpoint)
    check_checkpoint(opened, config, kind, next(iter(opened.manifest["parameters"])))
    others = [name for name in opened.manifest["parameters"] if not is_adapter(name)]
    if others:
        raise ConfigError(
            f"{checkpoint}: besides the adapters, {format_names(others, 3)} were trained, which the PEFT format leaves "
            f"out; `{_export_of_all(checkpoint)}` writes the whole model, adapters merged"
        )
    return opened


def _export_of_all(checkpoint: Path) -> str:
    return command("bigtx", "export", checkpoint, "output=FOLDER")


def _converted(link: Link, opened: Checkpoint, config: ModelConfig, kind: str) -> ForeignAdapter | None:
    """Return the adapter of a link's foreign tensor, if any of its parameters has one."""
    adapted = {f"{name}.weight" for name in adapted_matrices(config)} & set(link.names)
    if not adapted:
        return None
    shapes, rank = opened.shapes, config.lora.rank
    (key,) = link.keys
    columns = rank * len(adapted)
    rows_of_a, rows_of_b, products = list[Tensor](), list[Tensor](), list[Tensor]()
    for name in link.names:
        outputs, inputs = shapes[name]
        spread, product = torch.zeros(outputs, columns), torch.zeros(outputs, inputs)
        if name in adapted:
            a, b = (_read(opened, f"{name.removesuffix('.weight')}.adapter.{part}", kind) for part in "ab")
            spread[:, len(rows_of_a) * rank : (len(rows_of_a) + 1) * rank] = b
            product = b @ a
            rows_of_a.append(a)
        rows_of_b.append(spread)
        products.append(product)
    a, transposed = torch.cat(rows_of_a), _is_transposed(link, [shapes[name][0] for name in link.names])
    (b,) = link.to_foreign(rows_of_b)
    (expected,) = link.to_foreign(products)
    b, expected = (b.T, expected.T) if transposed else (b, expected)
    if b.shape[0] != expected.shape[0] or not torch.allclose(b @ a, expected, rtol=1e-4, atol=1e-6):
        raise ConfigError(
            f"{key} has a form that PEFT's adapters cannot have; `{_export_of_all(opened.path)}` writes the "
            "whole model, adapters merged"
        )
    return ForeignAdapter(key.removesuffix(".weight"), a, b, transposed)


def _is_transposed(link: Link, num_rows: Sequence[int]) -> bool:
    """Return whether the foreign matrix is [inputs, outputs], found by the position of a width that no output
    has.
    """
    width = sum(num_rows) + 1
    (probe,) = link.to_foreign([torch.empty(rows, width, device="meta") for rows in num_rows])
    return probe.shape[0] == width


def _read(opened: Checkpoint, name: str, kind: str) -> Tensor:
    shape = opened.shapes[name]
    return opened.read(name, kind, 0, math.prod(shape)).view(shape)


def _config(
    adapters: Sequence[ForeignAdapter], modules: Iterable[str], config: ModelConfig, base: str, task_type: str | None
) -> dict[str, Any]:
    """Return adapter_config.json as a dictionary; what it leaves out has PEFT's defaults for plain LoRA."""
    lora = config.lora
    short = _short_names([adapter.module for adapter in adapters], modules)
    wider = {
        re.escape(short[adapter.module]): len(adapter.a) // lora.rank
        for adapter in adapters
        if len(adapter.a) != lora.rank
    }
    return {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": _whole(lora.alpha),
        "lora_dropout": lora.dropout,
        "target_modules": sorted(set(short.values())),
        "fan_in_fan_out": any(adapter.transposed for adapter in adapters),
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "rank_pattern": {name: times * lora.rank for name, times in wider.items()},
        "alpha_pattern": {name: _whole(times * lora.alpha) for name, times in wider.items()},
    }


def _whole(number: float) -> float:
    return int(number) if number == int(number) else number


def _short_names(adapted: Sequence[str], modules: Iterable[str]) -> Mapping[str, str]:
    """Return names for modules by which PEFT finds them: the part after the block's number, as people write it
    (self_attn.q_proj), if every module of the model with this ending is adapted; else the whole name."""
    modules, wanted, short = list(modules), set(adapted), {}
    for name in adapted:
        _, found, end = name.partition(match[0]) if (match := re.search(r"\.\d+\.", name)) else (name, "", "")
        suits = found and all(other in wanted for other in modules if other.endswith(f".{end}"))
        short[name] = end if suits else name
    return short
