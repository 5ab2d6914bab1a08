"""The progress of a run, a few integers in each checkpoint, and the metrics of the steps between two log lines."""

from __future__ import annotations

import resource
import time
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any

import torch

from bigtx.data.stream.order import SkippedWindows
from bigtx.engine.optimizers import read_number
from bigtx.model.experts import Routing
from bigtx.utils.errors import CheckpointError, ConfigError
from bigtx.utils.shell import settings
from bigtx.utils.units import parse_duration

if TYPE_CHECKING:
    from bigtx.engine.engine import StepResult

HARMLESS_SKIPS = {"fp16": 2}
"""By precision: how many skipped steps in a row do not indicate broken weights. fp16 skips so many whenever its loss
scale is too high; in other precisions each skipped step is a fault."""

ADVICE = (
    "Lower the learning rate ("
    + settings({"optimizer.learning_rate": "X", "allow_changes": ["optimizer.learning_rate"]})
    + ")"
)
"""The usual remedy where steps are skipped."""


class RolledBack(Exception):
    """The run has returned to a checkpoint, and the loop continues there."""


@dataclass
class RunState:
    """Progress of a run.

    Attributes:
        step: optimizer steps done, skipped ones included.
        sequences: sequences of the global order that were read or skipped, over all ranks: the position in the data.
        tokens: input tokens consumed over all ranks.
        skipped_steps: steps without an update because of a non-finite value.
        skipped_in_a_row: the number of skipped steps since the last good step.
        spikes: steps whose loss was a spike.
        spikes_in_a_row: the number of spikes since the last good step, where they make the run return to a checkpoint.
        roll_backs: how often the run has returned to a checkpoint.
        harmless_skips: the entry of `HARMLESS_SKIPS` for the precision of this process.
        skipped_sequences: windows of the global order that the run skips, as in `data.skip`.
        best_step, best_value: the best measurement, where checkpoints are chosen by one.
        measured_since_best: the number of measurements after the best one.
        owes_validation: whether a stop request prevented a validation that was due.
    """

    step: int = 0
    sequences: int = 0
    tokens: int = 0
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    spikes: int = 0
    spikes_in_a_row: int = 0
    roll_backs: int = 0
    harmless_skips: int = 0
    skipped_sequences: list[str] = field(default_factory=list)
    best_step: int | None = None
    best_value: float | None = None
    measured_since_best: int = 0
    owes_validation: bool = False

    def advance(self, *, sequences: int, tokens: int, skipped: bool, refused: bool = False) -> None:
        """Count one optimizer step.

        Args:
            sequences: the position in the data after the step.
            tokens: the tokens that the step consumed.
            skipped: whether the step was skipped because of a non-finite value.
            refused: whether its update was left out for another reason.
        """
        self.step += 1
        self.sequences = sequences
        self.tokens += tokens
        self.skipped_steps += skipped
        self.skipped_in_a_row += skipped
        if not skipped and not refused:
            self.skipped_in_a_row = self.spikes_in_a_row = 0

    @property
    def is_bad_step(self) -> bool:
        """Return whether the latest step was skipped, or is a spike for which the run may return to a checkpoint."""
        return self.skipped_in_a_row > 0 or self.spikes_in_a_row > 0

    @property
    def is_suspect(self) -> bool:
        """Return whether the latest steps were all bad, so that the weights may be broken."""
        return self.skipped_in_a_row > self.harmless_skips or self.spikes_in_a_row > 0

    def judge(self, value: float, *, lower: bool) -> bool:
        """Record a measurement of this step, and return whether it is the best so far. NaN and measurements of suspect
        weights never are.

        Args:
            lower: whether lower is better.
        """
        is_number = value == value
        is_best = (is_number and not self.is_suspect) and (
            self.best_value is None or (value < self.best_value if lower else value > self.best_value)
        )
        if is_best:
            self.best_step, self.best_value = self.step, value
        self.measured_since_best = 0 if is_best else self.measured_since_best + 1
        return is_best

    def forget_best(self) -> None:
        """Forget the best measurement and the number of measurements since."""
        self.best_step = self.best_value = None
        self.measured_since_best = 0

    def pass_over(self, ranges: list[str]) -> None:
        """Set the windows of `data.skip`.

        Raises:
            ConfigError: they differ from what the run has skipped so far.
        """
        before, now = (SkippedWindows(each).before(self.sequences) for each in (self.skipped_sequences, ranges))
        if before != now:
            raise ConfigError(
                f"data.skip=[{', '.join(ranges)}]: the run is at sequence {self.sequences:,} and has skipped "
                f"[{', '.join(f'{start}-{end}' for start, end in before)}] so far; sequences before that position can "
                "no longer be skipped or read. Change only later sequences, or resume from an earlier checkpoint"
            )
        self.skipped_sequences = ranges

    def to_dict(self) -> dict[str, Any]:
        """Return the state in the form that a checkpoint's manifest holds."""
        return asdict(self)

    def restore(self, saved: dict[str, Any]) -> None:
        """Return to the state that `to_dict` gave."""
        vars(self).update(vars(RunState.from_dict(saved | {"harmless_skips": self.harmless_skips})))

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> RunState:
        """Return the state that `to_dict` gave.

        Raises:
            CheckpointError: it has a field that this bigtx does not know.
        """
        if unknown := sorted(saved.keys() - {each.name for each in fields(cls)}):
            raise CheckpointError(
                f"the checkpoint's state of the run has {', '.join(unknown)}, which this bigtx does not know; resume "
                "with the version of bigtx that wrote it (environment.json in the run's folder names it)"
            )
        return cls(**saved)


