"""Where a run starts: its folder and its checkpoint, the engine, and the weights before the first step."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from bigtx.config.runs import checkpoint_named
from bigtx.config.schema import ModelConfig, RunConfig
from bigtx.config.shape import micro_batch_size_of
from bigtx.data.stream.loader import Division
from bigtx.engine import checkpoint, retention
from bigtx.engine.checkpoint import Checkpoint, MergedCheckpoint
from bigtx.engine.engine import Engine, ReadRange
from bigtx.engine.ranks import Ranks
from bigtx.engine.saving import save_frozen
from bigtx.engine.trainable import frozen_parameters
from bigtx.model.initial import initial_value
from bigtx.model.size import count_parameters, flops_per_row, parameter_shapes
from bigtx.model.transformer import Transformer
from bigtx.tokenizer.tokenizer import Tokenizer
from bigtx.track.tracker import restore_lines
from bigtx.train.context import Config, RunContext
from bigtx.train.run_folder import open_run_folder
from bigtx.train.state import HARMLESS_SKIPS, RunState
from bigtx.utils import hardware, log, shell
from bigtx.utils.errors import CheckpointError, ConfigError
from bigtx.utils.units import format_count

if TYPE_CHECKING:
    from bigtx.train.teacher import Teacher


@dataclass(frozen=True)
class Start:
    """The state of a run's folder when the run is started.

    Attributes:
        environment: versions, commit and hardware.
        checkpoint: the one to resume from; None where no step was saved.
        changed: settings that differ from the run so far, each allowed by name; at a fork, from the other run.
        origin: `facts_of` the checkpoint if it is another run's, which this one continues; else empty.
    """

    environment: dict[str, Any]
    checkpoint: Checkpoint | None
    changed: list[dict[str, Any]]
    origin: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def tracked(self) -> dict[str, Any]:
        """Return what the run's own checkpoint says of its records (`Tracker.state`); empty at a fork."""
        return self.checkpoint.manifest.get("tracked", {}) if self.checkpoint and not self.origin else {}


def open_folder(context: RunContext[Config], config: Config, facts: dict[str, Any]) -> Start:
    """Lock the run folder, and find the checkpoint to resume from, or the one of another run to fork.

    Args:
        config: the complete config.
        facts: what the run reads: `tokenizer`, `data` and `teacher`, as each checkpoint's manifest records them.

    Raises:
        LaunchError, ConfigError: see `open_run_folder`.
        CheckpointError: see `checkpoint.choose`; or the run was trained with other inputs.
    """
    context.start_up.end("data")
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
    found, origin = retention.choose(context.folder, ranks, context.note_damaged), {}
    if found is None and config.fork_from is not None:
        found = _open_fork(context, config.fork_from)
        origin = facts_of(found)
    if found:
        _refuse_other_inputs(found, facts, config)
    start = Start(environment, found, changed, origin)
    ranks.on_first(lambda: restore_lines(context.folder, start.tracked))
    context.start_up.end("folder")
    return start


def _open_fork(context: RunContext[Config], name: str) -> Checkpoint:
    found = retention.choose(checkpoint_named(name), context.ranks, context.note_damaged)
    if found is None:
        raise CheckpointError(f"fork_from={name}: the run has no checkpoint; name a run that has saved one")
    if "num_updates" not in found.manifest:
        raise CheckpointError(
            f"fork_from={name}: {found.path} holds only weights, and no optimizer states; start from the weights by "
            f"{context.config.begins_with}={found.path}"
        )
    return found


def refuse_short_fork(found: Start, total_steps: int, settings: Sequence[str]) -> None:
    """Refuse a fork that would end before it begins.

    Args:
        settings: the names of the settings that give the length.

    Raises:
        ConfigError: the run has no step left.
    """
    if found.origin and found.origin["step"] >= total_steps:
        raise ConfigError(
            f"fork_from: {found.origin['checkpoint']} is at step {found.origin['step']:,}, and this run would end at "
            f"step {total_steps:,}; write a larger {' or '.join(settings)}, or fork an earlier checkpoint"
        )


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


def division_of(config: RunConfig, ranks: Ranks) -> Division:
    """Return the division of each global batch over the ranks and their micro batches."""
    return Division(
        global_batch_size=config.train.global_batch_size,
        micro_batch_size=config.train.micro_batch_size,
        rank=ranks.rank,
        world_size=ranks.world_size,
    )


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


SIZES = ("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "mlp_size", "max_sequence_length")
"""Settings of a model that may have any value in a Llama."""


def export_note(config: RunConfig, tokenizer: Tokenizer) -> str | None:
    """Return a note for users before a training whose model cannot be exported; None if it can."""
    if all(getattr(config.model, name) == value for name, value in vars(ModelConfig()).items() if name not in SIZES):
        return None  # The default is a Llama, so the families of models are not needed.
    from bigtx.interop.families import describe

    try:
        describe(config, tokenizer)
    except ConfigError as error:
        return f"note: this model cannot be exported to transformers: {error}; everything else works"
    return None


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
    if start.origin:
        state.forget_best()  # The best checkpoint is in the other run.
    if start.changed:
        # The changed settings may help, so max_skipped_steps and guards.patience count from zero.
        state.skipped_in_a_row = state.spikes_in_a_row = 0
    return state


def set_states(engine: Engine, source: Checkpoint) -> None:
    """Set the weights and the optimizer's states from a checkpoint."""
    manifest = source.manifest
    engine.fill(source.read, states=True)
    engine.optimizer.num_updates = manifest["num_updates"]
    engine.set_loss_scale(manifest["loss_scale"])
    engine.set_expert_counts(manifest.get("expert_counts"))


def load_checkpoint(context: RunContext[Config], engine: Engine, start: Start, state: RunState) -> None:
    """Set the weights and the optimizer's states from the checkpoint that the run continues, and close it.

    Raises:
        CheckpointError: the checkpoint does not fit the model; or the frozen weights of a fork could not be written.
    """
    assert start.checkpoint
    set_states(engine, start.checkpoint)
    if start.origin and engine.frozen and not context.dry_run:
        save_frozen(engine, context.ranks, context.folder, start.checkpoint.read)
    start.checkpoint.close()
    log.say(
        f"{'forked' if start.origin else 'resumed'} from {start.checkpoint.path} ({format_count(state.tokens)} tokens)"
    )


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
    source = retention.choose(path, context.ranks, context.note_damaged)
    assert source is not None
    return MergedCheckpoint(source.path, share=slice(0))  # Its files are verified.


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
