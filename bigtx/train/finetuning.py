"""Fine-tuning: records under a task, from a base."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bigtx.config.load import load_run_config
from bigtx.config.runs import has_steps, run_dir_of
from bigtx.config.schema import FinetuneConfig, ModelConfig
from bigtx.track.jsonl import plain
from bigtx.train.finetune_notes import (
    describe_held_out,
    describe_length,
    describe_trained,
    knows_chats,
    length_setting,
    total_steps,
    untrained_roles,
)
from bigtx.train.session import BASE_FACTS, Session, check_teacher, say_finished
from bigtx.utils import log
from bigtx.utils.errors import CheckpointError, ConfigError, LaunchError
from bigtx.utils.files import read_object, write_json
from bigtx.utils.shell import command
from bigtx.utils.units import parse_duration

if TYPE_CHECKING:
    from bigtx.data.stream.loader import StepLoader
    from bigtx.tokenizer.tokenizer import Tokenizer
    from bigtx.track.tracker import Better
    from bigtx.train.loop import Run
    from bigtx.train.measure import Measurement
    from bigtx.train.record_table import Table

RESULTS = "results.json"
"""In the run folder, once the run has ended and its best checkpoint was measured."""
BASE = "base.json"
"""In the run folder: where the weights came from, and what became of each parameter."""


class FinetuneSession(Session[FinetuneConfig]):
    """One life of a fine-tuning run."""

    job_type = "finetune"

    @staticmethod
    def check_inputs(config: FinetuneConfig, num_ranks: int) -> None:
        """Look for the base, its tokenizer and the first of the records.

        Raises:
            BigtxError: as `open_data`.
        """
        from bigtx.engine.checkpoint import preferred
        from bigtx.train.first_records import check_records

        run_dir = Path(config.run_dir)
        check_teacher(config)
        if config.base and not has_steps(run_dir):
            preferred(config.base)
        open_tokenizer(config, run_dir)
        check_records(config)

    def open_data(self) -> None:
        """Open the base's tokenizer, read the records, and complete the config.

        Raises:
            DataError: records that cannot be used.
            ConfigError: the tokenizer is not that of the base, or the model cannot do the task.
        """
        from bigtx.data.audio import look
        from bigtx.train.examples import open_task_data

        self.open_teacher()
        tokenizer = open_tokenizer(self.config, self.run_dir)
        if tokenizer is None:
            assert self.teacher is not None
            tokenizer = self.teacher.tokenizer
        self.tokenizer = tokenizer
        config = self.config
        if config.model.vocab_size is None:
            config = dataclasses.replace(
                config, model=dataclasses.replace(config.model, vocab_size=self.tokenizer.vocab_size)
            )
        data = self.data = open_task_data(
            config,
            self.tokenizer,
            look=functools.partial(
                look.look_at,
                memory=self.run_dir / look.FILE,
                share=(self.ranks.rank, self.ranks.world_size),
                gather=self.ranks.gather,
            ),
            table=self._records_before(),
        )
        self.config, self.task, self.splits = data.config, data.task, data.splits
        self.task.begin(self.splits["train"].examples)
        self.facts = {"tokenizer": self.tokenizer.fingerprint, "seed": config.seed, "data": data.identity}
        if config.data.leave_out:
            self.facts["left_out"] = config.data.leave_out
        self.admit_teacher(self.task.max_length)
        # Rows of several records where the task packs them.
        train = self.rows = self.task.pack(self.splits["train"].examples)
        self.total_steps = total_steps(config, len(train))
        self.lengths = self.task.lengths(train)
        size = config.train.global_batch_size
        mean_tokens = max(1.0, self.task.mean_tokens(train))
        self.tokens_per_step = round(size * mean_tokens)
        self.mean_tokens = mean_tokens
        self.patience = config.validation.patience
        self._tell_data()

    def _records_before(self) -> Table | None:
        """The records with which the run began, where it has made steps and is to leave some out."""
        from bigtx.engine.checkpoint import step_folders
        from bigtx.train import record_table

        if not self.config.data.leave_out or self.dry_run:
            return None
        return self.ranks.from_first(
            self.ranks.on_first(lambda: record_table.read(self.run_dir) if step_folders(self.run_dir) else None)
        )

    def _tell_data(self) -> None:
        counts = ", ".join(f"{len(split.records):,} {name}" for name, split in self.splits.items() if split.records)
        packed = f" in {len(self.rows):,} rows" if len(self.rows) < len(self.splits["train"].records) else ""
        length, *warnings = describe_length(self.config, self.total_steps, len(self.rows))
        log.say(
            f"task: {self.config.task}; records: {counts}{packed}, {self.mean_tokens:.0f} tokens on average; {length}"
        )
        for line in self.task.review(self.splits) + warnings:
            log.say(line)
        cut = sum(split.num_cut for split in self.splits.values())
        if cut:
            total = sum(len(split.records) for split in self.splits.values())
            log.say(
                f"{cut:,} of {total:,} records ({cut / total:.1%}) are longer than {self.task.limit} and were cut "
                "(data.too_long)"
            )
        if not self.splits["validation"].records:
            log.say(describe_held_out(self.config))

    def is_finished(self) -> bool:
        """Whether the run has made all its steps, or ended early, and its best checkpoint was measured."""
        if self.checkpoint is None:
            return False
        state = self.checkpoint.manifest["state"]
        settings = [length_setting(self.config, len(self.rows))]
        if read_object(self.run_dir / RESULTS).get("tokens") != state["tokens"]:
            return False  # An earlier end's, or damaged: the best checkpoint is measured again.
        if self.patience is not None and state["measured_since_best"] >= self.patience:
            settings.append("validation.patience")
        elif state["step"] < self.total_steps:
            return False
        say_finished(state["step"], settings, f"; its results are in {self.run_dir / RESULTS}")
        self.status = "finished"
        return True

    def build_engine(self) -> None:
        """As any session, and say what is trained."""
        super().build_engine()
        log.say(describe_trained(self.config, is_all=not self.engine.frozen))

    def begin(self) -> None:
        """From the base, with what the task adds from the seed; or all from the seed."""
        from bigtx.train import record_table

        self.state.owes_validation = self.config.validation.at_start
        if not self.dry_run:
            self.ranks.on_first(lambda: record_table.write(self.run_dir, self.data.table))
        self.base_facts = self._fill_initially(self.config.base)
        if self.base_facts and not self.dry_run:
            self.ranks.on_first(lambda: self._write(BASE, self.base_facts))

    def _fill_initially(self, base: str | None) -> dict[str, Any]:
        """Set the weights as before the first step; returns what base.json says of them."""
        initial = self.initial_weights()
        if base is None:
            self.begin_with(initial)
            return {}
        from bigtx.engine.trainable import refuse_untrained
        from bigtx.train.base_weights import plan_transfer

        source = self.open_other_run(base)
        if source.manifest["tokenizer"] != self.tokenizer.fingerprint:
            raise ConfigError(
                f"base={base}: {source.path} was trained with another tokenizer than that of its run folder"
            )
        shapes = self.engine.shapes()
        transfer = plan_transfer(
            shapes, source.shapes, name=base, anew=self._other_classes(base, shapes.keys() & source.shapes.keys())
        )
        refuse_untrained(transfer.begun, self.engine.frozen, self.config)
        self.begin_with(transfer.read(source, initial))
        source.close()
        log.say(f"base: {source.path} (step {source.manifest['step']:,}): {transfer.describe()}")
        if warning := self.ranks.from_first(self.ranks.on_first(lambda: untrained_roles(self.config, base))):
            log.say(warning)
        return self.facts_of(source) | transfer.to_dict()

    def _other_classes(self, base: str, names: Iterable[str]) -> list[str]:
        """Those of the parameters that are a head of classes, unless the base was made to tell the same ones apart."""
        names = [name for name in names if name.startswith("head.classes.")]
        if not names:
            return []
        theirs = self.ranks.from_first(self.ranks.on_first(lambda: load_run_config(base)))
        if isinstance(theirs, FinetuneConfig) and theirs.classify.classes == self.config.classify.classes:
            return []
        return names

    def resume(self) -> None:
        """Know the base again. Values of another metric, or of other records, are not compared with those before."""
        changed = {change["key"] for change in self.changed}
        if {"validation.metric", "validation.max_records"} & changed:
            self.state.forget_best()
        num_held_out = len(self.splits["validation"].records)
        if "data.leave_out" in changed and num_held_out < len(self.data.lengths("validation")):
            self.state.forget_best()
        self.base_facts = self._read_base_facts()

    def load_weights(self) -> None:
        """As any session, and give the examples what the model said of them before the first step, if the task asks."""
        is_resumed = self.checkpoint is not None
        if self.task.needs_reference and is_resumed:
            self.base_facts = self.ranks.from_first(self.ranks.on_first(self._read_base_facts))
            self._refer(is_initial=False)
        super().load_weights()
        if self.task.needs_reference and not is_resumed:
            self._refer(is_initial=True)

    def _refer(self, *, is_initial: bool) -> None:
        """Read or make the reference.

        Args:
            is_initial: whether the weights are those before the first step.
        """
        from bigtx.train import reference

        config, left_out = self.config, self.facts.get("left_out")
        key = reference.key(
            records=[self.facts["data"], left_out] if left_out else self.facts["data"],
            tokenizer=self.tokenizer.fingerprint,
            base=self.base_facts.get("manifest_sha256"),
            model=_that_counts(config.model),
            seed=config.seed,
            chat=[config.chat.format, config.chat.separator],
            length=[config.data.too_long, self.task.max_length],
        )
        found = self.ranks.from_first(self.ranks.on_first(lambda: reference.read(self.run_dir, key)))
        if found is None:
            log.say("reference: what the base says of the records, once for all of the run")
            if not is_initial:
                self._go_back_to_base()
            examples = {name: split.examples for name, split in self.splits.items()}
            found = reference.make(self.engine, self.ranks, self.task, examples, config.train.micro_batch_size)
            self.ranks.on_first(lambda: reference.write(self.run_dir, key, found))
        for name, numbers in found.items():
            referred = map(self.task.with_reference, self.splits[name].examples, map(tuple, numbers.tolist()))
            self.splits[name] = dataclasses.replace(self.splits[name], examples=list(referred))
        self.rows = self.task.pack(self.splits["train"].examples)

    def _read_base_facts(self) -> dict[str, Any]:
        facts = read_object(self.run_dir / BASE)
        return facts if facts.keys() >= set(BASE_FACTS) else {}

    def _go_back_to_base(self) -> None:
        """Set the weights as before the first step, whatever has become of the base since.

        Raises:
            CheckpointError: the base is gone, or is another one by now.
        """
        base = self.base_facts.get("checkpoint", self.config.base)
        if base is not None:
            source = self.open_other_run(base)
            source.close()
            if source.manifest_sha256 != self.base_facts.get("manifest_sha256"):
                raise CheckpointError(
                    f"{self.run_dir}: what the base says of the records is gone (reference.safetensors), and {base} is "
                    f"not the base that {BASE} names; give one of them back, or begin another run_dir"
                )
        self._fill_initially(base)

    def _write(self, name: str, value: dict[str, Any]) -> None:
        try:
            write_json(self.run_dir / name, plain(value))
        except OSError as error:
            raise LaunchError(f"{self.run_dir / name} cannot be written: {error}") from error

    def make_loader(self) -> StepLoader:
        """Records from the state's place on."""
        import numpy as np

        from bigtx.data.records.loader import RecordLoader

        train = self.config.train
        rows = self.rows
        # A record that stands in the place of one that is left out is sorted as that one was, so no other moves.
        return RecordLoader(
            np.array([row.length for row in rows] if self.config.sft.packing else self.data.lengths("train")),
            lambda places, numbers: self.task.collate([rows[place] for place in places], numbers),
            global_batch_size=train.global_batch_size,
            micro_batch_size=train.micro_batch_size,
            seed=self.config.seed,
            rank=self.ranks.rank,
            world_size=self.ranks.world_size,
            start_sequence=self.state.sequences,
            prefetch_batches=self.config.data.prefetch_batches,
        )

    def make_validation(self) -> Measurement:
        """The validation records."""
        from bigtx.train.measure import Measurement

        self.measurement = Measurement(self.config, self.engine, self.ranks, self.task, self.splits["validation"])
        return self.measurement

    def better(self) -> Mapping[str, Better]:
        """Those of the task."""
        return self.task.better

    def flops_per_token(self) -> float:
        """Of a record of mean length."""
        source, target, predicted, num_rows = map(round, self.lengths)
        return self.flops_of(source=source, target=target, predicted=predicted) * num_rows / self.mean_tokens

    def validate_every(self) -> str:
        """As the config says; a share of the run in steps, rounded up: there are no more measurements than it means."""
        every = parse_duration(self.config.validation.every)
        if every.unit == "fraction":
            return f"{max(1, math.ceil(round(every.value * self.total_steps, 6)))} steps"
        return self.config.validation.every

    def conclude(self, run: Run) -> None:
        """Measure the best checkpoint, on the validation records and, this once, on the test records if asked."""
        from bigtx.engine.checkpoint import Checkpoint, preferred

        path = self.ranks.from_first(self.ranks.on_first(lambda: preferred(self.run_dir)))
        best = Checkpoint(path)
        if best.manifest["step"] != self.state.step:
            self.engine.fill(best.read, states=False)
        best.close()
        results: dict[str, Any] = {
            "checkpoint": path.name,
            "step": best.manifest["step"],
            "total_steps": self.total_steps,
            "epochs": self.state.step * self.config.train.global_batch_size / len(self.rows),
            "tokens": self.state.tokens,
            "chosen_by": self.measurement.metric if self.splits["validation"].records else None,
        }
        for name in ("validation", "test"):
            split = self.splits[name]
            if not split.records or (name == "test" and not self.config.validation.test):
                continue
            metrics, predictions = self.measurement.measure(split)
            results[name] = {"records": len(split.records), **metrics, **self.task.tables(predictions)}
            run.tracker.log(
                self.state.step, self.state.tokens, {f"{_group(name)}/{key}": value for key, value in metrics.items()}
            )
            shown = ", ".join(f"{key} {value:.4f}" for key, value in metrics.items())
            run.tracker.message(f"{name} at the best checkpoint ({path.name}): {shown}")
        self.ranks.on_first(lambda: self._write(RESULTS, results))

    def next_command(self) -> str:
        """Chat, or predict."""
        if knows_chats(self.config):
            return command("bigtx", "chat", self.run_dir)
        return command("bigtx", "predict", self.run_dir, "input=FILE")


