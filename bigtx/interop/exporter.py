"""Export of a run to a Hugging Face folder: config.json, safetensors, tokenizer, and a card.

The shapes of all tensors are known from the config, so shards are planned first and then written one link at a
time: memory holds one link, not a shard.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from bigtx.config.schema import FinetuneConfig, LoraConfig, ModelConfig, RunConfig
from bigtx.engine.checkpoint import Checkpoint, MergedCheckpoint
from bigtx.engine.write_weights import SafetensorsWriter, groups
from bigtx.interop.card import write_card
from bigtx.interop.classes import AUTO_CLASS, architecture, auto_class
from bigtx.interop.families import describe
from bigtx.interop.family import Family, Link, check_links, cut, foreign_shapes
from bigtx.interop.read import CONFIG, GENERATION_CONFIG, INDEX, MAPPED_BYTES, SINGLE
from bigtx.interop.tokenizer import export_classifier_tokenizer, export_tokenizer
from bigtx.model.size import parameter_shapes
from bigtx.tokenizer.tokenizer import Tokenizer
from bigtx.utils.errors import CheckpointError, ConfigError
from bigtx.utils.files import new_folder, write_json

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""The dtypes by their names in config.json."""

SHARD_BYTES = 5 * 10**9


@dataclass(frozen=True, kw_only=True)
class ExportSettings:
    """The options of an export.

    Attributes:
        dtype: the dtype of the tensors.
        weights: master, or ema for the averaged copy of runs with optimizer.ema_decay.
        family: the model_type to write; None uses the first that can express the model.
        shard_bytes: most bytes of a file, unless one tensor is larger.
        license: the license in the card, by the hub's identifier.
    """

    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    weights: Literal["master", "ema"] = "master"
    family: str | None = None
    shard_bytes: int = SHARD_BYTES
    license: str | None = None


@dataclass(frozen=True)
class Exported:
    """The result of an export.

    Attributes:
        folder: the folder of the export.
        family: the family in whose format it was written.
        architecture, auto_class: its class in transformers, and the class that loads it.
        num_tensors, num_parameters: the counts in its files; a tied table counts once.
        files: safetensors files and their sizes in bytes.
    """

    folder: Path
    family: Family
    architecture: str
    auto_class: str
    num_tensors: int
    num_parameters: int
    files: dict[str, int]


