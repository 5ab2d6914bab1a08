"""Pretraining: rows of prepared corpora, or of shards from elsewhere, under an objective."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bigtx.config.runs import has_steps
from bigtx.config.schema import PretrainConfig
from bigtx.train.session import Session, check_teacher, num_ranks, say_finished
from bigtx.utils import log
from bigtx.utils.errors import CheckpointError, ConfigError
from bigtx.utils.shell import command
from bigtx.utils.urls import is_url

if TYPE_CHECKING:
    from bigtx.data.stream.loader import StepLoader
    from bigtx.track.tracker import Better
    from bigtx.train.evaluation import Validation
    from bigtx.train.run_data import RunData


class PretrainSession(Session[PretrainConfig]):
    """One life of a pretraining run."""

    job_type = "pretrain"

    @staticmethod
    def check_inputs(config: PretrainConfig, num_ranks: int) -> None:
        """Open the data as the ranks will, and look for the runs that it begins with.

        Raises:
            BigtxError: as `open_data`.
        """
        from bigtx.engine.checkpoint import preferred
        from bigtx.train.held_out import check_held_out
        from bigtx.train.run_data import open_run_data

        check_teacher(config)
        if config.init_from and not has_steps(Path(config.run_dir)):
            preferred(config.init_from)
        if any(map(is_url, _places(config))):
            return  # The ranks ask the network.
        data = open_run_data(config, total_steps(config), num_ranks, once=lambda get: get())
        with_vocabulary(config, data)
        check_held_out(config, data.tokenizer.fingerprint)

    def open_data(self) -> None:
        """Open the prepared corpora and their tokenizer, and make the objective.

        Raises:
            DataError: a corpus is missing or damaged, too small, or does not fit the others.
            ConfigError: the model's vocabulary is too small for the tokenizer, or the objective needs other ids.
        """
        from bigtx.train.objectives import make_objective
        from bigtx.train.run_data import open_run_data
        from bigtx.train.tasks.likelihood import LikelihoodTask

        self.open_teacher()
        config = self.config
        self.tokens_per_step = config.train.global_batch_size * config.train.sequence_length
        self.total_steps = total_steps(config)
        self.data = open_run_data(
            config,
            self.total_steps,
            self.ranks.world_size,
            once=lambda get: self.ranks.from_first(self.ranks.on_first(get)),
        )
        self.tokenizer = self.data.tokenizer
        self.facts = {
            "tokenizer": self.tokenizer.fingerprint,
            "seed": config.seed,
            "data": self.data.identity,
        }
        self.config = config = with_vocabulary(config, self.data)
        log.say(f"data: {self.data.description}; vocabulary {config.model.vocab_size:,}")
        self.objective = make_objective(config, self.tokenizer, purpose="train")
        log.say(f"objective: {config.objective.name}, {self.objective.describe()}")
        self.task = LikelihoodTask(z_loss=config.train.z_loss)
        self.admit_teacher(max(self.objective.lengths.source, self.objective.lengths.target))

    def begin(self) -> None:
        """From another run (`init_from`), or from the seed."""
        self.state.skipped_sequences = self.config.data.skip
        self.state.owes_validation = self.config.validation.at_start
        if not self.config.init_from:
            self.begin_with(self.initial_weights())
            return
        source, initial = self._open_init_from(self.config.init_from), self.initial_weights()
        self.begin_with(
            lambda name, *part: initial(name, *part) if name not in source.shapes else source.read(name, *part)
        )
        source.close()
        self.base_facts = self.facts_of(source)
        log.say(f"weights from {source.path}")

    def resume(self) -> None:
        """Compare the windows that the run passes over."""
        self.state.pass_over(self.config.data.skip)

    def is_finished(self) -> bool:
        """Whether the run has made all its steps; says so, before the model is built for nothing.

        Raises:
            CheckpointError: it has, but its only checkpoints are suspect.
        """
        from bigtx.engine.checkpoint import is_suspect

        step = self.checkpoint.manifest["state"]["step"] if self.checkpoint else 0
        if step < self.total_steps:
            return False
        if is_suspect(self.checkpoint.manifest):
            raise CheckpointError(
                f"{self.checkpoint.path}: the last steps of the run were all skipped, because the loss or gradient was "
                "not finite, and there is no checkpoint from before; start over in another run_dir, e.g. with a lower "
                "optimizer.learning_rate"
            )
        say_finished(step, [length_setting(self.config)])
        self.status = "finished"
        return True

    def next_command(self) -> str:
        """Export an encoder, have others write."""
        if self.config.model.shape == "encoder":
            return command("bigtx", "export", self.run_dir, "output=FOLDER")
        return command("bigtx", "generate", self.run_dir, "prompt=TEXT")

    def make_loader(self) -> StepLoader:
        """Rows from the state's place on."""
        config, train = self.config, self.config.train
        if self.checkpoint and config.data.foreign.paths:
            self._tell_rereading()
        return self.data.loader_type()(
            config.data,
            sequence_length=train.sequence_length,
            global_batch_size=train.global_batch_size,
            micro_batch_size=train.micro_batch_size,
            seed=config.seed,
            rank=self.ranks.rank,
            world_size=self.ranks.world_size,
            start_sequence=self.state.sequences,
            pad_id=self.tokenizer.pad_id,
            prepare=self.objective.prepare,
        )

    def make_validation(self) -> Validation:
        """Held-out text."""
        from bigtx.train.evaluation import Validation

        validation = Validation(self.config, self.engine, self.ranks, self.task, self.tokenizer)
        if not validation.sources and self.config.validation.max_sequences:
            log.say(
                "no validation: none of the corpora holds text out; `bigtx data prepare` does with a larger "
                "validation_fraction, or name another corpus as validation.sources.NAME.path"
            )
        return validation

    def better(self) -> Mapping[str, Better]:
        """Those of held-out text."""
        from bigtx.train.evaluation import BETTER

        return BETTER

    def flops_per_token(self) -> float:
        """Of a row, by what the objective makes of it."""
        return self.flops_of(**self.objective.lengths._asdict()) // self.config.train.sequence_length

    def validate_every(self) -> str:
        """As the config says."""
        return self.config.validation.every

    def _tell_rereading(self) -> None:
        """Foreign shards have no places to come back to."""
        rows, ranks = self.state.sequences, self.checkpoint.manifest["world_size"]
        other = (
            f", and with {num_ranks(self.ranks.world_size)} instead of {ranks} the shards are split otherwise"
            if ranks != self.ranks.world_size
            else ""
        )
        log.say(
            f"data: reading {rows:,} rows again to come to where the run was{other}; exact and quick resume needs "
            "prepared shards: bigtx data prepare"
        )

    def _open_init_from(self, folder: str) -> Any:
        from bigtx.engine.trainable import is_adapter

        source = self.open_other_run(folder)
        # Adapters are this run's own; those of the other one are merged into its weights.
        shapes = {name: shape for name, shape in self.engine.shapes().items() if not is_adapter(name)}
        if shapes != source.shapes:
            different = sorted(name for name in shapes | source.shapes if shapes.get(name) != source.shapes.get(name))
            raise ConfigError(
                f"init_from={folder}: its model has other parameters than this config's: "
                + ", ".join(
                    f"{name} {source.shapes.get(name)} there, {shapes.get(name)} here" for name in different[:5]
                )
                + f" ({len(different)} in all); copy the model section of its config.yaml"
            )
        if source.manifest["tokenizer"] != self.tokenizer.fingerprint:
            raise ConfigError(
                f"init_from={folder}: its tokenizer is not the one of this run's data; prepare the data with "
                "that run's tokenizer folder"
            )
        return source


def with_vocabulary(config: PretrainConfig, data: RunData) -> PretrainConfig:
    """The config with the size of the vocabulary.

    Raises:
        ConfigError: it is too small for the tokenizer.
    """
    given, needed = config.model.vocab_size, data.tokenizer.vocab_size
    if given is None:
        return dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=needed))
    if given < needed:
        raise ConfigError(
            f"model.vocab_size={given} is smaller than the tokenizer's {needed} ids in {data.tokenizer_place}; write "
            "model.vocab_size=null to take it from there"
        )
    return config


def _places(config: PretrainConfig) -> list[str]:
    """All data that the run reads."""
    sources = [*config.data.sources.values(), *config.validation.sources.values()]
    return [*config.data.foreign.paths, *(source.path for source in sources)]


def length_setting(config: PretrainConfig) -> str:
    """The setting that gives a pretraining its length."""
    if config.train.max_steps is not None:
        return "train.max_steps"
    return "train.max_tokens"


def total_steps(config: PretrainConfig) -> int:
    """Optimizer steps of the run."""
    if config.train.max_steps is not None:
        return config.train.max_steps
    assert config.train.max_tokens is not None
    return -(-config.train.max_tokens // (config.train.global_batch_size * config.train.sequence_length))
