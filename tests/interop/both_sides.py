"""One model on both sides: made by transformers with random weights, imported, and exported again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

import bigtx
from bigtx.api import LoadedModel
from bigtx.interop.exporter import ExportSettings, export_model
from bigtx.interop.importer import Imported, import_model
from bigtx.interop.tokenizer import export_tokenizer
from bigtx.tokenizer.tokenizer import Tokenizer

TOLERANCE = 1e-4
"""Of `distance` in fp32."""


def randomize(model: torch.nn.Module, *, std: float = 0.2) -> None:
    """Give every parameter other values than those it starts with: norms are no longer ones, biases no longer zeros."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
            if "norm" in name.lower() and name.endswith("weight"):
                parameter.add_(1.0)


def save(model: Any, tokenizer: Tokenizer, folder: Path) -> Path:
    """What a user of transformers has: config.json, weights and a tokenizer."""
    model.save_pretrained(folder)
    export_tokenizer(tokenizer, folder, model_type=model.config.model_type, max_length=64)
    return folder


def to_bigtx(folder: Path, run: Path) -> tuple[LoadedModel, Imported]:
    """Import a folder and open the run."""
    imported = import_model(folder, run)
    return bigtx.load(run, device="cpu"), imported


def to_foreign(loaded: LoadedModel, folder: Path) -> Path:
    """Export an imported run."""
    return export_model(loaded.checkpoint, loaded.config, loaded.tokenizer, folder, ExportSettings()).folder


def tensors(folder: Path) -> dict[str, Tensor]:
    """What a folder's one safetensors file holds."""
    return load_file(folder / "model.safetensors")


def distance(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference of two sets of logits, by their own spread where that is below one."""
    return float((ours - theirs).abs().max() / theirs.std().clamp(max=1.0))


def padded_tokens(lengths: tuple[int, ...], vocab_size: int, pad_id: int) -> tuple[Tensor, Tensor]:
    """Random rows, padded on the right to the longest.

    Returns:
        int64 [B, T] tokens, none of which is `pad_id` but the padding, and bool [B, T]: which are not padding.
    """
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(vocab_size - 1, (len(lengths), max(lengths)), generator=generator)
    tokens += tokens >= pad_id
    real = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return tokens.masked_fill(~real, pad_id), real
