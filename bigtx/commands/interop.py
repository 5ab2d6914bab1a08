"""`bigtx import` and `bigtx export`: import models from, and export models to, Hugging Face's transformers."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bigtx.utils.arguments import Arguments
from bigtx.utils.errors import CheckpointError, ConfigError
from bigtx.utils.files import refuse_filled
from bigtx.utils.log import said_aside, say, say_json, say_result
from bigtx.utils.shell import command, settings
from bigtx.utils.units import counted, format_count, format_names, format_size, parse_size

if TYPE_CHECKING:
    from bigtx.interop.adapters import ExportedAdapters
    from bigtx.interop.exporter import Exported
    from bigtx.interop.importer import Imported
    from bigtx.interop.verify import Verdict


def import_command(argv: Sequence[str]) -> None:
    """Turn a Hugging Face model into a run, and report what was imported."""
    parser = Arguments(
        "import",
        "Turn a model in Hugging Face's format into a run, to generate with, to train further and to "
        "fine-tune. Nothing in the folder is executed.",
    )
    parser.add_argument("source", metavar="FOLDER", type=Path, help="with config.json, safetensors and the tokenizer")
    parser.add_argument("-o", "--output", metavar="RUN", type=Path, required=True, help="folder of the new run")
    parser.add_argument("--tokenizer", metavar="FOLDER", type=Path, help="the tokenizer, if it is in another folder")
    options = parser.parse_args(argv)
    from bigtx.interop.read import read_config

    read_config(options.source)  # Before torch is imported.
    refuse_filled(options.output)
    from bigtx.interop.importer import import_model
    from bigtx.model.size import count_parameters

    with said_aside(options.json):
        made = import_model(options.source, options.output, tokenizer_folder=options.tokenizer)
    num_parameters = count_parameters(made.config).total
    facts = _import_facts(options.output, made, num_parameters)
    lines = [*_describe_imported(made, num_parameters), *_next_commands(options.output, made)]
    say_result(options.json, lambda: facts, lambda: lines)


def _import_facts(run: Path, made: Imported, num_parameters: int) -> dict[str, Any]:
    config = made.config
    return {
        "run": str(run),
        "checkpoint": str(made.checkpoint),
        "model_type": made.model_type,
        "shape": config.shape,
        "num_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "num_parameters": num_parameters,
        "num_tensors": len(made.match.keys),
        "num_files": made.num_files,
        "num_token_ids": made.tokenizer.vocab_size,
        "vocab_size": config.vocab_size,
        "num_classes": config.num_classes,
        "untrained": made.match.untrained,
        "dropped": made.match.dropped,
    }


def _describe_imported(made: Imported, num_parameters: int) -> Iterator[str]:
    config = made.config
    yield (
        f"{made.model_type}: {len(made.match.keys):,} tensors in {counted(made.num_files, 'file')} are "
        f"{format_count(num_parameters)} parameters ({config.shape}, {config.num_layers} layers, "
        f"{config.hidden_size} wide), all imported" + (" except the head" if made.match.untrained else "")
    )
    if made.match.untrained:
        yield (
            "New and untrained, because the model was saved without its head: "
            f"{format_names(made.match.untrained, 5)}. Fine-tuning does not need this head; to predict masked tokens, "
            "train the run further first"
        )
    if made.match.dropped:
        yield f"Dropped, because the model does not need them: {format_names(made.match.dropped, 5)}"
    yield f"{made.tokenizer.vocab_size:,} token ids, {config.vocab_size:,} rows in the vocabulary"
    yield f"Wrote {made.checkpoint}"


def _next_commands(run: Path, made: Imported) -> Iterator[str]:
    """Yield the commands with which the new run is used and trained further."""
    config = made.config
    if config.num_classes is not None:
        yield f"It sorts texts into {config.num_classes:,} classes; their names are in {run / 'config.yaml'}"
        yield f"Next: {command('bigtx', 'predict', run, 'input=FILE')}"
        tuning = {"base": run, "data.train": "FILES", "run_dir": "runs/next", "train.epochs": 3}
        yield f"To train further: {command('bigtx', 'finetune', run / 'config.yaml')} {settings(tuning)}"
        return
    if config.shape == "decoder":
        yield f"Next: {command('bigtx', 'generate', run, 'prompt=Once upon a time')}"
    prepare = settings({"input.paths": "TEXTS", "tokenizer": run / "tokenizer", "output": "CORPUS"})
    yield f"To train further: bigtx data prepare {prepare}"
    values = {"init_from": run, "run_dir": "runs/next", "data.sources.mine.path": "CORPUS", "train.max_steps": 1000}
    yield f"  {command('bigtx', 'pretrain', run / 'config.yaml')} {settings(values)}"


def export_command(argv: Sequence[str]) -> None:
    """Export a run for transformers, and compare the export with the run.

    Raises:
        BigtxError: the run cannot be exported, or transformers gives other results for the export.
    """
    options = _export_parser().parse_args(argv)
    refuse_filled(options.output)
    with said_aside(options.json):
        facts = _export_adapters(options) if options.to == "peft" else _export_model(options)
    if options.json:
        say_json(facts)


def _export_model(options: argparse.Namespace) -> dict[str, Any]:
    """Export a run's model for transformers and compare. Return the result."""
    if options.base is not None:
        raise ConfigError("base= is for to=peft: with to=hf the export contains the base; leave base= out")
    size = _shard_bytes(options.max_shard_size)
    from bigtx.engine.trained import find_with_tokenizer

    checkpoint, run, tokenizer = find_with_tokenizer(options.run)  # Before torch is imported.
    from bigtx.interop.exporter import ExportSettings, export_model
    from bigtx.interop.verify import require, verify

    if not options.no_verify:
        require("transformers", "huggingface")
    settings = ExportSettings(
        dtype=options.dtype, weights=options.weights, family=options.family, license=options.license, shard_bytes=size
    )
    made = export_model(checkpoint, run, tokenizer, options.output, settings)
    say(
        f"{checkpoint} as {made.architecture}: {made.num_tensors:,} tensors, {format_count(made.num_parameters)} "
        f"parameters in {options.dtype}, {format_size(sum(made.files.values()))} in {counted(len(made.files), 'file')}"
    )
    arguments = made.folder, made.family, checkpoint, run, tokenizer, settings
    why_not, also = "--no-verify" if options.no_verify else "", "The same token ids, and "
    compared = _compare(made.folder, "transformers", why_not, lambda: verify(*arguments), also)
    say(f"Next, in Python: transformers.{made.auto_class}.from_pretrained({str(made.folder)!r})")
    return _export_facts(options, checkpoint, made, compared) | {
        "architecture": made.architecture,
        "dtype": options.dtype,
        "num_tensors": made.num_tensors,
        "files": made.files,
    }


