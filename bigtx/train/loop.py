"""The training loop."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch.profiler import ProfilerActivity, profile

from bigtx.config.schema import RunConfig
from bigtx.data.stream.loader import StepLoader
from bigtx.engine.engine import Engine, StepResult
from bigtx.engine.optimizers import Schedule
from bigtx.engine.ranks import Ranks
from bigtx.engine.saving import Saver
from bigtx.model.loss import Task
from bigtx.track.tracker import Tracker
from bigtx.train.context import StartUp, StopRequest
from bigtx.train.guards import Guards, roll_back
from bigtx.train.state import ADVICE, Cadence, Meter, RolledBack, RunState, Step
from bigtx.utils.errors import BigtxError
from bigtx.utils.hardware import keep_freed_memory, rare_collections
from bigtx.utils.heartbeat import Phase, beat

PROFILED_HOSTS = 2
"""The number of hosts whose first rank is profiled: a trace of every rank of a large run would fill the disk."""
COLLECT_EVERY = 100
"""Steps between two collections of Python's garbage, which all ranks make at the same step."""


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
    open_loader: Callable[[], StepLoader]
    """Opens another loader, at the state's position in the data."""
    schedule: Schedule
    validation: Validation
    tracker: Tracker
    meter: Meter
    saver: Saver
    state: RunState
    facts: dict[str, Any]
    """Entries of every checkpoint's manifest besides the progress."""
    validate_every: str
    patience: int | None = None
    """The run ends after this many measurements without a better one."""
    guards: Guards | None = None
    look_after: Callable[[int, float, Tracker], dict[str, float]] | None = None
    """See `Health.look`."""
    start_up: StartUp | None = None
    """The phases of this start, until its first step."""


def read_step(run: Run, *, stop_requested: bool = False, elapsed: float = 0.0) -> Callable[[], Step]:
    """Read the next step's micro batches, and begin to agree on the step with the other ranks.

    Args:
        run: the run.
        stop_requested: whether this rank was asked to stop.
        elapsed: seconds of training; rank 0's count.

    Returns:
        A function that waits for the other ranks and returns the step.
    """
    loader = run.loader
    micro_batches = next(loader)
    next_sequence, wait_seconds = loader.next_sequence, loader.wait_seconds
    sums = run.ranks.begin_sum(
        [
            sum(batch.num_labels for batch in micro_batches),
            loader.num_tokens(micro_batches),
            stop_requested,
            int(elapsed) if run.ranks.rank == 0 else 0,
            run.saver.has_failed,
        ]
    )
    return lambda: Step(micro_batches, next_sequence, wait_seconds, *sums())


class Cadences(NamedTuple):
    """When to write metrics, to measure, and to write a checkpoint."""

    log: Cadence
    validate: Cadence
    save: Cadence


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
    intervals = (run.config.train.log_every, run.validate_every, run.config.train.checkpoint_every)
    cadences = Cadences(*(Cadence(every, tokens=state.tokens) for every in intervals))
    started = time.monotonic()
    run.tracker.begin()
    with rare_collections():
        while True:
            try:
                _train_from_here(run, stop, cadences, started)
                return _is_finished(run)
            except RolledBack:
                for cadence in cadences:
                    cadence.restart(state.tokens)


def _train_from_here(run: Run, stop: StopRequest, cadences: Cadences, started: float) -> None:
    """Make the remaining steps, up to the end of the run or to a stop request.

    While a step is made, the ranks agree on the next one, so that none waits for this between two steps.

    Args:
        started: the time of the first step of this process.

    Raises:
        RolledBack: the run has returned to a checkpoint, from which it continues.
        BigtxError: too many steps in a row were skipped.
    """
    state, stopped = run.state, False
    if state.owes_validation:
        measure(run)
    run.meter.start()

    def read_next() -> Callable[[], Step]:
        return read_step(run, stop_requested=stop.requested, elapsed=time.monotonic() - started)

    step: Step | None = None
    while state.step < run.schedule.total_steps and not stopped and not is_out_of_patience(run):
        beat(Phase.DATA, state.step + 1)
        if step is None:  # Nothing was agreed on yet.
            agreement = read_next()
            beat(Phase.AGREEING)
            step = agreement()
            beat(Phase.DATA)
        is_last = state.step + 1 == run.schedule.total_steps
        next_agreement = None if is_last else read_next()
        if run.guards:
            run.guards.before_step(state, step.elapsed)
        result = train_step(run, step)
        if run.start_up:
            report_start(run, run.start_up)
        if next_agreement:
            beat(Phase.AGREEING)
            step = next_agreement()
            stopped = step.stop_votes > 0
            if step.failed_saves:
                wait_for_checkpoint(run)
        _after_step(run, result, cadences, step.elapsed, is_last=is_last, stopped=stopped)
    wait_for_checkpoint(run)
    beat(Phase.ENDING)


def _after_step(
    run: Run, result: StepResult, cadences: Cadences, elapsed: int, *, is_last: bool, stopped: bool
) -> None:
    """Write metrics, measure, and write a checkpoint, as they are due.

    Args:
        elapsed: seconds of training by rank 0's clock, the same number on all ranks.
        is_last: whether the step was the last one of the run.
        stopped: whether the run stops after the step.
    """
    state = run.state
    beat(Phase.LOGGING)
    if state.step % COLLECT_EVERY == 0:
        gc.collect()
    if cadences.log.due(state, elapsed) or is_last:
        report(run, result)
    run.meter.pause()
    # Each `due` is called exactly once after every step.
    to_validate = cadences.validate.due(state, elapsed) or is_last
    to_save = cadences.save.due(state, elapsed) or is_last
    if stopped and not is_last:
        # Save at once, because the sender of the request may not wait long. The resumed run measures.
        state.owes_validation = to_validate
        save_checkpoint(run, is_last=True)
    else:
        is_best = to_validate and measure(run)
        if to_save or is_best or is_out_of_patience(run):
            save_checkpoint(run, is_last=is_last or is_out_of_patience(run))
    report_checkpoint(run)
    run.meter.resume()


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
    beat(Phase.VALIDATION)
    is_best = run.validation.report(run.tracker, run.state)
    gc.collect()
    run.state.owes_validation = False
    return is_best