def export_model(
    checkpoint: Path, run: RunConfig, tokenizer: Tokenizer, folder: Path, settings: ExportSettings
) -> Exported:
    """Write a checkpoint as a Hugging Face folder, with adapters merged; it has its name once it is complete.

    Args:
        checkpoint: a checkpoint of any run, of any ZeRO stage and number of ranks.
        run: the run's config, with model.vocab_size set.

    Raises:
        ConfigError: no family can express the model, or the folder is in use.
        CheckpointError: the checkpoint is damaged, lacks these weights, or has numbers outside the range of the dtype.
        DataError: the tokenizer cannot be converted.
        LaunchError: the folder cannot be written.
    """
    config = without_adapters(run.model)
    family, values = describe(run, tokenizer, settings.family)
    values["dtype"] = str(DTYPES[settings.dtype]).removeprefix("torch.")
    links = family.links(config)
    check_links(links, config)
    source = _Source(checkpoint, config, settings.weights, max(MAPPED_BYTES, settings.shard_bytes // 8))
    shapes, dtype, loader = foreign_shapes(links, config), DTYPES[settings.dtype], auto_class(family, config)
    with new_folder(folder) as partial:
        write_json(partial / CONFIG, values)
        if generation := _generation_config(values, loader):
            write_json(partial / GENERATION_CONFIG, generation)
        if isinstance(run, FinetuneConfig) and config.num_classes is not None:
            export_classifier_tokenizer(tokenizer, partial, run, model_type=family.model_type)
        else:
            export_tokenizer(tokenizer, partial, model_type=family.model_type, max_length=config.max_sequence_length)
        files = _write_shards(partial, source, links, shapes, dtype, settings.shard_bytes)
        num_parameters = sum(map(math.prod, shapes.values()))
        made = Exported(folder, family, architecture(family, config), loader, len(shapes), num_parameters, files)
        write_card(partial, made, settings, checkpoint=checkpoint.absolute(), config=run, tokenizer=tokenizer)
    return made


def without_adapters(config: ModelConfig) -> ModelConfig:
    """Return the config of the exported model, whose adapters are merged."""
    return dataclasses.replace(config, lora=LoraConfig())


def check_checkpoint(opened: Checkpoint, config: ModelConfig, kind: str, trained: str) -> None:
    """Check that a checkpoint can be exported.

    Args:
        kind: the weights of the export: master or ema.
        trained: a parameter that was trained.

    Raises:
        CheckpointError: it is damaged, does not fit the config, or does not have these weights.
    """
    path = opened.path
    opened.refuse_damaged()
    if opened.shapes != parameter_shapes(config):
        raise CheckpointError(f"{path} does not fit the run's config.yaml; was it edited?")
    kinds = opened.kinds(trained)
    if kind not in kinds:
        what = f"{path} has no {kind} weights (it has {', '.join(kinds)})"
        raise CheckpointError(f"{what}; an average of the weights is kept by runs with optimizer.ema_decay")


class _Source:
    """The parameters of a checkpoint, one at a time, without padding, and with adapters merged."""

    def __init__(self, path: Path, config: ModelConfig, kind: str, mapped_bytes: int) -> None:
        """Args: mapped_bytes: about how much is read of the files before they are opened again."""
        self.checkpoint, self.config, self.kind = MergedCheckpoint(path), config, kind
        self.mapped_bytes, self.num_read = mapped_bytes, 0
        check_checkpoint(self.checkpoint, config, kind, next(iter(self.checkpoint.shapes)))

    def read(self, name: str) -> Tensor:
        """Return one parameter, fp32."""
        shape = self.checkpoint.shapes[name]
        flat = self.checkpoint.read(name, self.kind, 0, math.prod(shape))
        self.num_read += flat.nbytes
        if self.num_read > self.mapped_bytes:
            # The pages that were read of a mapped file count as memory until it is closed.
            self.checkpoint.close()
            self.num_read = 0
        return cut(name, flat.view(shape), self.config)


def _generation_config(values: Mapping[str, Any], auto_class: str) -> dict[str, Any]:
    """Return the ids that generation needs; nothing for a model that does not generate."""
    if auto_class in ("AutoModelForMaskedLM", AUTO_CLASS):
        return {}
    names = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
    return {name: values[name] for name in names if values.get(name) is not None}


def _write_shards(
    folder: Path,
    source: _Source,
    links: Sequence[Link],
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
    shard_bytes: int,
) -> dict[str, int]:
    """Write the tensors in the order of the links; return the files with their sizes."""
    sizes = {key: dtype.itemsize * math.prod(shape) for key, shape in shapes.items()}
    shards = list(groups(sizes, shard_bytes))
    tensors = _converted(source, links, dtype)
    files: dict[str, int] = {}
    places: dict[str, str] = {}
    for number, keys in enumerate(shards, start=1):
        name = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        entries = [(key, shapes[key], dtype) for key in keys]
        # transformers refuses a file without the name of the library that wrote it.
        with SafetensorsWriter(folder / name, entries, {"format": "pt"}) as writer:
            for key in keys:
                came, tensor = next(tensors)
                assert came == key
                writer.write(tensor)
            files[name] = writer.finish()["size"]
        places |= dict.fromkeys(keys, name)
    if len(shards) > 1:
        write_json(folder / INDEX, {"metadata": {"total_size": sum(sizes.values())}, "weight_map": places})
    return files


def _converted(source: _Source, links: Sequence[Link], dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    for link in links:
        for key, tensor in zip(link.keys, link.to_foreign([source.read(name) for name in link.names]), strict=True):
            yield key, _as_dtype(key, tensor, dtype)


def _as_dtype(key: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    result = tensor.to(dtype)
    if not torch.isfinite(result).all():
        if not torch.isfinite(tensor).all():
            raise CheckpointError(f"{key} has values that are not finite: the training has failed")
        raise ConfigError(f"{key} has values above fp16's largest, 65,504; write dtype=bf16 or dtype=fp32")
    return result
