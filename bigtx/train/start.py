"""Where a run starts: its folder and its checkpoint, the engine, and the weights before the first step."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from bigtx.config.schema import RunConfig
from bigtx.config.shape import micro_batch_size_of
from bigtx.engine import checkpoint
from bigtx.engine.checkpoint import Checkpoint, MergedCheckpoint
from bigtx.engine.engine import Engine, ReadRange
from bigtx.engine.ranks import Ranks
from bigtx.engine.saving import save_frozen
from bigtx.engine.trainable import frozen_parameters
from bigtx.interop.families import export_note
from bigtx.model.initial import initial_value
from bigtx.model.size import count_parameters, flops_per_row, parameter_shapes
from bigtx.model.transformer import Transformer
from bigtx.tokenizer.tokenizer import Tokenizer
from bigtx.train.context import Config, RunContext
from bigtx.train.run_folder import open_run_folder
from bigtx.train.state import HARMLESS_SKIPS, RunState
from bigtx.utils import hardware, log, shell
from bigtx.utils.errors import CheckpointError
from bigtx.utils.units import format_count

if TYPE_CHECKING:
    from bigtx.train.teacher import Teacher


@dataclass(frozen=True)
class Start:
    """The state of a run's folder when the run is started.

    Attributes:
        environment: versions, commit and hardware.
        checkpoint: the one to resume from; None where no step was saved.
        changed: settings that differ from the run so far, each allowed by name.
    """

    environment: dict[str, Any]
    checkpoint: Checkpoint | None
    changed: list[dict[str, Any]]


def open_folder(context: RunContext[Config], config: Config, facts: dict[str, Any]) -> Start:
    """Lock the run folder, and find the checkpoint to resume from.

    Args:
        config: the complete config.
        facts: what the run reads: `tokenizer`, `data` and `teacher`, as each checkpoint's manifest records them.

    Raises:
        LaunchError, ConfigError: see `open_run_folder`.
        CheckpointError: see `checkpoint.choose`; or the run was trained with other inputs.
    """
    ranks, environment = context.ranks, hardware.describe()
    given = context.as_given(config)
    opened = ranks.on_first(lambda: open_run_folder(given, files=context.files, environment=environment))
    if opened:
        context.resources.callback(opened.lock.release)
        if opened.aside:
            log.say(
                "the run starts again at step 0, because its checkpoints are gone; its earlier files are in "
                f"{opened.aside}"
            )
    changed = ranks.from_first(opened.changed if opened else None)
    found = checkpoint.choose(context.folder, ranks, context.note_damaged)
    if found:
        _refuse_other_inputs(found, facts, config)
    return Start(environment, found, changed)


def _refuse_other_inputs(found: Checkpoint, facts: dict[str, Any], config: RunConfig) -> None:
    for key, what, own in (
        ("tokenizer", "with another tokenizer", "data"),
        ("data", "on other data (or on another version of it)", "data"),
        ("teacher", "with another teacher", "teacher (distill.teacher may name a checkpoint)"),
    ):
        before, now = found.manifest.get(key), facts.get(key)
        if before != now:
            raise CheckpointError(
                f"{found.path} was trained {what} than the config names: it had {before}, and now there is {now}; "
                f"name its own {own} again, or start another run_dir with {config.begins_with}=THIS_RUN"
            )


def open_teacher(config: RunConfig, ranks: Ranks) -> Teacher | None:
    """Find the teacher, if there is one.

    Raises:
        BigtxError: `distill.teacher` is not a run or a checkpoint.
    """
    name = config.distill.teacher
    if not name:
        return None
    from bigtx.train.teacher import Teacher

    # One choice for all ranks: the teacher may still be training.
    return Teacher(ranks.once(lambda: checkpoint.preferred(name)))


def complete(config: Config, ranks: Ranks, teacher: Teacher | None) -> Config:
    """Return the config with the micro batch size that fits the number of ranks, and with the teacher's settings where
    the student's config does not set them."""
    train = config.train
    size = micro_batch_size_of(train, ranks.world_size)
    if size != train.micro_batch_size:
        share = train.global_batch_size // ranks.world_size
        log.say(f"micro batches of {size}: train.micro_batch_size={train.micro_batch_size} does not divide {share}")
        config = dataclasses.replace(config, train=dataclasses.replace(train, micro_batch_size=size))
    return teacher.complete(config) if teacher else config


def check_teacher_fits(
    teacher: Teacher | None, config: RunConfig, tokenizer: Tokenizer, longest: int
) -> dict[str, str]:
    """Return what the checkpoints' manifests record about the teacher; an empty dict without a teacher.

    Args:
        longest: columns of the longest row.

    Raises:
        ConfigError: the teacher does not fit the student.
    """
    if teacher is None:
        return {}
    teacher.check(config, tokenizer, longest)
    settings = config.distill
    log.say(
        f"teacher: {teacher.describe()}; its weight in the loss {settings.weight:g}, at temperature "
        f"{settings.temperature:g}"
    )
    return {"teacher": teacher.manifest_sha256}