@dataclass(frozen=True)
class Step:
    """A step that all ranks have agreed on.

    Attributes:
        micro_batches: this rank's micro batches, on the CPU.
        next_sequence: the next sequence of the global order after the step.
        wait_seconds: the time that the loader has waited for data, until it had these batches.
        num_labels, num_tokens: the numbers of labels and tokens over all ranks.
        stop_votes: the number of ranks that were asked to stop when the agreement began.
        elapsed: seconds of training by rank 0's clock when the agreement began.
        failed_saves: the number of ranks whose save had failed when the agreement began.
    """

    micro_batches: list[Any]
    next_sequence: int
    wait_seconds: float
    num_labels: int
    num_tokens: int
    stop_votes: int
    elapsed: int
    failed_saves: int


class Cadence:
    """A regular interval of steps, tokens or time.

    Every rank must pass the same numbers: the time is rank 0's.
    """

    def __init__(self, every: str, *, tokens: int = 0) -> None:
        """Args:
        every: "500 steps", "1B tokens" or "30 min".
        tokens: consumed so far.
        """
        duration = parse_duration(every)
        assert duration.unit != "fraction", f"{every!r} is not how often something happens"
        self.unit, self.every = duration.unit, duration.value
        self._previous_tokens, self._previous_seconds = tokens, 0.0

    def restart(self, tokens: int) -> None:
        """Continue after a return to an earlier step, at so many tokens."""
        self._previous_tokens = tokens

    def due(self, state: RunState, elapsed_seconds: float) -> bool:
        """Return whether the latest step reached another multiple. Call it once after every step."""
        if self.unit == "steps":
            return state.step % max(1, round(self.every)) == 0
        if self.unit == "tokens":
            before, self._previous_tokens = self._previous_tokens, state.tokens
            return state.tokens // self.every > before // self.every
        previous, self._previous_seconds = self._previous_seconds, elapsed_seconds
        return elapsed_seconds // self.every > previous // self.every


class RoutingMeter:
    """The routing of a window's tokens to experts. Only `metrics` waits for the device."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Start a new window."""
        self.steps = 0
        self.means = torch.zeros(2, dtype=torch.float64)  # Balance and z, summed over steps.
        self.counts = torch.zeros((1, 1), dtype=torch.float64)

    def add(self, routing: Routing) -> None:
        """Add the routing of one step."""
        means = torch.stack([routing.balance, routing.z])
        self.steps += 1
        self.means = self.means.to(means.device) + means
        self.counts = self.counts.to(means.device) + routing.counts

    def metrics(self) -> dict[str, float]:
        """Return balance and z, and the largest and smallest load of an expert in any layer; 1 is an even load."""
        if not self.steps:
            return {}
        balance, z = (self.means / self.steps).tolist()
        loads = self.counts / self.counts.mean(dim=1, keepdim=True)
        return {
            "experts/balance": balance,
            "experts/router_z": z,
            "experts/max_load": float(loads.max()),
            "experts/min_load": float(loads.min()),
        }

    def to_dict(self) -> dict[str, Any]:
        """Return the sums of the open window; JSON keeps the numbers exactly."""
        return {"steps": self.steps, "means": self.means.tolist(), "counts": self.counts.tolist()}

    def restore(self, saved: dict[str, Any]) -> None:
        """Continue a window that `to_dict` gave."""
        self.steps = saved["steps"]
        self.means = torch.tensor(saved["means"], dtype=torch.float64)
        self.counts = torch.tensor(saved["counts"], dtype=torch.float64)


