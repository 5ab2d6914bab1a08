"""`bigtx evaluate`: how good a run is on held-out data, as a table, a JSON file, and a W&B run of its own.

    a fine-tuned run     its task's metrics, on the records of files or of one of its own splits
    a pretrained run     loss, perplexity and bits per byte, on the validation split of prepared corpora

One process on one device. The W&B run is a new one, of job type `evaluate`: the run that was trained is finished, and
W&B takes no more steps behind its last one. Its config names the run and the checkpoint.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bigtx.config.runs import run_dir_of
from bigtx.config.schema import FinetuneConfig, PretrainConfig, RunConfig
from bigtx.engine.trained import find
from bigtx.track.jsonl import plain
from bigtx.utils.arguments import Arguments
from bigtx.utils.errors import CheckpointError, ConfigError, DataError, LaunchError
from bigtx.utils.files import read_object, write_json

if TYPE_CHECKING:
    from bigtx.data.records.record import Broken, Record
    from bigtx.engine.checkpoint import Checkpoint
    from bigtx.generate import LoadedModel

FOLDER = "evaluations"
"""In the run folder, where no other output is named."""
EXIT_SOME_FAILED = 1
MAX_COLUMNS = 12
"""Of a table that is printed; wider ones are in the JSON file alone."""


def command(argv: Sequence[str]) -> int:
    """`bigtx evaluate`.

    Returns:
        The exit status: 1 if some records could not be used.

    Raises:
        BigtxError: a run or data that cannot be used.
    """
    arguments = _parser().parse_args(argv)
    if arguments.batch_size is not None and arguments.batch_size < 1:
        raise ConfigError(f"--batch-size={arguments.batch_size}: at least 1")
    if arguments.output is not None and not arguments.output.endswith(".json"):
        raise ConfigError(f"--output {arguments.output}: a JSON file is written; name it NAME.json")
    checkpoint, config = find(arguments.run)
    if arguments.output is not None:
        _refuse_other_file(Path(arguments.output), arguments, checkpoint)
    found: _Records | _Corpora
    if isinstance(config, FinetuneConfig):
        found = _Records(arguments, checkpoint, config)
    else:
        assert isinstance(config, PretrainConfig)
        found = _Corpora(arguments, checkpoint, config)
    result = found.measure()
    output = _output_path(arguments, checkpoint, result)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_json(output, plain(result))
    except OSError as error:
        raise LaunchError(f"{output} cannot be written: {error.strerror}; name another file by --output") from None
    print(_shown(result))
    print(f"written to {output}")
    _track(arguments, config, result, output, found.examples)
    return found.status


def _parser() -> Arguments:
    parser = Arguments(
        prog="bigtx evaluate",
        description="How good a run is on held-out data: a fine-tuned one by the metrics of its task, on records with "
        "answers (the exit status is 1 if some of them cannot be used); a pretrained one by its loss, on the "
        "validation split of prepared corpora.",
    )
    parser.add_argument("run", metavar="RUN", help="folder of a run, or of one of its checkpoints")
    data = parser.add_mutually_exclusive_group(required=True)
    data.add_argument(
        "--data",
        metavar="FILE",
        nargs="+",
        help="records (.jsonl, .csv, .tsv, .tar, folders, globs); for a pretrained run folders of prepared corpora",
    )
    data.add_argument("--split", choices=["validation", "test"], help="held-out data of the run itself")
    parser.add_argument("--output", metavar="FILE.json", help=f"where to write (RUN/{FOLDER}/NAME.json)")
    parser.add_argument(
        "--set", metavar="KEY=VALUE", nargs="+", default=[], help="how a task predicts, e.g. translate.num_beams=1"
    )
    parser.add_argument("--batch-size", metavar="N", type=int, help="records side by side (32)")
    parser.add_argument(
        "--weights", choices=["master", "ema"], default="master", help="ema: the averaged copy (master)"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (auto: a GPU if there is one)")
    parser.add_argument(
        "--wandb", choices=["auto", "online", "offline", "off"], help="a W&B run of this evaluation (as the run had it)"
    )
    return parser


class _Evaluation:
    """What both kinds of runs have."""

    def __init__(self, arguments: argparse.Namespace, checkpoint: Path) -> None:
        self.arguments, self.checkpoint = arguments, checkpoint
        self.examples: list[dict[str, Any]] = []
        self.status = 0

    def load(self) -> LoadedModel:
        """The model."""
        from bigtx.generate import load

        return load(self.checkpoint, weights=self.arguments.weights, device=self.arguments.device)

    def result(self, metrics: Mapping[str, float], **facts: Any) -> dict[str, Any]:
        """What is written."""
        from bigtx.engine.checkpoint import Checkpoint
        from bigtx.utils.version import __version__

        checkpoint = Checkpoint(self.checkpoint)
        return {
            "bigtx": __version__,
            "checkpoint": str(self.checkpoint.absolute()),
            "manifest_sha256": checkpoint.manifest_sha256,
            "wandb_run_id": checkpoint.manifest.get("wandb_run_id", ""),
            "step": checkpoint.manifest["step"],
            "tokens": checkpoint.manifest["state"]["tokens"],
            **_what_is_measured(self.arguments),
            **facts,
            "metrics": dict(metrics),
        }


class _Records(_Evaluation):
    """A fine-tuned run, on records."""

    def __init__(self, arguments: argparse.Namespace, checkpoint: Path, config: FinetuneConfig) -> None:
        super().__init__(arguments, checkpoint)
        from bigtx.train.predictions import task_config

        self.config = task_config(config, arguments.run, arguments.set)

    def measure(self) -> dict[str, Any]:
        """The metrics of the task.

        Raises:
            DataError: records that cannot be used, or others than the run had.
        """
        from bigtx.data.audio.look import look_at
        from bigtx.train.examples import encode
        from bigtx.train.predictions import BATCH_SIZE, predict_all, shown_predictions
        from bigtx.train.record_table import digest

        records, broken = self._read()
        loaded = dataclasses.replace(self.load(), config=self.config)
        task = loaded.task
        task.look_ahead(records, look_at)
        examples = encode(task, records, broken)
        self.tell(broken, is_any_left=bool(examples.records))
        records = examples.records
        ready = self._with_reference(loaded, examples.examples) if task.needs_reference else examples.examples
        device, size = next(loaded.model.parameters()).device, self.arguments.batch_size or BATCH_SIZE
        predictions = predict_all(task, loaded.model, ready, batch_size=size, device=device)
        self.examples = shown_predictions(task, records, predictions, self.config.validation.num_examples)
        facts = {"task": self.config.task, "records": len(records), "num_cut": examples.num_cut}
        if broken.count:
            facts["num_failed"] = broken.count
        return self.result(task.metrics(predictions), **facts, records_sha256=digest(records)) | {
            "tables": task.tables(predictions)
        }

    def _with_reference(self, loaded: LoadedModel, examples: Sequence[Any]) -> list[Any]:
        """The examples with what the model said of them before the run's first step.

        Raises:
            CheckpointError: the base is gone, or is another one by now.
        """
        from bigtx.train.base_weights import untrained
        from bigtx.train.predictions import BATCH_SIZE, batches_by_length, in_order

        task, model = loaded.task, untrained(self.config, loaded.model, self._base())
        device = next(model.parameters()).device
        batches = list(batches_by_length(examples, self.arguments.batch_size or BATCH_SIZE))
        found = [task.refer(model, [examples[place] for place in batch], device) for batch in batches]
        return list(map(task.with_reference, examples, in_order(batches, found, len(examples))))

    def _base(self) -> Checkpoint | None:
        """What the run began with; None: with nothing but its seed."""
        from bigtx.engine.merged import MergedCheckpoint
        from bigtx.train.finetuning import BASE

        if self.config.base is None:
            return None
        path = run_dir_of(self.checkpoint) / BASE
        facts = read_object(path)
        if not isinstance(facts.get("checkpoint"), str):
            raise CheckpointError(f"task={self.config.task} compares the model with its base, and {path} names none")
        base = MergedCheckpoint(Path(facts["checkpoint"]))
        if base.manifest_sha256 != facts.get("manifest_sha256"):
            raise CheckpointError(f"{base.path} is not the base that {path} names; give that one back")
        return base

    def tell(self, broken: Broken, *, is_any_left: bool) -> None:
        """Say which records cannot be used; the others are measured.

        Raises:
            DataError: there are no others.
        """
        if not is_any_left:
            broken.check()
        if broken.count:
            self.status = EXIT_SOME_FAILED
            print(f"error: {broken.describe()}:{broken.listed()}", file=sys.stderr)

    def _read(self) -> tuple[list[Record], Broken]:
        from bigtx.data.records.record import Broken
        from bigtx.train.examples import read_all

        broken = Broken()
        if self.arguments.split:
            records = self._of_run(self.arguments.split)
        else:
            records = read_all(self.arguments.data, broken, self.config.data.exclude)
        if not records and not broken.count:
            split = self.arguments.split
            raise DataError(f"the run has no {split} records" if split else "there are no records in these files")
        return records, broken

    def _of_run(self, split: str) -> list[Record]:
        """The run's own records.

        Raises:
            DataError: they have changed since.
        """
        from bigtx.engine.checkpoint import Checkpoint
        from bigtx.train import record_table
        from bigtx.train.examples import read_split

        run_dir = run_dir_of(self.checkpoint)
        table = record_table.read(run_dir) if self.config.data.leave_out else None
        records = read_split(self.config, split, table)
        found = record_table.identity(table).get(split) if table else record_table.digest(records)
        if records and Checkpoint(self.checkpoint).manifest["data"].get(split) != found:
            raise DataError(
                f"the {split} records are not those that the run had: their files have changed since; to measure on "
                "them as they are, name them by --data"
            )
        return records


class _Corpora(_Evaluation):
    """A pretrained run, on prepared corpora."""

    def __init__(self, arguments: argparse.Namespace, checkpoint: Path, config: PretrainConfig) -> None:
        super().__init__(arguments, checkpoint)
        self.config = config

    def measure(self) -> dict[str, Any]:
        """Loss, perplexity and bits per byte of each corpus, as validation within the run has them.

        Raises:
            ConfigError: no corpus holds text out, or it was prepared with another tokenizer.
            DataError: there is no such corpus.
        """
        from bigtx.train.held_out import validation_sources

        config = self._config()
        if not validation_sources(config):
            raise ConfigError("none of the run's corpora holds text out; name a prepared one by --data FOLDER")
        # Imports torch, which nobody should wait for to hear of a mistake.
        from bigtx.train.alone import Alone
        from bigtx.train.evaluation import Validation
        from bigtx.train.tasks.likelihood import LikelihoodTask

        loaded = self.load()
        config = dataclasses.replace(config, model=loaded.config.model)
        alone = Alone(loaded.model)
        task = LikelihoodTask(z_loss=0.0)
        validation = Validation(config, alone, alone, task, loaded.tokenizer)
        metrics = {name.removeprefix("validation/"): value for name, value in validation.measure().items()}
        return self.result(metrics, rows=config.validation.max_sequences)

    def _config(self) -> PretrainConfig:
        from bigtx.config.schema import SourceConfig

        arguments, settings = self.arguments, self.config.validation
        if arguments.split == "test":
            raise ConfigError("--split test: a pretrained run has none; its held-out text is --split validation")
        if arguments.batch_size is not None:
            train = dataclasses.replace(self.config.train, micro_batch_size=arguments.batch_size)
            self.config = dataclasses.replace(self.config, train=train)
        if arguments.split:
            return self.config
        sources = {Path(path).resolve().name: SourceConfig(path=path) for path in arguments.data}
        if len(sources) < len(arguments.data):
            raise ConfigError("--data: two corpora have one name; evaluate them one after the other")
        rows = settings.max_sequences or type(settings)().max_sequences
        return dataclasses.replace(
            self.config, validation=dataclasses.replace(settings, sources=sources, max_sequences=rows)
        )


def _output_path(arguments: argparse.Namespace, checkpoint: Path, result: Mapping[str, Any]) -> Path:
    """The file to write: as asked for, or a name that no other evaluation has taken."""
    if arguments.output:
        return Path(arguments.output)
    name = arguments.split or Path(arguments.data[0]).name.partition(".")[0] or "data"
    folder = run_dir_of(checkpoint) / FOLDER
    for number in range(1, 10_000):
        path = folder / (f"{name}.json" if number == 1 else f"{name}-{number}.json")
        if not path.exists() or _same(path, result):
            return path
    raise LaunchError(f"{folder} is full of evaluations called {name}; name a file by --output")


def _refuse_other_file(output: Path, arguments: argparse.Namespace, checkpoint: Path) -> None:
    """Look before the work begins: only the same evaluation, done again, may be written over."""
    if not output.exists():
        return
    from bigtx.engine.checkpoint import Checkpoint

    before = read_object(output)
    if not before.keys() >= {"checkpoint", "manifest_sha256", "metrics"}:
        raise ConfigError(f"--output {output} is there already and is no evaluation; name another file")
    now = _what_is_measured(arguments) | {"manifest_sha256": Checkpoint(checkpoint).manifest_sha256}
    if any(before.get(key) != value for key, value in now.items()):
        raise ConfigError(
            f"--output {output} is another evaluation already, of {before['checkpoint']}; name another file, or delete "
            "that one"
        )


def _what_is_measured(arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        "weights": arguments.weights,
        "set": sorted(arguments.set),
        "data": {"split": arguments.split} if arguments.split else {"paths": arguments.data},
    }


def _same(path: Path, result: Mapping[str, Any]) -> bool:
    """Whether a file is the evaluation of the same weights on the same data in the same way."""
    before = read_object(path)
    keys = ("manifest_sha256", "weights", "data", "records_sha256", "rows", "set")
    return all(before.get(key) == result.get(key) for key in keys)


def _shown(result: Mapping[str, Any]) -> str:
    """For a person: the metrics, and tables that are not too wide."""
    lines = [f"{result['checkpoint']}, step {result['step']:,}, {result['weights']} weights"]
    if "records" in result:
        cut = f", {result['num_cut']:,} of them cut to the model's length" if result["num_cut"] else ""
        lines.append(f"{result['records']:,} records{cut}")
    width = max(map(len, result["metrics"]))
    lines += [f"  {name:<{width}}  {value:.4f}" for name, value in result["metrics"].items()]
    for name, rows in result.get("tables", {}).items():
        if rows and len(rows[0]) <= MAX_COLUMNS:
            lines += [f"{name}:", *_table(rows)]
    return "\n".join("".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in line) for line in lines)


def _table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    cells = [list(rows[0]), *([str(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  "
        + "  ".join(
            cell.ljust(width) if place == 0 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in cells
    ]


def _track(
    arguments: argparse.Namespace,
    config: RunConfig,
    result: Mapping[str, Any],
    output: Path,
    examples: Sequence[Mapping[str, Any]],
) -> None:
    """Give the figures to W&B, unless that is off."""
    from bigtx.track.tracker import Tracker
    from bigtx.train.run_folder import dump
    from bigtx.utils import hardware

    track = dataclasses.replace(config.track, wandb=arguments.wandb or config.track.wandb)
    if track.wandb == "off":
        return
    folder = output.with_suffix(".wandb")
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise LaunchError(
            f"{folder} cannot be made, for the W&B run: {error.strerror}; name another file by --output, or --wandb off"
        ) from None
    facts = {key: value for key, value in result.items() if key not in ("metrics", "tables")}
    checkpoint = Path(result["checkpoint"])
    tracker = Tracker(
        folder,
        track,
        run_config={**dump(config), "evaluation": facts},
        environment=hardware.describe(),
        rank=0,
        total_steps=0,
        name=f"{run_dir_of(checkpoint).name} {output.stem}",
        job_type="evaluate",
        base={
            "checkpoint": str(checkpoint),
            **{key: result[key] for key in ("manifest_sha256", "wandb_run_id", "step")},
        },
        stream=sys.stdout,
    )
    step, tokens = result["step"], result["tokens"]
    tracker.log(step, tokens, {f"evaluate/{name}": value for name, value in result["metrics"].items()})
    tracker.predictions(step, tokens, examples)
    tracker.close("finished", step)
