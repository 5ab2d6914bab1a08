"""The training loop."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.profiler import ProfilerActivity, profile

from bigtx.config.schema import RunConfig
from bigtx.data.stream.loader import StepLoader
from bigtx.engine import saving
from bigtx.engine.engine import Engine, StepResult
from bigtx.engine.ranks import Ranks
from bigtx.engine.schedules import Schedule
from bigtx.engine.task import Task
from bigtx.track.tracker import Tracker
from bigtx.train.context import StopRequest
from bigtx.train.meter import Meter
from bigtx.train.state import Cadence, RunState
from bigtx.utils.errors import BigtxError
from bigtx.utils.hardware import keep_freed_memory
from bigtx.utils.shell import settings


@contextmanager
def profiled(run_dir: Path, *, enabled: bool, rank: int) -> Iterator[None]:
    """Write `profile/rank-00000.trace.json` (open it in Perfetto) and, on CUDA, `rank-00000.memory.pickle`
    (open it at pytorch.org/memory_viz) of what happens inside.
    """
    if not enabled:
        yield
        return
    folder = run_dir / "profile"
    folder.mkdir(parents=True, exist_ok=True)
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.memory._record_memory_history(max_entries=200_000)
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda, profile_memory=True) as trace:
        yield
    trace.export_chrome_trace(str(folder / f"rank-{rank:05d}.trace.json"))
    if cuda:
        snapshot = str(folder / f"rank-{rank:05d}.memory.pickle")
        torch.cuda.memory._dump_snapshot(snapshot)  # type: ignore[no-untyped-call]
        torch.cuda.memory._record_memory_history(enabled=None)


ADVICE = (
    "Lower the learning rate ("
    + settings({"optimizer.learning_rate": "X", "allow_changes": ["optimizer.learning_rate"]})
    + ")"
)
"""The usual remedy where steps are skipped."""


class Validation(Protocol):
    """A measurement of the model within a run."""

    def report(self, tracker: Tracker, state: RunState) -> bool:
        """Measure and report, and return whether the model is the best so far, so that its checkpoint is kept. Every
        rank must call it."""
        ...


@dataclass
class Run:
    """Everything that the loop uses, made by the entry point."""

    config: RunConfig
    run_dir: Path
    ranks: Ranks
    engine: Engine
    task: Task
    loader: StepLoader
    schedule: Schedule
    validation: Validation
    tracker: Tracker
    meter: Meter
    state: RunState
    facts: dict[str, Any]
    """Entries of every checkpoint's manifest besides the progress."""
    validate_every: str
    patience: int | None = None
    """The run ends after this many measurements without a better one."""


def train(run: Run, stop: StopRequest) -> bool:
    """Train to the end of the run, or to a stop request.

    Returns:
        Whether the run is finished.

    Raises:
        BigtxError: steps were skipped up to the end of the run, or too many in a row.
    """
    state = run.state
    if run.engine.device.type == "cpu":
        keep_freed_memory()
    log, validate, save = (
        Cadence(every, tokens=state.tokens)
        for every in (run.config.train.log_every, run.validate_every, run.config.train.checkpoint_every)
    )
    started, stopped = time.monotonic(), False
    batches: Iterator[list[Any]] = iter(run.loader)
    run.tracker.begin()
    if state.owes_validation:
        measure(run)
    run.meter.start()

    while state.step < run.schedule.total_steps and not stopped and not is_out_of_patience(run):
        micro_batches = next(batches)
        num_labels, num_tokens, stop_votes, elapsed = run.ranks.sum(
            [
                sum(batch.num_labels for batch in micro_batches),
                run.loader.num_tokens(micro_batches),
                stop.requested,
                int(time.monotonic() - started) if run.ranks.rank == 0 else 0,
            ]
        )
        stopped = stop_votes > 0
        result = train_step(run, micro_batches, num_labels, num_tokens)
        last = state.step == run.schedule.total_steps

        if log.due(state, elapsed) or last:
            report(run, result)
        run.meter.pause()
        # Each `due` is called exactly once after every step.
        to_validate, to_save = validate.due(state, elapsed) or last, save.due(state, elapsed) or last
        if stopped and not last:
            # Save at once, because the sender of the request may not wait long. The resumed run measures.
            state.owes_validation = to_validate
            save_checkpoint(run)
        else:
            is_best = to_validate and measure(run)
            if to_save or is_best or is_out_of_patience(run):
                save_checkpoint(run)
        run.meter.resume()
    return _is_finished(run)


