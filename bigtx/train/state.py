"""The progress of a run: a few integers, saved with each checkpoint."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from bigtx.data.stream.order import SkippedWindows
from bigtx.utils.errors import ConfigError
from bigtx.utils.units import parse_duration

HARMLESS_SKIPS = {"fp16": 2}
"""By precision: how many skipped steps in a row do not indicate broken weights. fp16 skips so many whenever its loss
scale is too high; in other precisions each skipped step is a fault."""


@dataclass
class RunState:
    """Progress of a run.

    Attributes:
        step: optimizer steps done, skipped ones included.
        sequences: sequences of the global order that were read or skipped, over all ranks: the position in the data.
        tokens: input tokens consumed over all ranks.
        skipped_steps: steps without an update because of a non-finite value.
        skipped_in_a_row: the number of skipped steps since the last good step.
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
    harmless_skips: int = 0
    skipped_sequences: list[str] = field(default_factory=list)
    best_step: int | None = None
    best_value: float | None = None
    measured_since_best: int = 0
    owes_validation: bool = False

    def advance(self, *, sequences: int, tokens: int, skipped: bool) -> None:
        """Count one optimizer step.

        Args:
            sequences: the position in the data after the step.
            tokens: the tokens that the step consumed.
        """
        self.step += 1
        self.sequences = sequences
        self.tokens += tokens
        self.skipped_steps += skipped
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0

    @property
    def is_suspect(self) -> bool:
        """Return whether the latest steps were all skipped, so that the weights may be broken."""
        return self.skipped_in_a_row > self.harmless_skips

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

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> RunState:
        """Return the state that `to_dict` gave."""
        return cls(**saved)


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

    def due(self, state: RunState, elapsed_seconds: float) -> bool:
        """Return whether the latest step reached another multiple. Call it once after every step."""
        if self.unit == "steps":
            return state.step % max(1, round(self.every)) == 0
        if self.unit == "tokens":
            before, self._previous_tokens = self._previous_tokens, state.tokens
            return state.tokens // self.every > before // self.every
        previous, self._previous_seconds = self._previous_seconds, elapsed_seconds
        return elapsed_seconds // self.every > previous // self.every
