"""What `bigtx evaluate` measures: a fine-tuned run on records, a pretrained one on prepared corpora."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bigtx.config.runs import run_dir_of
from bigtx.config.schema import FinetuneConfig, PretrainConfig
from bigtx.utils.errors import EXIT_SOME_FAILED, CheckpointError, ConfigError, DataError
from bigtx.utils.files import read_object

if TYPE_CHECKING:
    from bigtx.api import LoadedModel
    from bigtx.data.records.record import Broken, Record
    from bigtx.engine.checkpoint import Checkpoint


class Evaluation:
    """The evaluation of a run; the base of both kinds."""

    def __init__(self, arguments: argparse.Namespace, checkpoint: Path) -> None:
        self.arguments, self.checkpoint = arguments, checkpoint
        self.examples: list[dict[str, Any]] = []
        self.status = 0

    def load(self) -> LoadedModel:
        """Load the model."""
        from bigtx.api import load

        return load(self.checkpoint, weights=self.arguments.weights, device=self.arguments.device)

    def result(self, metrics: Mapping[str, float], **facts: Any) -> dict[str, Any]:
        """Return the result that is written to the output."""
        from bigtx.engine.checkpoint import Checkpoint
        from bigtx.utils import __version__

        checkpoint = Checkpoint(self.checkpoint)
        return {
            "bigtx": __version__,
            "checkpoint": str(self.checkpoint.absolute()),
            "manifest_sha256": checkpoint.manifest_sha256,
            "wandb_run_id": checkpoint.manifest.get("wandb_run_id", ""),
            "step": checkpoint.manifest["step"],
            "tokens": checkpoint.manifest["state"]["tokens"],
            **what_is_measured(self.arguments),
            **facts,
            "metrics": dict(metrics),
        }


class Records(Evaluation):
    """A fine-tuned run, on records."""

    def __init__(self, arguments: argparse.Namespace, checkpoint: Path, config: FinetuneConfig) -> None:
        super().__init__(arguments, checkpoint)
        from bigtx.finetuning.predictions import task_config

        self.config = task_config(config, arguments.run, arguments.set)

    def measure(self) -> dict[str, Any]:
        """Compute the metrics of the task.

        Raises:
            DataError: no record can be used, or the run's records have changed.
        """
        from bigtx.data.recordings import look_at
        from bigtx.finetuning.predictions import BATCH_SIZE, predict_all, shown_predictions
        from bigtx.finetuning.records import digest, encode

        records, broken = self._read()
        loaded = dataclasses.replace(self.load(), config=self.config)
        task = loaded.task
        task.look_ahead(records, look_at)
        examples = encode(task, records, broken)
        self.report(broken, is_any_left=bool(examples.records))
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
        """Return the examples with the log-probabilities of the model before the run's first step.

        Raises:
            CheckpointError: the base is missing or has changed.
        """
        from bigtx.finetuning.base import untrained
        from bigtx.finetuning.predictions import BATCH_SIZE, by_batches

        task, model = loaded.task, untrained(self.config, loaded.model, self._base())
        device = next(model.parameters()).device
        size = self.arguments.batch_size or BATCH_SIZE
        found = by_batches(lambda batch: task.refer(model, batch, device), examples, size)
        return list(map(task.with_reference, examples, found))

    def _base(self) -> Checkpoint | None:
        """Return the checkpoint that the run started from; None if it started from random weights."""
        from bigtx.engine.checkpoint import MergedCheckpoint
        from bigtx.finetuning.base import BASE

        if self.config.base is None:
            return None
        path = run_dir_of(self.checkpoint) / BASE
        facts = read_object(path)
        if not isinstance(facts.get("checkpoint"), str):
            raise CheckpointError(f"task={self.config.task} compares the model with its base, but {path} names none")
        base = MergedCheckpoint(Path(facts["checkpoint"]))
        if base.manifest_sha256 != facts.get("manifest_sha256"):
            raise CheckpointError(f"{base.path} is not the base that {path} names; restore that base from a copy")
        return base

    def report(self, broken: Broken, *, is_any_left: bool) -> None:
        """Report the records that cannot be used; the others are measured.

        Raises:
            DataError: no other records are left.
        """
        if not is_any_left:
            broken.check()
        if broken.count:
            self.status = EXIT_SOME_FAILED
            print(f"error: {broken.describe()}:{broken.listed()}", file=sys.stderr)

    def _read(self) -> tuple[list[Record], Broken]:
        from bigtx.data.records.read import read_records
        from bigtx.data.records.record import Broken

        broken = Broken()
        if self.arguments.split:
            records = self._of_run(self.arguments.split)
        else:
            records = list(read_records(self.arguments.data, broken, self.config.data.exclude))
        if not records and not broken.count:
            split = self.arguments.split
            none = f"the run has no {split} records; name others: data=FILE"
            raise DataError(none if split else "there are no records in these files")
        return records, broken

    def _of_run(self, split: str) -> list[Record]:
        """Read the run's own records.

        Raises:
            DataError: they have changed since the run.
        """
        from bigtx.engine.checkpoint import Checkpoint
        from bigtx.finetuning.records import digest, identity, read_split, read_table

        run_dir = run_dir_of(self.checkpoint)
        table = read_table(run_dir) if self.config.data.leave_out else None
        records = read_split(self.config, split, table)
        found = identity(table).get(split) if table else digest(records)
        if records and Checkpoint(self.checkpoint).manifest["data"].get(split) != found:
            raise DataError(
                f"the {split} records are not those of the run: their files have changed since then; to measure on "
                "the present ones, name them: data=FILE"
            )
        return records


class Corpora(Evaluation):
    """A pretrained run, on prepared corpora."""

    def __init__(self, arguments: argparse.Namespace, checkpoint: Path, config: PretrainConfig) -> None:
        super().__init__(arguments, checkpoint)
        self.config = config

    def measure(self) -> dict[str, Any]:
        """Compute loss, perplexity and bits per byte of each corpus, as validation during the run does.

        Raises:
            ConfigError: no corpus has held-out text, or a corpus was prepared with another tokenizer.
            DataError: there is no such corpus.
        """
        from bigtx.pretraining.corpora import validation_sources

        config = self._config()
        if not validation_sources(config):
            raise ConfigError("none of the run's corpora has held-out text; name a prepared one: data=FOLDER")
        # These import torch, which is slow, so mistakes are reported before.
        from bigtx.pretraining.objectives import LikelihoodTask
        from bigtx.pretraining.validation import Alone, Validation

        loaded = self.load()
        config = dataclasses.replace(config, model=loaded.config.model)
        alone = Alone(loaded.model)
        validation = Validation(config, alone, alone, LikelihoodTask(z_loss=0.0), loaded.tokenizer)
        metrics = {name.removeprefix("validation/"): value for name, value in validation.measure().items()}
        return self.result(metrics, rows=config.validation.max_sequences)

    def _config(self) -> PretrainConfig:
        from bigtx.config.schema import SourceConfig

        arguments, settings = self.arguments, self.config.validation
        if arguments.split == "test":
            raise ConfigError("split=test: a pretrained run has no test split; its held-out text is split=validation")
        if arguments.batch_size is not None:
            train = dataclasses.replace(self.config.train, micro_batch_size=arguments.batch_size)
            self.config = dataclasses.replace(self.config, train=train)
        if arguments.split:
            return self.config
        sources = {Path(path).resolve().name: SourceConfig(path=path) for path in arguments.data}
        if len(sources) < len(arguments.data):
            raise ConfigError("data=: two corpora have the same name; evaluate them one after the other")
        rows = settings.max_sequences or type(settings)().max_sequences
        return dataclasses.replace(
            self.config, validation=dataclasses.replace(settings, sources=sources, max_sequences=rows)
        )


def what_is_measured(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the settings that distinguish one evaluation from another."""
    return {
        "weights": arguments.weights,
        "set": sorted(arguments.set),
        "data": {"split": arguments.split} if arguments.split else {"paths": arguments.data},
    }
