"""Pretraining, from the check of the corpora to the last step: `pretrain` reads from top to bottom."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bigtx.config.schema import PretrainConfig
from bigtx.config.shape import total_steps
from bigtx.data.stream.loader import StepLoader
from bigtx.engine.checkpoint import MergedCheckpoint, is_suspect
from bigtx.engine.engine import Engine
from bigtx.engine.optimizers import Schedule
from bigtx.engine.ranks import Ranks
from bigtx.engine.trainable import is_adapter
from bigtx.pretraining import make_objective
from bigtx.pretraining.corpora import RunData, length_setting, open_run_data, with_vocabulary
from bigtx.pretraining.objectives import LikelihoodTask, Objective
from bigtx.pretraining.validation import BETTER, Validation
from bigtx.train import start
from bigtx.train.context import RunContext
from bigtx.train.execute import execute, open_meter, open_saver, open_tracker, with_teacher, write_description
from bigtx.train.guards import open_guards
from bigtx.train.loop import Run
from bigtx.train.start import Start
from bigtx.train.state import RunState
from bigtx.utils import log
from bigtx.utils.errors import CheckpointError, ConfigError
from bigtx.utils.shell import command
from bigtx.utils.units import counted

if TYPE_CHECKING:
    from bigtx.train.teacher import Teacher


@dataclass(frozen=True)
class Inputs:
    """The inputs of pretraining, opened and checked.

    Attributes:
        config: the complete config.
        facts: what every checkpoint's manifest records about the inputs.
    """

    config: PretrainConfig
    data: RunData
    teacher: Teacher | None
    objective: Objective
    task: LikelihoodTask
    facts: dict[str, Any]


def pretrain(context: RunContext[PretrainConfig]) -> int:
    """Run the remaining steps of pretraining, and return the exit status.

    Raises:
        BigtxError: the ranks, the inputs, the run folder or the training fail.
    """
    ranks = context.join_ranks()
    inputs = open_inputs(context.config, ranks)
    config, data, task = inputs.config, inputs.data, inputs.task
    found = start.open_folder(context, config, inputs.facts)
    if is_finished(config, found):
        context.status = "finished"
        return 0

    engine = start.build_engine(config, data.tokenizer)
    context.start_up.end("engine")
    base: dict[str, Any] = {}
    if found.checkpoint:
        context.state = state = start.saved_state(config, found)
        state.pass_over(config.data.skip)
        start.load_checkpoint(context, engine, found, state)
    else:
        context.state = state = start.first_state(
            config, skipped_sequences=config.data.skip, owes_validation=config.validation.at_start
        )
        base = set_first_weights(context, inputs, engine)

    write_description(context, config, found, data.tokenizer, engine)
    open_here = functools.partial(open_loader, inputs, ranks, state, found)
    loader = open_here()
    context.resources.callback(loader.close)
    steps, rows = total_steps(config), config.train.global_batch_size
    tracker = open_tracker(
        context, config, found, state, total_steps=steps, better=BETTER, job_type="pretrain", base=base
    )
    flops = start.flops_of(config, inputs.teacher, **inputs.objective.lengths._asdict()) // config.train.sequence_length
    run = Run(
        config=config,
        run_dir=context.folder,
        ranks=ranks,
        engine=engine,
        task=with_teacher(task, inputs.teacher, config, engine),
        loader=loader,
        open_loader=open_here,
        schedule=Schedule(config.schedule, total_steps=steps, tokens_per_step=rows * config.train.sequence_length),
        validation=open_validation(config, engine, ranks, task, data),
        tracker=tracker,
        meter=open_meter(config, ranks, found, flops),
        saver=open_saver(context, config, engine),
        state=state,
        facts=inputs.facts | {"wandb_run_id": ranks.from_first(tracker.wandb_run_id)},
        validate_every=config.validation.every,
        guards=open_guards(config.guards, engine, ranks, found.checkpoint),
    )
    return execute(context, run, next_command=next_command(config, context.folder))


def open_inputs(config: PretrainConfig, ranks: Ranks) -> Inputs:
    """Open the corpora, their tokenizer and the teacher, and complete the config from them.

    Raises:
        DataError: a corpus is missing or damaged, too small, or does not fit the others.
        ConfigError: the model's vocabulary is too small for the tokenizer, the tokenizer lacks ids that the objective
            needs, or the teacher does not fit.
    """
    teacher = start.open_teacher(config, ranks)
    data = open_run_data(config, total_steps(config), ranks.world_size, once=ranks.once)
    if teacher and teacher.tokenizer.fingerprint != data.tokenizer.fingerprint:
        teacher.check(config, data.tokenizer, 0)  # Before the size of its vocabulary is compared with the data's.
    config = with_vocabulary(start.complete(config, ranks, teacher), data)
    log.say(f"data: {data.description}; vocabulary {config.model.vocab_size:,}")
    objective = make_objective(config, data.tokenizer, purpose="train")
    log.say(f"objective: {config.objective.name}, {objective.describe()}")
    facts = {"tokenizer": data.tokenizer.fingerprint, "seed": config.seed, "data": data.identity}
    longest = max(objective.lengths.source, objective.lengths.target)
    facts |= start.check_teacher_fits(teacher, config, data.tokenizer, longest)
    return Inputs(config, data, teacher, objective, LikelihoodTask(z_loss=config.train.z_loss), facts)


def is_finished(config: PretrainConfig, found: Start) -> bool:
    """Return whether the run has made all its steps, and print so, before the model is built.

    Raises:
        CheckpointError: the run has made all its steps, but its only checkpoints are suspect.
        ConfigError: a fork has no step left.
    """
    start.refuse_short_fork(found, total_steps(config), [length_setting(config)])
    if found.checkpoint is None or found.checkpoint.manifest["state"]["step"] < total_steps(config):
        return False
    if is_suspect(found.checkpoint.manifest):
        raise CheckpointError(
            f"{found.checkpoint.path}: the last steps of the run were all skipped, because the loss or gradient was "
            "not finite, and there is no earlier checkpoint; start over in another run_dir, e.g. with a lower "
            "optimizer.learning_rate"
        )
    start.say_finished(found.checkpoint.manifest["state"]["step"], [length_setting(config)])
    return True


def set_first_weights(context: RunContext[PretrainConfig], inputs: Inputs, engine: Engine) -> dict[str, Any]:
    """Set the weights from another run (`init_from`) or from the seed, and return `facts_of` the other run, if any."""
    folder = inputs.config.init_from
    initial = start.initial_weights(engine, inputs.config, inputs.teacher)
    if not folder:
        start.set_first_weights(context, engine, initial)
        return {}
    source = start.open_other_run(context, folder)
    _refuse_other_model(source, engine, inputs, folder)
    start.set_first_weights(
        context, engine, lambda name, *part: (source.read if name in source.shapes else initial)(name, *part)
    )
    source.close()
    log.say(f"weights from {source.path}")
    return start.facts_of(source)


def _refuse_other_model(source: MergedCheckpoint, engine: Engine, inputs: Inputs, folder: str) -> None:
    # Adapters are new in this run; those of the other run are merged into its weights.
    shapes = {name: shape for name, shape in engine.shapes().items() if not is_adapter(name)}
    if shapes != source.shapes:
        different = sorted(name for name in shapes | source.shapes if shapes.get(name) != source.shapes.get(name))
        raise ConfigError(
            f"init_from={folder}: its model has other parameters than this config: "
            + ", ".join(f"{name} {source.shapes.get(name)} there, {shapes.get(name)} here" for name in different[:5])
            + f" ({len(different)} in all); copy the model section of its config.yaml"
        )
    if source.manifest["tokenizer"] != inputs.data.tokenizer.fingerprint:
        raise ConfigError(
            f"init_from={folder}: its tokenizer is not the tokenizer of this run's data; prepare the data with "
            "that run's tokenizer folder"
        )


def open_loader(inputs: Inputs, ranks: Ranks, state: RunState, found: Start) -> StepLoader:
    """Return the loader of batches, starting at the state's position in the data."""
    config, train = inputs.config, inputs.config.train
    if found.checkpoint and config.data.foreign.paths:
        _announce_rereading(state, ranks, found.checkpoint.manifest["world_size"])
    return inputs.data.loader_type()(
        config.data,
        start.division_of(config, ranks),
        sequence_length=train.sequence_length,
        seed=config.seed,
        start_sequence=state.sequences,
        pad_id=inputs.data.tokenizer.pad_id,
        prepare=inputs.objective.prepare,
    )