def _is_finished(run: Run) -> bool:
    """Return whether nothing is left to train, and report an early end.

    Raises:
        BigtxError: the last steps were skipped.
    """
    state = run.state
    if is_out_of_patience(run) and state.step < run.schedule.total_steps:
        run.tracker.message(f"no better measurement in {state.measured_since_best} validations: the run ends here")
        run.tracker.event(state.step, "early_stop", best_step=state.best_step, best_value=state.best_value)
    finished = state.step >= run.schedule.total_steps or is_out_of_patience(run)
    if finished and state.is_suspect:
        raise BigtxError(
            f"the run is not finished: its last {state.skipped_in_a_row} steps (up to step {state.step}) were skipped, "
            "because the loss or gradient was not finite. The last good checkpoint was kept, and the command resumes "
            f"from it. {ADVICE}, inspect the data before sequence {state.sequences:,}, or end the run before these "
            "steps (train.max_steps)"
        )
    return finished


def measure(run: Run) -> bool:
    """Validate, and return whether the model is the best so far."""
    is_best = run.validation.report(run.tracker, run.state)
    run.state.owes_validation = False
    return is_best


def is_out_of_patience(run: Run) -> bool:
    """Return whether too many measurements in a row were not the best."""
    return run.patience is not None and run.state.measured_since_best >= run.patience


def train_step(run: Run, micro_batches: list[Any], num_labels: int, num_tokens: int) -> StepResult:
    """Make one optimizer step and record it; the numbers of labels and tokens are those of all ranks."""
    config, state = run.config, run.state
    step, first_sequence = state.step + 1, state.sequences
    with profiled(run.run_dir, enabled=step == config.track.profile_step, rank=run.ranks.rank):
        result = run.engine.train_step(
            [batch.to(run.engine.device) for batch in micro_batches],
            run.task,
            num_labels=num_labels,
            num_tokens=num_tokens,
            learning_rate_factor=run.schedule.factor(step),
        )
    state.advance(sequences=run.loader.next_sequence, skipped=result.skipped, tokens=num_tokens)
    run.meter.add(result, num_labels=num_labels, num_tokens=num_tokens, wait_seconds=run.loader.wait_seconds)
    if result.skipped:
        window = f"{first_sequence}-{state.sequences}"
        run.tracker.event(step, "skipped_step", grad_norm=result.grad_norm, sequences=window)
        run.tracker.message(f"step {step} (sequences {window}) skipped: its gradient is not finite")
        if state.skipped_in_a_row > config.train.max_skipped_steps:
            raise BigtxError(
                f"{state.skipped_in_a_row} steps in a row (up to step {step}) had a loss or gradient that is "
                "not finite, more than train.max_skipped_steps. The last good checkpoint was kept, and the command "
                f"resumes from it. {ADVICE}, or inspect the data before sequence {state.sequences:,}"
            )
    return result


def report(run: Run, result: StepResult) -> None:
    """Write the metrics of the window that ends here."""
    metrics = run.meter.metrics()
    rates = run.engine.optimizer.learning_rates()
    metrics["train/learning_rate"] = rates.get("vectors", next(iter(rates.values())))
    metrics |= {f"train/learning_rate/{name}": rate for name, rate in rates.items() if len(set(rates.values())) > 1}
    metrics |= {"train/grad_norm": result.grad_norm, "train/skipped_steps": run.state.skipped_steps}
    run.tracker.log(run.state.step, run.state.tokens, metrics)
    run.tracker.progress(run.state.step, run.state.tokens, metrics)


def save_checkpoint(run: Run) -> Path:
    """Write a checkpoint of this step if there is none yet, and return its folder."""
    state = run.state
    facts = run.facts | {"step": state.step, "state": state.to_dict(), "meter": run.meter.to_dict()}
    if state.is_suspect:
        facts["suspect"] = True
    keep, is_skipping = run.config.train.keep_checkpoints, state.skipped_in_a_row > 0
    return saving.save(run.engine, run.ranks, run.run_dir, facts, keep=keep, is_skipping=is_skipping)
