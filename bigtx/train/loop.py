"""The loop."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bigtx.config.schema import PretrainConfig
from bigtx.data.stream.loader import TrainLoader
from bigtx.engine import checkpoint
from bigtx.engine.engine import Engine, StepResult, Task
from bigtx.engine.ranks import Ranks
from bigtx.engine.schedules import Schedule
from bigtx.track.tracker import Tracker
from bigtx.train.evaluation import Validation
from bigtx.train.meter import Meter
from bigtx.train.profile import profiled
from bigtx.train.seeds import dropout_seeds
from bigtx.train.state import Cadence, RunState
from bigtx.train.stop import StopRequest
from bigtx.utils.errors import BigtxError


@dataclass
class Run:
    """Everything that the loop uses, made by the entry point."""

    config: PretrainConfig
    run_dir: Path
    ranks: Ranks
    engine: Engine
    task: Task
    loader: TrainLoader
    schedule: Schedule
    validation: Validation
    tracker: Tracker
    meter: Meter
    state: RunState
    facts: dict[str, Any]
    """What every checkpoint's manifest records besides the progress."""


def train(run: Run, stop: StopRequest) -> bool:
    """Train to the end of the run, or to a stop request.

    Returns:
        Whether the run is finished.
    """
    config, state = run.config, run.state
    tokens_per_step = config.train.global_batch_size * config.train.sequence_length
    log, validate, save = (
        Cadence(every, tokens_per_step=tokens_per_step)
        for every in (config.train.log_every, config.validation.every, config.train.checkpoint_every)
    )
    started, stopped = time.monotonic(), False
    batches: Iterator[list[Any]] = iter(run.loader)
    if state.step == 0 and config.validation.at_start:
        run.validation.report(run.tracker, state)
    run.meter.start()

    while state.step < run.schedule.total_steps and not stopped:
        micro_batches = next(batches)
        num_labels, stop_votes, elapsed = run.ranks.sum(
            [
                sum(batch.num_labels for batch in micro_batches),
                stop.requested,
                int(time.monotonic() - started) if run.ranks.rank == 0 else 0,
            ]
        )
        stopped = stop_votes > 0
        result = train_step(run, micro_batches, num_labels)
        last = state.step == run.schedule.total_steps

        if log.due(state, elapsed) or last:
            report(run, result)
        run.meter.pause()
        if stopped:
            save_checkpoint(run)  # First of all: whoever asked may not wait long.
        if validate.due(state, elapsed) or last:
            run.validation.report(run.tracker, state)
        if (save.due(state, elapsed) or last) and not stopped:
            save_checkpoint(run)
        run.meter.go_on()
    return state.step >= run.schedule.total_steps


def train_step(run: Run, micro_batches: list[Any], num_labels: int) -> StepResult:
    """One optimizer step, and the books about it."""
    config, state = run.config, run.state
    step, first_sequence = state.step + 1, state.sequences
    with profiled(run.run_dir, enabled=step == config.track.profile_step, rank=run.ranks.rank):
        result = run.engine.train_step(
            [batch.to(run.engine.device) for batch in micro_batches],
            run.task,
            num_labels=num_labels,
            learning_rate_factor=run.schedule.factor(step),
            seeds=dropout_seeds(config.seed, step, run.ranks.rank, len(micro_batches)),
        )
    state.advance(
        sequences=run.loader.next_sequence,
        skipped=result.skipped,
        tokens=config.train.global_batch_size * config.train.sequence_length,
    )
    run.meter.add(result, num_labels=num_labels, wait_seconds=run.loader.wait_seconds)
    if result.skipped:
        window = f"{first_sequence}-{state.sequences}"
        run.tracker.event(step, "skipped_step", grad_norm=result.grad_norm, sequences=window)
        run.tracker.message(f"step {step} (sequences {window}) skipped: its gradient is not finite")
        if state.skipped_in_a_row > config.train.max_skipped_steps:
            raise BigtxError(
                f"{state.skipped_in_a_row} steps in a row (up to step {step}) had a loss or gradient that is "
                "not finite, more than train.max_skipped_steps; lower the learning rate or look at the data "
                f"before sequence {state.sequences:,}"
            )
    return result


def report(run: Run, result: StepResult) -> None:
    """Write the metrics of the window that ends here."""
    metrics = run.meter.metrics()
    rates = {group["name"]: group["lr"] for group in run.engine.optimizer.param_groups}
    metrics["train/learning_rate"] = rates.get("vectors", next(iter(rates.values())))
    metrics |= {f"train/learning_rate/{name}": rate for name, rate in rates.items() if len(set(rates.values())) > 1}
    metrics |= {"train/grad_norm": result.grad_norm, "train/skipped_steps": run.state.skipped_steps}
    run.tracker.log(run.state.step, run.state.tokens, metrics)
    run.tracker.progress(run.state.step, run.state.tokens, metrics)


def save_checkpoint(run: Run) -> Path:
    """Write a checkpoint of this step, where there is none yet."""
    facts = run.facts | {"step": run.state.step, "state": run.state.to_dict(), "meter": run.meter.to_dict()}
    return checkpoint.save(run.engine, run.ranks, run.run_dir, facts, keep=run.config.train.keep_checkpoints)