def is_out_of_patience(run: Run) -> bool:
    """Return whether too many measurements in a row were not the best."""
    return run.patience is not None and run.state.measured_since_best >= run.patience


def train_step(run: Run, agreed: Step) -> StepResult:
    """Make one optimizer step and record it."""
    config, state = run.config, run.state
    step, first_sequence = state.step + 1, state.sequences
    is_profiled = step == config.track.profile_step and run.ranks.is_first_of_host(among=PROFILED_HOSTS)
    with profiled(run.run_dir, enabled=is_profiled, rank=run.ranks.rank):
        result = run.engine.train_step(
            [batch.to(run.engine.device) for batch in agreed.micro_batches],
            run.task,
            num_labels=agreed.num_labels,
            num_tokens=agreed.num_tokens,
            learning_rate_factor=run.schedule.factor(step),
            refuses=run.guards.refuses if run.guards else None,
            may_refuse=run.guards is not None and run.guards.may_refuse,
        )
    is_finite = result.refused or not result.skipped
    num_labels, num_tokens = agreed.num_labels, agreed.num_tokens
    state.advance(sequences=agreed.next_sequence, skipped=not is_finite, refused=result.refused, tokens=num_tokens)
    run.meter.add(result, num_labels=num_labels, num_tokens=num_tokens, wait_seconds=agreed.wait_seconds)
    window = f"{first_sequence}-{state.sequences}"
    if not is_finite:
        run.tracker.event(step, "skipped_step", grad_norm=result.grad_norm, sequences=window)
        run.tracker.message(f"step {step} (sequences {window}) skipped: its gradient is not finite")
        if state.skipped_in_a_row > config.train.max_skipped_steps:
            give_up(run)
    if run.guards:
        run.guards.after_step(run, sequences=window, refused=result.refused)
    return result


def report_start(run: Run, start_up: StartUp) -> None:
    """Record where the seconds of this start went, after its first step."""
    start_up.end("first_step")
    run.start_up = None
    run.tracker.event(run.state.step, "start_up", seconds=start_up.seconds)


def give_up(run: Run) -> None:
    """End the run after too many skipped steps in a row, or return to a checkpoint if the config says so.

    Raises:
        RolledBack: the run has returned to a checkpoint.
        BigtxError: the run ends.
    """
    state = run.state
    why = (
        f"{state.skipped_in_a_row} steps in a row (up to step {state.step}) had a loss or gradient that is not finite, "
        "more than train.max_skipped_steps"
    )
    if run.guards and run.guards.config.spike == "roll_back":
        roll_back(run, why)
    wait_for_checkpoint(run)
    raise BigtxError(
        f"{why}. The last good checkpoint was kept, and the command resumes from it. {ADVICE}, or inspect the data "
        f"before sequence {state.sequences:,}"
    )


def report(run: Run, result: StepResult) -> None:
    """Write the metrics of the window that ends here."""
    metrics = run.meter.metrics()
    rates = run.engine.optimizer.learning_rates()
    metrics["train/learning_rate"] = rates.get("vectors", next(iter(rates.values())))
    metrics |= {f"train/learning_rate/{name}": rate for name, rate in rates.items() if len(set(rates.values())) > 1}
    metrics |= {"train/grad_norm": result.grad_norm, "train/skipped_steps": run.state.skipped_steps}
    if run.guards:
        metrics |= {"train/spikes": run.state.spikes, "train/roll_backs": run.state.roll_backs}
    if run.look_after:
        metrics |= run.look_after(run.state.step, metrics["perf/step_seconds"], run.tracker)
    run.tracker.log(run.state.step, run.state.tokens, metrics)
    run.tracker.progress(run.state.step, run.state.tokens, metrics)


def save_checkpoint(run: Run, *, is_last: bool) -> None:
    """Begin to write a checkpoint of this step.

    Args:
        is_last: whether the run ends or stops with it.
    """
    beat(Phase.SAVING)
    state = run.state
    run.tracker.check_folder()
    if run.guards:
        run.guards.before_save(run)
    facts = run.facts | {"step": state.step, "state": state.to_dict(), "meter": run.meter.to_dict()}
    facts["tracked"] = run.tracker.state()
    if state.is_suspect:
        facts["suspect"] = True
    if run.guards:
        facts["guards"] = run.guards.to_dict()
    run.saver.save(facts, is_skipping=state.is_bad_step, may_wait=not is_last)


def wait_for_checkpoint(run: Run) -> None:
    """Wait until the checkpoint that is being written, if any, is durable. Every rank must call it.

    Raises:
        CheckpointError: on every rank, if it could not be written.
    """
    run.saver.wait()
    report_checkpoint(run)


def report_checkpoint(run: Run) -> None:
    """Write the metrics of a checkpoint that has become durable since the last step."""
    saved = run.saver.take_saved()
    if saved:
        run.tracker.log(run.state.step, run.state.tokens, saved.metrics())
