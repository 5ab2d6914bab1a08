"""Train a prepared run until its end or a request to stop: its files, its tracker, and its last messages."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch

from bigtx.config.schema import RunConfig
from bigtx.config.schema.tasks import Better
from bigtx.engine.checkpoint import Checkpoint, preferred
from bigtx.engine.engine import Engine
from bigtx.engine.ranks import Ranks
from bigtx.engine.task import Task
from bigtx.tokenizer.tokenizer import Tokenizer
from bigtx.track.tracker import Tracker
from bigtx.train import loop
from bigtx.train.context import Config, RunContext
from bigtx.train.loop import Run
from bigtx.train.meter import Meter
from bigtx.train.run_folder import BASE_FACTS, describe_run, dump
from bigtx.train.start import Start
from bigtx.train.state import RunState
from bigtx.utils import hardware, log, processes
from bigtx.utils.units import format_count

if TYPE_CHECKING:
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
    """Start the metrics, the events and W&B, and record how this start of the run began.

    Args:
        better: whether lower or higher is better for each metric, by its name without group.
        base: see `facts_of`; empty where the run began from its seed.
    """
    tracker = Tracker(
        context.folder,
        config.track,
        run_config=dump(config),
        environment=start.environment,
        rank=context.ranks.rank,
        total_steps=total_steps,
        better=better,
        resumed_step=state.step,
        job_type=job_type,
        base={key: base[key] for key in BASE_FACTS} if base else None,
        stream=log.console(),
    )
    context.resources.callback(lambda: tracker.close(context.status, state.step))
    world_size = context.ranks.world_size
    place = {"launcher": processes.launcher_name(), **processes.slurm_place()}
    tracker.event(state.step, "start", host=start.environment["host"], world_size=world_size, **place)
    for text in context.damaged:
        tracker.event(state.step, "refused_checkpoint", text=text)
    if start.checkpoint:
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


def with_teacher(task: Task, teacher: Teacher | None, config: RunConfig, engine: Engine) -> Task:
    """Return the task that the loop trains. Measurements within the run use the task without the teacher."""
    if teacher is None:
        return task
    return teacher.teach(task, config.distill, engine.device, config.engine.precision)


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
    if context.dry_run:
        return _try_one_step(context, run)
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
    log.say(
        f"finished: {run.state.step:,} steps, {format_count(run.state.tokens)} tokens, in {context.folder}\n"
        f"next: {next_command}"
    )
    return 0


def _close_tracker(context: RunContext[Config], run: Run, status: Literal["finished", "stopped"]) -> None:
    """Close the tracker, so that W&B prints its last messages before the run prints its own."""
    context.status = status
    run.tracker.close(status, run.state.step)


def _announce_model(run: Run) -> None:
    """Record which checkpoint other commands use."""
    given = Checkpoint(preferred(run.run_dir))
    run.tracker.model(given.manifest["step"], given.path, given.manifest_sha256)


def _try_one_step(context: RunContext[Config], run: Run) -> int:
    micro_batches = next(run.loader)
    num_labels, num_tokens = run.ranks.sum(
        [sum(batch.num_labels for batch in micro_batches), run.loader.num_tokens(micro_batches)]
    )
    result = loop.train_step(run, micro_batches, num_labels, num_tokens)
    metrics = run.meter.metrics()
    context.status = "finished"
    log.say(
        f"dry run: one step, loss {metrics['train/loss']:.4f}, gradient norm {result.grad_norm:.3f}, "
        f"{metrics['perf/memory_gib']:.2f} GiB; nothing was kept"
    )
    return 0
