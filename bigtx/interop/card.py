"""The README.md of an exported model: its description and its training, as recorded by its run."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from bigtx.config import shape
from bigtx.config.runs import run_dir_of
from bigtx.config.schema import FinetuneConfig, PretrainConfig, RunConfig
from bigtx.config.schema.model import ModelConfig
from bigtx.engine.checkpoint import Checkpoint
from bigtx.interop.classes import AUTO_CLASS
from bigtx.tokenizer.tokenizer import Tokenizer
from bigtx.track.jsonl import read_records, step_of
from bigtx.utils import __version__
from bigtx.utils.files import write_atomic
from bigtx.utils.units import format_names

if TYPE_CHECKING:
    from bigtx.interop.exporter import Exported, ExportSettings

UNKNOWN_LICENSE = "unknown"
"""The hub's identifier of an unknown license."""

_PIPELINES = {
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForMaskedLM": "fill-mask",
    "AutoModelForSeq2SeqLM": "text2text-generation",
    AUTO_CLASS: "text-classification",
}
_NOT_RECORDED = "not recorded"
_VALIDATION_LOSS = re.compile(r"validation/(.+)/(loss|bits_per_byte)")


def write_card(
    folder: Path, made: Exported, settings: ExportSettings, *, checkpoint: Path, config: RunConfig, tokenizer: Tokenizer
) -> str:
    """Write README.md into an export.

    It contains the names of the data's sources, but no paths.

    Args:
        made: the export, whose folder has the title of the model as its name.
        settings: the options of the export.
        checkpoint: the exported checkpoint, in its run's folder, whose metrics.jsonl has the losses.
        config: the run's config, with model.vocab_size set.

    Returns:
        The card's text.

    Raises:
        CheckpointError: the checkpoint is damaged.
        LaunchError: the folder cannot be written.
    """
    manifest = Checkpoint(checkpoint).manifest
    sections = {
        "Model": _table(_model_rows(config.model, made, settings.dtype) | _class_rows(config)),
        "Data": _data(config, manifest),
        "Training": _training(config, manifest),
        "Losses": _losses(run_dir_of(checkpoint) / "metrics.jsonl", manifest),
        "Tokenizer": _table(_tokenizer_rows(tokenizer)),
        "How to use it": _usage(made.auto_class),
    }
    front_matter = {
        "license": settings.license or UNKNOWN_LICENSE,
        "library_name": "transformers",
        "pipeline_tag": _PIPELINES[made.auto_class],
        "tags": ["bigtx", made.family.model_type],
    }
    title = f"# {made.folder.resolve().name}\n\n{_summary(made, config, manifest)}"
    body = "\n\n".join([title, *(f"## {name}\n\n{text}" for name, text in sections.items())])
    text = f"---\n{yaml.safe_dump(front_matter, sort_keys=False)}---\n\n{body}\n"
    write_atomic(folder / "README.md", text)
    return text


def _summary(made: Exported, config: RunConfig, manifest: Mapping[str, Any]) -> str:
    kind = {"decoder": "a decoder", "encoder": "an encoder", "encoder_decoder": "an encoder-decoder"}
    origin = f"Trained with bigtx ({_aim(config)}) and exported by bigtx {__version__}."
    if imported := manifest.get("imported"):
        origin = (
            f"Its weights were imported from a Hugging Face model, `{imported['from']}`, and were exported again by "
            f"bigtx {__version__}, without training in between."
        )
    elif base := config.base if isinstance(config, FinetuneConfig) else getattr(config, "init_from", None):
        origin += f" The training started from the weights of `{Path(base).name}`."
    return (
        f"A Transformer, {kind[config.model.shape]}, of {made.num_parameters:,} parameters, in the form of "
        f"transformers' `{made.architecture}`. {origin}"
    )


def _aim(config: RunConfig) -> str:
    """Return the purpose of the training."""
    if isinstance(config, FinetuneConfig):
        rank = config.model.lora.rank
        return f"fine-tuned to {config.task}" + (f", by adapters of rank {rank} that were merged" if rank else "")
    assert isinstance(config, PretrainConfig)
    return f"{config.objective.name} objective"


def _model_rows(model: ModelConfig, made: Exported, dtype: str) -> dict[str, Any]:
    layers = {"encoder": shape.num_encoder_layers(model), "decoder": shape.num_decoder_layers(model)}
    experts, heads, width = model.experts, shape.num_kv_heads(model), shape.head_width(model)
    rows: dict[str, Any] = {
        "Parameters": f"{made.num_parameters:,}",
        "Class in transformers": f"`{made.architecture}`",
        "Precision of the files": dtype,
        "Vocabulary": f"{model.vocab_size:,}",
        "Hidden size": f"{model.hidden_size:,}",
    }
    rows |= {f"Layers of the {stack}": count for stack, count in layers.items() if count}
    rows |= {
        "Attention heads": f"{model.num_heads}, of keys and values {heads}, width {width}",
        "Feed-forward": f"{model.mlp}, {shape.mlp_size(model):,}",
        "Norm": f"{model.norm}, {model.norm_placement}",
        "Positions": model.positions,
        "Longest sequence": f"{model.max_sequence_length:,} tokens",
        "Tied embeddings": "yes" if model.tie_embeddings else "no",
    }
    if experts.num_experts:
        rows["Experts"] = f"{experts.num_experts}, {experts.num_active} active, {shape.expert_size(model):,} wide"
    return rows