def _announce_rereading(state: RunState, ranks: Ranks, before: int) -> None:
    """Print that foreign shards, which have no index, are read again up to the state's position."""
    other = (
        f", and with {counted(ranks.world_size, 'rank')} instead of {before} the shards are split differently"
        if before != ranks.world_size
        else ""
    )
    log.say(
        f"data: reading {state.sequences:,} rows again to reach the run's position{other}; exact and fast resume "
        "needs prepared shards: bigtx data prepare"
    )


def open_validation(
    config: PretrainConfig, engine: Engine, ranks: Ranks, task: LikelihoodTask, data: RunData
) -> Validation:
    """Open the held-out text, and print a note if the corpora have no such text."""
    validation = Validation(config, engine, ranks, task, data.tokenizer)
    if not validation.sources and config.validation.max_sequences:
        log.say(
            "no validation: the corpora have no held-out text; prepare them with a larger validation_fraction "
            "(`bigtx data prepare`), or name another corpus as validation.sources.NAME.path"
        )
    return validation


def next_command(config: PretrainConfig, folder: Path) -> str:
    """Return the command to use the model: export an encoder, or generate text with another model."""
    if config.model.shape == "encoder":
        return command("bigtx", "export", folder, "output=FOLDER")
    return command("bigtx", "generate", folder, "prompt=TEXT")