def flops_of(config: RunConfig, teacher: Teacher | None, *, source: int, target: int, predicted: int) -> float:
    """Return the floating-point operations of a training step per row, the teacher's part included.

    Args:
        source, target, predicted: as for `flops_per_row`.
    """
    lengths = {"source": source, "target": target, "predicted": predicted}
    own = flops_per_row(config.model, **lengths)
    return own + teacher.flops_per_row(**lengths) if teacher else own


def build_engine(config: RunConfig, tokenizer: Tokenizer) -> Engine:
    """Build the model and its DeepSpeed engine; the weights are not set yet.

    Raises:
        ConfigError: optimizer.freeze or train_also match no parameter, or leave none to train.
    """
    shapes = parameter_shapes(config.model)
    frozen = set(frozen_parameters(config, shapes))  # Globs that match nothing are refused before the model is built.
    count = count_parameters(config.model)
    log.say(
        f"model: {format_count(count.total)} parameters; engine: ZeRO {config.engine.zero_stage}, "
        f"{config.engine.precision}, {config.optimizer.name}"
    )

    if note := export_note(config, tokenizer):
        log.say(note)
    if frozen:
        num_trained = sum(math.prod(shape) for name, shape in shapes.items() if name not in frozen)
        rank = config.model.lora.rank
        adapters = f", adapters of rank {rank} included" if rank else ""
        log.say(
            f"trained: {format_count(num_trained)} parameters ({num_trained / count.total:.2%}){adapters}; "
            f"{len(frozen)} of {len(shapes)} tensors are frozen"
        )
    return Engine(config, lambda: Transformer(config.model))


def first_state(config: RunConfig, **fields: Any) -> RunState:
    """Return the state of a run before its first step; `fields` are its attributes."""
    return RunState(harmless_skips=HARMLESS_SKIPS.get(config.engine.precision, 0), **fields)


def saved_state(config: RunConfig, start: Start) -> RunState:
    """Return the state that the checkpoint holds."""
    assert start.checkpoint
    harmless = HARMLESS_SKIPS.get(config.engine.precision, 0)
    state = RunState.from_dict(start.checkpoint.manifest["state"] | {"harmless_skips": harmless})
    if start.changed:
        state.skipped_in_a_row = 0  # The changed settings may help, so max_skipped_steps counts from zero.
    return state


def load_checkpoint(engine: Engine, start: Start, state: RunState) -> None:
    """Set the weights and the optimizer's states from the checkpoint, and close it."""
    assert start.checkpoint
    manifest = start.checkpoint.manifest
    engine.fill(start.checkpoint.read, states=True)
    engine.optimizer.num_updates = manifest["num_updates"]
    engine.set_loss_scale(manifest["loss_scale"])
    engine.set_expert_counts(manifest.get("expert_counts"))
    start.checkpoint.close()
    log.say(f"resumed from {start.checkpoint.path} ({format_count(state.tokens)} tokens)")


def initial_weights(engine: Engine, config: RunConfig, teacher: Teacher | None) -> ReadRange:
    """Return a reader of the seed's random weights, or of the teacher's layers, for `Engine.fill`.

    Raises:
        ConfigError: the teacher's layers do not fit.
    """
    shapes = engine.shapes()

    def of_seed(name: str, kind: str, start: int, stop: int) -> Tensor:
        return initial_value(name, shapes[name], config.model, config.seed, start, stop)

    return teacher.layers(shapes, of_seed) if teacher and config.distill.copy_layers else of_seed


def set_first_weights(
    context: RunContext[Config], engine: Engine, read: ReadRange, *, keep_frozen: bool = True
) -> None:
    """Set the initial weights.

    Args:
        keep_frozen: whether to save the frozen weights once in the run folder, so that checkpoints do not hold them.

    Raises:
        CheckpointError: the frozen weights could not be written.
    """
    engine.fill(read, states=False)
    if engine.frozen and keep_frozen and not context.dry_run:
        save_frozen(engine, context.ranks, context.folder, read)


def open_other_run(context: RunContext[Config], folder: str) -> MergedCheckpoint:
    """Open the newest complete checkpoint of another run, or the named checkpoint, with its adapters merged into its
    weights.

    Raises:
        CheckpointError: there is no checkpoint.
    """
    # One choice for all ranks: the other run may save meanwhile.
    path = context.ranks.once(lambda: checkpoint.preferred(folder))
    source = checkpoint.choose(path, context.ranks, context.note_damaged)
    assert source is not None
    return MergedCheckpoint(source.path)


def facts_of(source: Checkpoint) -> dict[str, Any]:
    """Return the record of another run's checkpoint that this run starts from."""
    return {
        "checkpoint": str(source.path.absolute()),
        "manifest_sha256": source.manifest_sha256,
        "step": source.manifest["step"],
        "wandb_run_id": source.manifest.get("wandb_run_id", ""),
    }


def say_finished(step: int, settings: Sequence[str], results: str = "") -> None:
    """Print that the run is finished, and how to continue it.

    Args:
        settings: the names of the settings that ended the run.
        results: a phrase that says where the results are.
    """
    longer = shell.settings({name: "N" for name in settings} | {"allow_changes": settings})
    log.say(
        f"the run is finished: {step:,} steps{results}. To train longer: {longer}; to start over, name another run_dir"
    )
