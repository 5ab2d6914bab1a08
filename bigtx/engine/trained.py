"""Load the model of a trained run, for `bigtx.load`, distillation and the commands on trained runs.

The module imports torch only when weights are read, so that errors about a run appear at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from bigtx.config.load import load_run_config
from bigtx.config.runs import run_dir_of
from bigtx.config.schema import ModelConfig, RunConfig
from bigtx.utils.errors import CheckpointError

if TYPE_CHECKING:
    import torch

    from bigtx.model.transformer import Transformer
    from bigtx.tokenizer.tokenizer import Tokenizer

Weights = Literal["master", "ema"]
TOKENIZER = "tokenizer"
"""The tokenizer's folder in a run's folder."""


def find(run: Path | str) -> tuple[Path, RunConfig]:
    """Return the checkpoint folder and the config that represent a run, without reading weights.

    Raises:
        CheckpointError: there is no such run, or it has no checkpoint yet.
        ConfigError: the run's config has settings that this version of bigtx does not know.
    """
    config = load_run_config(run)
    from bigtx.engine.checkpoint import preferred

    return preferred(run), config


def find_with_tokenizer(run: Path | str) -> tuple[Path, RunConfig, Tokenizer]:
    """Return the results of `find` and the run's tokenizer; the config has the vocab_size of the tokenizer.

    Raises:
        DataError, CheckpointError: see `read_tokenizer`.
    """
    checkpoint, config = find(run)
    tokenizer = read_tokenizer(checkpoint)
    if config.model.vocab_size is None:
        config.model.vocab_size = tokenizer.vocab_size
    return checkpoint, config, tokenizer


def read_tokenizer(run: Path | str) -> Tokenizer:
    """Return the tokenizer of a run, or of the run of a checkpoint: the one that its weights were trained with.

    Raises:
        DataError: it is damaged.
        CheckpointError: it is missing, or was replaced by another one, whose ids mean other texts.
    """
    from bigtx.engine.checkpoint import list_checkpoints, read_manifest
    from bigtx.tokenizer.tokenizer import Tokenizer

    folder = run_dir_of(run) / TOKENIZER
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder} is missing: the tokenizer that the run was trained with; restore that folder from a copy: the "
            "data or the base of the run has the same"
        )
    tokenizer = Tokenizer.load(folder)
    for checkpoint in list_checkpoints(run)[:1]:
        expected = read_manifest(checkpoint).get("tokenizer")
        if expected not in (None, tokenizer.fingerprint):
            raise CheckpointError(
                f"{folder} is not the tokenizer that {checkpoint} was trained with (fingerprint "
                f"{tokenizer.fingerprint[:12]}, expected {str(expected)[:12]}); restore that folder from a copy: the "
                "data or the base of the run has the same"
            )
    return tokenizer


def read_model(
    checkpoint: Path, config: ModelConfig, *, device: torch.device, dtype: torch.dtype, weights: Weights = "master"
) -> Transformer:
    """Return the model of a checkpoint, in evaluation mode.

    Args:
        checkpoint: the checkpoint's folder.
        config: the config of the model.
        device: where the model is made.
        dtype: the dtype of the weights, and so of the arithmetic.
        weights: which weights to read.

    Raises:
        CheckpointError: the checkpoint is damaged, or its weights do not match the model.
    """
    model = empty_model(config, device, dtype)
    _fill(model, checkpoint, weights)
    return model.eval()


def empty_model(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> Transformer:
    """Return a model whose weights are not set."""
    import torch

    from bigtx.model.transformer import Transformer

    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            return Transformer(config)
    finally:
        torch.set_default_dtype(before)


def _fill(model: Transformer, checkpoint: Path, kind: Weights) -> None:
    """Read the weights one at a time, so that they are in memory only once."""
    import torch

    from bigtx.engine.checkpoint import Checkpoint, load_weights

    parameters = dict(model.named_parameters())
    expected = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    saved = Checkpoint(checkpoint).shapes
    if expected != saved:
        names = sorted(name for name in expected | saved if expected.get(name) != saved.get(name))
        raise CheckpointError(
            f"{checkpoint} does not fit the run's config.yaml: {len(names)} parameters differ, first {names[0]} "
            f"({saved.get(names[0], 'none')} saved, {expected.get(names[0], 'none')} configured); was it edited?"
        )
    with torch.no_grad():
        for name, weight in load_weights(checkpoint, kind=kind):
            parameters[name].copy_(weight)