def _class_rows(config: RunConfig) -> dict[str, Any]:
    """Return the classes of a classifier, and its input."""
    if not isinstance(config, FinetuneConfig) or config.model.num_classes is None:
        return {}
    names = config.classify.classes
    summary = {"first": "the first token", "last": "the last token", "mean": "the mean of all tokens"}
    return {
        "Classes": format_names([name.replace("|", "\\|") for name in names], 24),
        "Summary of a text": summary[config.classify.pooling],
    }


def _data(config: RunConfig, manifest: Mapping[str, Any]) -> str:
    tokens = manifest.get("state", {}).get("tokens")
    read = f"Tokens read in training: {_NOT_RECORDED if tokens is None else f'{tokens:,}'}."
    if isinstance(config, FinetuneConfig):
        files = "\n".join(f"- `{Path(path).name}`" for path in config.data.train)
        return f"Records of:\n\n{files}\n\n{read}" if files else f"Records: {_NOT_RECORDED}. {read}"
    assert isinstance(config, PretrainConfig)
    rows = "\n".join(f"| {name} | {source.weight:g} |" for name, source in config.data.sources.items())
    return f"| Source | Weight |\n|---|---|\n{rows}\n\n{read}" if rows else f"Sources: {_NOT_RECORDED}. {read}"


def _training(config: RunConfig, manifest: Mapping[str, Any]) -> str:
    if "imported" in manifest:
        return f"Before the import into bigtx: {_NOT_RECORDED}."
    optimizer, train = config.optimizer, config.train
    length = getattr(train, "sequence_length", None)
    return _table(
        {
            "Steps": f"{manifest['step']:,}",
            "Rows in a step": f"{train.global_batch_size:,}" + (f" of {length:,} tokens" if length else ""),
            "Aim": _aim(config),
            "Precision": manifest.get("precision", _NOT_RECORDED),
            "Optimizer": f"{optimizer.name}, peak learning rate {optimizer.learning_rate:g}",
            "Schedule": f"{config.schedule.name}, warm-up {config.schedule.warmup}",
            "Processes": manifest.get("world_size", _NOT_RECORDED),
            "Seed": config.seed,
        }
    )


def _losses(metrics: Path, manifest: Mapping[str, Any]) -> str:
    """Return the last validation losses up to the checkpoint's step."""
    last: dict[str, dict[str, Any]] = {}
    for record in read_records(metrics):
        if step_of(record) > manifest["step"]:
            continue
        now: dict[str, dict[str, Any]] = {}
        for key, value in record.items():
            if found := _VALIDATION_LOSS.fullmatch(key):
                # float also reads "NaN" and "Infinity", which metrics.jsonl may contain.
                with contextlib.suppress(TypeError, ValueError):  # A damaged line.
                    now.setdefault(found[1], {"step": record["step"]})[found[2]] = float(value)
        last |= now
    if not last:
        return f"Validation losses: {_NOT_RECORDED}."
    lines = (
        f"| {name} | {values['step']:,} | {_number(values.get('loss'))} | {_number(values.get('bits_per_byte'))} |"
        for name, values in last.items()
    )
    return "\n".join(["| Validation text | Step | Loss | Bits per byte |", "|---|---|---|---|", *lines])


def _number(value: float | None) -> str:
    return _NOT_RECORDED if value is None else f"{value:.4f}"


def _tokenizer_rows(tokenizer: Tokenizer) -> dict[str, Any]:
    rows = {
        "Kind": " ".join(filter(None, [tokenizer.kind, tokenizer.origin.get("method")])),
        "Ids": f"{tokenizer.vocab_size:,}",
        "Fingerprint": f"`{tokenizer.fingerprint}`",
    }
    if tokenizer.role_ids:
        rows["Chat roles"] = ", ".join(tokenizer.role_ids)
    return rows


def _usage(auto_class: str) -> str:
    return f"""\
With transformers; FOLDER is the folder of this file:

```python
from transformers import AutoTokenizer, {auto_class}

tokenizer = AutoTokenizer.from_pretrained("FOLDER")
model = {auto_class}.from_pretrained("FOLDER")
```

With bigtx, after `bigtx import FOLDER -o runs/imported`:

```python
import bigtx

loaded = bigtx.load("runs/imported")
```"""


def _table(rows: Mapping[str, Any]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])
