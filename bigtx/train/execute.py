"""Train a prepared run until its end or a request to stop: its files, its tracker, and its last messages."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch

from bigtx.config.schema import RunConfig
from bigtx.config.schema.tasks import Better
from bigtx.engine.checkpoint import Checkpoint, preferred
from bigtx.engine.engine import Engine
from bigtx.engine.ranks import Ranks
from bigtx.engine.retention import Policy
from bigtx.engine.saving import Saver
from bigtx.model.loss import Task
from bigtx.tokenizer.tokenizer import Tokenizer
from bigtx.track.tracker import Tracker
from bigtx.train import loop
from bigtx.train.context import Config, RunContext
from bigtx.train.loop import Run
from bigtx.train.run_folder import BASE_FACTS, describe_run, dump
from bigtx.train.start import Start
from bigtx.train.state import Meter, RunState
from bigtx.utils import hardware, log, processes
from bigtx.utils.errors import LaunchError
from bigtx.utils.units import format_count

if TYPE_CHECKING:
    from bigtx.engine.copies import CheckpointCopier
    from bigtx.train.health import Health
    from bigtx.train.teacher import Teacher


def open_tracker(
    context: RunContext[Config],
    config: RunConfig,
    start: Start,
    state: RunState,
    *,
    total_steps: int,
    better: Mapping[str, Better],
    job_type: Literal["pretrain", "finetune"],
    base: dict[str, Any],
) -> Tracker:
    """Start the metrics, the events and W&B, and record how this start of the run began: also from which other run.

    Args:
        better: whether lower or higher is better for each metric, by its name without group.
        base: see `facts_of`; empty where the run began from its seed.
    """
    origin = start.origin or base
    tracker = Tracker(
        context.folder,
        config.track,
        run_config=dump(config),
        environment=start.environment,
        rank=context.ranks.rank,
        total_steps=total_steps,
        better=better,
        resumed_step=state.step,
        saved=start.tracked,
        job_type=job_type,
        base={key: origin[key] for key in BASE_FACTS} if origin else None,
        stream=log.console(),
    )
    context.resources.callback(lambda: tracker.close(context.status, state.step))
    world_size = context.ranks.world_size
    place = {"launcher": processes.launcher_name(), **processes.slurm_place()}
    tracker.event(state.step, "start", host=start.environment["host"], world_size=world_size, **place)
    for text in context.damaged:
        tracker.event(state.step, "refused_checkpoint", text=text)
    if start.origin:
        tracker.event(**start.origin, kind="fork")
    elif start.checkpoint:
        name, stage = start.checkpoint.path.name, config.engine.zero_stage
        tracker.event(state.step, "resume", checkpoint=name, world_size=world_size, zero_stage=stage)
    for change in start.changed:
        tracker.event(state.step, "config_change", **change)
    return tracker


def write_description(
    context: RunContext[Config], config: Config, start: Start, tokenizer: Tokenizer, engine: Engine
) -> None:
    """Write into the run folder what is known once the engine is built.

    Raises:
        LaunchError: the folder cannot be written.
    """
    context.start_up.end("weights")
    given, deepspeed = context.as_given(config), engine.deepspeed_config
    context.ranks.on_first(
        lambda: describe_run(given, tokenizer=tokenizer, deepspeed=deepspeed, environment=start.environment)
    )


def open_meter(config: RunConfig, ranks: Ranks, start: Start, flops_per_token: float) -> Meter:
    """Return the meter of a run, with the sums that its checkpoint holds.

    Args:
        flops_per_token: floating-point operations of a training step per counted token.
    """
    # There is no figure for a CPU: a measurement depends on what else the cores do.
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    peak = hardware.peak_flops(name, config.engine.precision) if name else None
    meter = Meter(flops_per_token=flops_per_token, peak_flops=None if peak is None else peak * ranks.world_size)
    if start.checkpoint:
        meter.restore(start.checkpoint.manifest["meter"])
    return meter


def open_saver(context: RunContext[Config], config: RunConfig, engine: Engine) -> Saver:
    """Return the writer of the run's checkpoints."""
    train = config.train
    policy = Policy(newest=train.keep_checkpoints, every=train.keep_every)
    saver = Saver(engine, context.ranks, context.folder, policy, in_background=train.async_checkpoints)
    if train.copy_checkpoints_to and not context.dry_run:
        from bigtx.engine.copies import CheckpointCopier

        copier = CheckpointCopier(context.folder, train.copy_checkpoints_to) if context.ranks.rank == 0 else None
        context.resources.callback(lambda: _end_copies(context, copier))
        if copier:
            saver.when_saved = copier.submit
    return saver