def open_tokenizer(config: FinetuneConfig, run_dir: Path) -> Tokenizer | None:
    """The tokenizer of the base, or the one that the config names; None: it is the teacher's.

    Raises:
        DataError, CheckpointError: it cannot be used.
        ConfigError: the base has another one than the config names.
    """
    from bigtx.engine.trained import TOKENIZER, read_tokenizer
    from bigtx.tokenizer.tokenizer import Tokenizer

    own, base = run_dir / TOKENIZER, config.base
    if base is None:
        return Tokenizer.load(config.tokenizer) if config.tokenizer else None
    if not (run_dir_of(base) / TOKENIZER).is_dir() and own.is_dir():
        return Tokenizer.load(own)  # The base is gone; the run has all that it needs of it.
    tokenizer = read_tokenizer(base)
    if config.tokenizer and Tokenizer.load(config.tokenizer).fingerprint != tokenizer.fingerprint:
        raise ConfigError(
            f"tokenizer={config.tokenizer}: the tokenizer comes with the base, and that of {base} is another one, so "
            "its ids would mean other texts; leave tokenizer out, or write tokenizer=null"
        )
    return tokenizer


def _that_counts(model: ModelConfig) -> dict[str, Any]:
    """The settings of a model that change what it computes when it is not trained, where they are not the defaults."""
    plain = ModelConfig()
    experts = dataclasses.replace(
        model.experts, balance_loss=plain.experts.balance_loss, router_z_loss=plain.experts.router_z_loss
    )
    found = dataclasses.asdict(dataclasses.replace(model, experts=experts))
    default = dataclasses.asdict(plain)
    without = ("dropout", "attention_dropout", "lora")  # New adapters change nothing.
    return {name: value for name, value in found.items() if value != default[name] and name not in without}


def _group(split: str) -> str:
    """Of metrics: those of the best checkpoint are not a point of the validation's curve."""
    return "test" if split == "test" else "best"