def _export_facts(
    options: argparse.Namespace, checkpoint: Path, made: Exported | ExportedAdapters, compared: dict[str, Any] | None
) -> dict[str, Any]:
    """Return the facts of both kinds of exports."""
    return {
        "folder": str(made.folder),
        "to": options.to,
        "checkpoint": str(checkpoint),
        "weights": options.weights,
        "model_type": made.family.model_type,
        "num_parameters": made.num_parameters,
        "compared": compared,
    }


def _export_adapters(options: argparse.Namespace) -> dict[str, Any]:
    """Export a run's adapters for PEFT, and compare if their base is a local folder. Return the result."""
    from bigtx.engine.trained import find_with_tokenizer

    if options.base is None:
        raise ConfigError(
            "to=peft needs base=FOLDER, the model in transformers' format that the adapters belong to: the imported "
            "one, or the folder that `bigtx export BASE_RUN output=FOLDER` writes for the run's base"
        )
    if options.dtype != "fp32" or options.license is not None:
        what = "dtype= and license= are for to=hf; adapters are written in fp32, without a model card; leave them out"
        raise ConfigError(what)
    checkpoint, run, tokenizer = find_with_tokenizer(options.run)  # Before torch is imported.
    from bigtx.interop.adapters import export_adapters
    from bigtx.interop.exporter import ExportSettings
    from bigtx.interop.verify import require, verify

    base = Path(options.base)
    elsewhere = "" if base.is_dir() else f"{options.base} is not a folder on this machine"
    why_not = "--no-verify" if options.no_verify else elsewhere
    if not why_not:
        require("peft", "peft")
    settings = ExportSettings(weights=options.weights, family=options.family)
    made = export_adapters(checkpoint, run, options.output, settings, base=options.base)
    say(
        f"{checkpoint}: adapters of rank {run.model.lora.rank} for {made.num_modules:,} modules of "
        f"{made.family.architecture}, {format_count(made.num_parameters)} parameters"
    )
    arguments = made.folder, made.family, checkpoint, run, tokenizer, settings, base
    compared = _compare(made.folder, "PEFT", why_not, lambda: verify(*arguments))
    say(f"Next, in Python: peft.PeftModel.from_pretrained(model, {str(made.folder)!r})")
    facts = {"rank": run.model.lora.rank, "num_modules": made.num_modules}
    return _export_facts(options, checkpoint, made, compared) | facts