def _end_copies(context: RunContext[Config], copier: CheckpointCopier | None) -> None:
    """Wait for the copy of the last checkpoint, unless the run has failed. Every rank must call it.

    Args:
        copier: the copier, on rank 0.
    """
    from bigtx.engine.copies import END_SECONDS

    seconds = END_SECONDS.get(context.status, 0.0)
    deadline = time.monotonic() + seconds
    is_copying = seconds > 0
    while is_copying:
        # In turns, so that the other ranks do not reach the time-out of a collective call.
        is_done = copier is None or copier.finish(1.0) or time.monotonic() > deadline
        is_copying = bool(context.ranks.sum([not is_done])[0])
    if copier:
        copier.close(warn=seconds > 0)


def with_teacher(task: Task, teacher: Teacher | None, config: RunConfig, engine: Engine) -> Task:
    """Return the task that the loop trains. Measurements within the run use the task without the teacher."""
    return task if teacher is None else teacher.teach(task, config.distill, engine.device, config.engine.precision)


def execute(
    context: RunContext[Config],
    run: Run,
    *,
    next_command: str,
    conclude: Callable[[Run], None] = lambda run: None,
) -> int:
    """Train to the end or to a request to stop, and return the exit status.

    Args:
        next_command: a command that uses the finished run.
        conclude: called after the last step.
    """
    context.resources.callback(lambda: run.loader.close())  # A return to a checkpoint opens another loader.
    if context.dry_run:
        return _try_one_step(context, run)
    run.look_after = _look_after(run)
    context.start_up.end("tracker")
    run.start_up = context.start_up
    with context.training(run.tracker):
        is_finished = loop.train(run, context.stop)
    context.stop.forget_file()  # The next start must not stop because of this request.
    if not is_finished:
        _close_tracker(context, run, "stopped")
        log.report(stopped=True)
        log.say(f"stopped at step {run.state.step:,} with a checkpoint; the same command resumes from it")
        return context.stop.exit_status
    conclude(run)
    if run.ranks.rank == 0:
        _announce_model(run)
    _close_tracker(context, run, "finished")
    run.ranks.on_first(lambda: _refuse_lost_lines(run))
    log.say(
        f"finished: {run.state.step:,} steps, {format_count(run.state.tokens)} tokens, in {context.folder}\n"
        f"next: {next_command}"
    )
    return 0


def _look_after(run: Run) -> Callable[[int, float, Tracker], dict[str, float]]:
    """Return `Health.look` of the run, whose module is imported at the first log step."""

    @functools.cache
    def opened() -> Health:
        from bigtx.train.health import Health

        return Health(run.ranks, run.engine, run.run_dir)

    return lambda step, seconds, tracker: opened().look(step, seconds, tracker)


def _close_tracker(context: RunContext[Config], run: Run, status: Literal["finished", "stopped"]) -> None:
    """Close the tracker, so that W&B prints its last messages before the run prints its own."""
    context.status = status
    run.tracker.close(status, run.state.step, owes_validation=run.state.owes_validation)


def _refuse_lost_lines(run: Run) -> None:
    """Report lines that the disk did not take until the end of the run.

    Raises:
        LaunchError: there are such lines.
    """
    if run.tracker.lost:
        raise LaunchError(
            f"the run made all its steps, but {run.tracker.lost}. Its last checkpoint holds the lines of its steps: "
            "free space, and repeat the command, which writes them"
        )


def _announce_model(run: Run) -> None:
    """Record which checkpoint other commands use."""
    given = Checkpoint(preferred(run.run_dir))
    run.tracker.model(given.manifest["step"], given.path, given.manifest_sha256)


def _try_one_step(context: RunContext[Config], run: Run) -> int:
    result = loop.train_step(run, loop.read_step(run)())
    metrics = run.meter.metrics()
    context.status = "finished"
    log.say(
        f"dry run: one step, loss {metrics['train/loss']:.4f}, gradient norm {result.grad_norm:.3f}, "
        f"{metrics['perf/memory_gib']:.2f} GiB; nothing was kept"
    )
    return 0