class Meter:
    """Sums over the steps since the last log line.

    Checkpoints hold the sums of the loss and of the routing (`to_dict`), so that a resumed run logs what an
    uninterrupted one logs. `pause` and `resume` exclude time spent outside of steps (validation, checkpoints).
    """

    def __init__(self, *, flops_per_token: float, peak_flops: float | None) -> None:
        """Args:
        flops_per_token: floating-point operations of the model per token, forward and backward.
        peak_flops: floating-point operations per second of all ranks together; None where unknown.
        """
        self.flops_per_token = flops_per_token
        self.peak_flops = peak_flops
        self.labels = 0
        self.loss_sum = torch.zeros((), dtype=torch.float64)
        self.routing = RoutingMeter()
        self._wait_end = 0.0
        self.start()

    def start(self) -> None:
        """Start the clock of a new window."""
        self.steps, self.tokens, self.seconds, self._wait_start = 0, 0, 0.0, self._wait_end
        self._since: float | None = time.monotonic()

    def add(self, result: StepResult, *, num_labels: int, num_tokens: int, wait_seconds: float) -> None:
        """Add one step: its labels and tokens over all ranks, and the loader's total `wait_seconds` so far."""
        self.loss_sum = self.loss_sum.to(result.loss_sum.device)
        if not result.skipped:
            self.loss_sum += result.loss_sum
            self.labels += num_labels
            if result.routing is not None:
                self.routing.add(result.routing)
        self.steps += 1
        self.tokens += num_tokens
        self._wait_end = wait_seconds

    def pause(self) -> None:
        """Stop the clock."""
        assert self._since is not None
        self.seconds += time.monotonic() - self._since
        self._since = None

    def resume(self) -> None:
        """Start the clock again."""
        self._since = time.monotonic()

    def metrics(self) -> dict[str, float]:
        """Return the metrics of the window, and start the next one."""
        self.pause()
        seconds = max(self.seconds, 1e-9)
        tokens_per_second = self.tokens / seconds
        metrics = {
            "train/loss": read_number(self.loss_sum) / self.labels if self.labels else float("nan"),
            "perf/tokens_per_second": tokens_per_second,
            "perf/step_seconds": seconds / max(1, self.steps),
            "perf/data_wait_fraction": (self._wait_end - self._wait_start) / seconds,
            "perf/memory_gib": memory_gib(),
        }
        if self.peak_flops:
            metrics["perf/mfu"] = tokens_per_second * self.flops_per_token / self.peak_flops
        metrics |= self.routing.metrics()
        self.labels = 0
        self.loss_sum.zero_()
        self.routing.clear()
        self.start()
        return metrics

    def to_dict(self) -> dict[str, Any]:
        """Return the sums of the open window."""
        routing = {"routing": self.routing.to_dict()} if self.routing.steps else {}
        return {"labels": self.labels, "loss_sum": float(self.loss_sum).hex()} | routing

    def restore(self, saved: dict[str, Any]) -> None:
        """Continue a window that `to_dict` gave; with a new loader, whose time of waiting starts at 0."""
        self.labels = saved["labels"]
        self.loss_sum = torch.tensor(float.fromhex(saved["loss_sum"]), dtype=torch.float64)
        self._wait_end = 0.0
        self.start()
        self.routing.clear()
        if "routing" in saved:
            self.routing.restore(saved["routing"])


def memory_gib() -> float:
    """Return the peak memory of this process: allocated on the accelerator, or resident without one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