def _compare(
    folder: Path, library: str, why_not: str, verify: Callable[[], Verdict], also: str = ""
) -> dict[str, Any] | None:
    """Compare an export with the run, and report how closely they agree.

    Args:
        library: the library that loads the export.
        why_not: the reason to skip the comparison, if there is one.
        also: what else is the same.

    Returns:
        The figures of the comparison; None if it was skipped.

    Raises:
        CheckpointError: they do not agree.
    """
    if why_not:
        say(f"Wrote {folder}; it was not compared with {library} ({why_not})")
        return None
    say(f"Wrote {folder}. Loading it with {library}, to compare")
    verdict = verify()
    if verdict.problems:
        what = f"{folder} was written, but transformers gives other results than bigtx, so do not use it"
        raise CheckpointError(f"{what}: {'; '.join(verdict.problems)}. The folder is kept for inspection")
    say(
        f"{also}{verdict.num_logits:,} logits of {verdict.inputs} {'that ' if also else ''}differ by at most "
        f"{verdict.difference:.1e} of the largest"
    )
    return {"num_logits": verdict.num_logits, "largest_difference": verdict.difference}


def _export_parser() -> Arguments:
    parser = Arguments(
        "export",
        "Write a run's checkpoint as a folder that transformers loads without bigtx's code, with merged "
        "adapters, or write only its adapters for PEFT; then load the folder and compare ids and logits.",
    )
    parser.add_argument("run", metavar="RUN", help="folder of a run, or of one of its checkpoints")
    parser.add_argument("--to", choices=["hf", "peft"], default="hf", help="hf: transformers; peft: the adapters (hf)")
    parser.add_argument("-o", "--output", metavar="FOLDER", type=Path, required=True, help="folder to make")
    parser.add_argument("--base", metavar="FOLDER", help="peft: the model in transformers' format that they belong to")
    parser.add_argument("--dtype", choices=["fp32", "bf16", "fp16"], default="fp32", help="type of the weights (fp32)")
    parser.add_argument(
        "--weights", choices=["master", "ema"], default="master", help="ema: the averaged copy (master)"
    )
    parser.add_argument("--family", metavar="NAME", help="model_type to write (the first that can represent the model)")
    parser.add_argument("--max-shard-size", metavar="SIZE", default="5GB", help="maximum size of a file (5GB)")
    parser.add_argument("--license", metavar="ID", help="license in the model card, as on the hub: apache-2.0, mit ...")
    parser.add_argument(
        "--no-verify", action="store_true", help="skip the comparison (it needs 8 bytes of memory per parameter)"
    )
    return parser


def _shard_bytes(text: str) -> int:
    try:
        size = parse_size(text)
    except ValueError as error:
        raise ConfigError(f"max_shard_size={text} {error}") from None
    if size < 1:
        raise ConfigError(f"max_shard_size={text}: write a size above 0, e.g. 5GB")
    return size
