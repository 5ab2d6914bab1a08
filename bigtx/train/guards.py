"""The guards of a run: they find spikes of the loss, and ranks whose copies of the weights differ, and return the run
to its last good checkpoint, within the same process.

A step is judged when the loss and the norm of its gradient are known (`Guards.refuses`), and before its update if that
may be left out. The same numbers, summed over all ranks by one collective, are on every rank, so all ranks decide the
same without asking each other. What follows from it is done after the step (`Guards.after_step`).

The comparison of copies (engine/replicas.py) is imported when it is needed.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from typing import TYPE_CHECKING, NamedTuple

from bigtx.config.schema import GuardsConfig
from bigtx.engine import retention
from bigtx.engine.checkpoint import Checkpoint, is_suspect
from bigtx.train import start
from bigtx.train.state import ADVICE, Cadence, RolledBack, RunState
from bigtx.utils.errors import BigtxError

if TYPE_CHECKING:
    from bigtx.engine.engine import Engine
    from bigtx.engine.ranks import Ranks
    from bigtx.train.loop import Run


DEVIATION_OF_NORMAL = 1.4826
"""The standard deviation of a normal distribution, divided by its median absolute deviation."""
LEAST_DEVIATION = 0.01
"""The least standard deviation, as a share of the median: equal losses would make every other one a spike."""


class Spike(NamedTuple):
    """A number far above those of the steps before."""

    what: str
    value: float
    median: float
    limit: float

    def __str__(self) -> str:
        return (
            f"its {self.what} {self.value:.4g} is a spike (median of the latest steps {self.median:.4g}, limit "
            f"{self.limit:.4g})"
        )


class Window:
    """The latest finite values of a number.

    Median and median absolute deviation are used because spikes hardly change them, in contrast to mean and standard
    deviation. Every finite value enters the window, also a spike: a level that lasts is not a spike any more after half
    of the window.
    """

    def __init__(self, what: str, size: int, deviations: float) -> None:
        """Args:
        what: the number's name, for messages.
        size: the number of values.
        deviations: how many standard deviations above the median a spike is.
        """
        self.values: deque[float] = deque(maxlen=size)
        self._what, self._deviations = what, deviations

    def judge(self, value: float) -> Spike | None:
        """Compare a value with the window, add it, and return it if it is a spike. A value that is not finite is one.

        Before the window is half full, nothing finite is a spike.
        """
        median = limit = math.nan
        if 2 * len(self.values) >= (self.values.maxlen or 0):
            median = statistics.median(self.values)
            limit = median + self._deviations * LEAST_DEVIATION * abs(median)
            if value > limit:  # Most values are not, and need no deviation.
                deviation = DEVIATION_OF_NORMAL * statistics.median(abs(other - median) for other in self.values)
                limit = max(limit, median + self._deviations * deviation)
        if math.isfinite(value):
            self.values.append(value)
            if not value > limit:
                return None
        return Spike(self._what, value, median, limit)


class Guards:
    """The guards of one start of a run.

    Attributes:
        config: their settings.
    """

    def __init__(self, config: GuardsConfig, engine: Engine, ranks: Ranks, *, tokens: int) -> None:
        """Args:
        tokens: the tokens consumed so far.
        """
        self.config = config
        self._engine, self._ranks = engine, ranks
        self._windows: dict[str, Window] = {}
        if config.spike != "off":
            self._windows["losses"] = Window("loss", config.window, config.deviations)
            if config.gradient_deviations is not None:
                self._windows["norms"] = Window("gradient norm", config.window, config.gradient_deviations)
        every = config.verify_replicas_every
        self.compares = every is not None and ranks.world_size > 1 and engine.stage < 3
        self._comparison = Cadence(every or "1 steps", tokens=tokens)
        self._is_comparison_due = False
        self._spike: Spike | None = None
        self._difference = ""
        self._warned = False

    def before_step(self, state: RunState, elapsed_seconds: float) -> None:
        """Plan the comparison of copies. Call it once before every step; the time is rank 0's."""
        self._is_comparison_due = self.compares and self._comparison.due(state, elapsed_seconds)

    @property
    def may_refuse(self) -> bool:
        """Return whether the update of this step may be left out. Otherwise it is judged while the device updates."""
        return self.config.spike in ("skip", "roll_back") or self._is_comparison_due

    def refuses(self, loss: float, norm: float) -> bool:
        """Judge a step, and return whether to leave out its update.

        The copies are compared here, before the update: at stages 1 and 2 it overwrites them all.

        Args:
            loss: the mean loss of the step over all ranks.
            norm: the norm of its gradient, before clipping.
        """
        numbers = {"losses": loss, "norms": norm}
        found = [window.judge(numbers[name]) for name, window in self._windows.items()]
        self._spike = next(filter(None, found), None)
        self._difference = self._compare() if self._is_comparison_due else ""
        return bool(self._difference) or (self._spike is not None and self.config.spike in ("skip", "roll_back"))

    def after_step(self, run: Run, *, sequences: str, refused: bool) -> None:
        """Report what was found in the latest step, and return to a checkpoint if that is needed.

        Args:
            run: the run after the step.
            sequences: the sequences of the step.
            refused: whether the update was left out.

        Raises:
            RolledBack: the run has returned to a checkpoint.
            BigtxError: it has no checkpoint for that, or must not return again.
        """
        spike, difference, self._spike, self._difference = self._spike, self._difference, None, ""
        if difference:
            self._return_from_difference(run, difference)
        if spike is None:
            self._warned = False
            return
        state = run.state
        state.spikes += 1
        facts = {name: value for name, value in spike._asdict().items() if value == value}
        run.tracker.event(state.step, "spike", sequences=sequences, skipped=refused, **facts)
        if refused:
            run.tracker.message(f"step {state.step} (sequences {sequences}) skipped: {spike}")
        elif not self._warned:  # Once for spikes in a row; each has its event.
            run.tracker.message(f"warning: step {state.step} (sequences {sequences}): {spike}")
        self._warned = True
        if self.config.spike == "roll_back":
            self._return_from_spikes(run)

    def before_save(self, run: Run) -> None:
        """Compare the copies, so that no checkpoint is written from ranks that differ.

        Raises:
            RolledBack, BigtxError: as `after_step`.
        """
        if self.compares and (difference := self._compare()):
            self._return_from_difference(run, difference)

    def to_dict(self) -> dict[str, list[float]]:
        """Return the windows, for a checkpoint's manifest; JSON keeps the numbers exactly."""
        return {name: list(window.values) for name, window in self._windows.items()}

    def restore(self, saved: dict[str, list[float]]) -> None:
        """Continue with the windows that `to_dict` gave."""
        for name, window in self._windows.items():
            window.values.clear()
            window.values.extend(saved.get(name, ()))

    def _compare(self) -> str:
        from bigtx.engine.replicas import describe_difference

        return describe_difference(self._engine, self._ranks)

    def _return_from_difference(self, run: Run, difference: str) -> None:
        roll_back(run, difference, remedy="Start it on other machines", skip_data=False)
        raise BigtxError(
            f"{difference}. There is no good checkpoint to return to: the same command starts again at step 0"
        )

    def _return_from_spikes(self, run: Run) -> None:
        state = run.state
        state.spikes_in_a_row += 1
        # A run cannot end with a step that may be the first of several spikes.
        if state.spikes_in_a_row < self.config.patience and state.step < run.schedule.total_steps:
            return
        roll_back(run, f"{state.spikes_in_a_row} spikes in a row (up to step {state.step})")
        state.spikes_in_a_row = 0
        run.tracker.message("there is no good checkpoint to return to yet: the run continues here")


def open_guards(config: GuardsConfig, engine: Engine, ranks: Ranks, found: Checkpoint | None) -> Guards | None:
    """Return the guards of a run, with the windows of its checkpoint; None if there is nothing to guard."""
    guards = Guards(config, engine, ranks, tokens=found.manifest["state"]["tokens"] if found else 0)
    if config.spike == "off" and not guards.compares:
        return None
    if found:
        guards.restore(found.manifest.get("guards", {}))
    return guards


REMEDY = f"{ADVICE}, or inspect the data"
"""What may help a run whose loss stays high or is not finite."""


def roll_back(run: Run, why: str, *, remedy: str = REMEDY, skip_data: bool = True) -> None:
    """Return to the last good checkpoint: weights, optimizer, counters, windows and metrics. Every rank must call it.

    Returns only if there is no good checkpoint; then nothing has changed.

    Args:
        run: the run after a step.
        why: why the run returns, for messages.
        remedy: a sentence without its end: what to do before the run is started again.
        skip_data: whether to skip the data since the checkpoint, and guards.skip_steps more.

    Raises:
        RolledBack: the run has returned.
        BigtxError: it has already returned as often as it may.
    """
    run.saver.wait()  # Its checkpoint may be the one to return to, and must not be lost if the run ends here.
    config, state = run.config, run.state
    allowed = config.guards.max_roll_backs
    if state.roll_backs >= allowed:
        raise BigtxError(
            f"{why}; the run has returned to a checkpoint {state.roll_backs} times, and guards.max_roll_backs "
            f"allows no more. The last good checkpoint was kept, and the same command resumes from it. {remedy}, or "
            f"allow more with guards.max_roll_backs={2 * allowed + 2}"
        )
    found = newest_good(run)
    if found is None:
        return
    left, roll_backs = state.step, state.roll_backs + 1
    position = state.sequences + config.guards.skip_steps * config.train.global_batch_size
    state.restore(found.manifest["state"])
    state.roll_backs = roll_backs
    begin = state.sequences
    if skip_data:
        state.sequences = position
    start.set_states(run.engine, found)
    found.close()
    run.meter.restore(found.manifest["meter"])
    assert run.guards is not None
    run.guards.restore(found.manifest.get("guards", {}))
    run.loader.close()
    run.loader = run.open_loader()
    run.tracker.rewind(state.step)
    skipped = f"{begin}-{position}" if skip_data else ""
    run.tracker.event(left, "roll_back", why=why, checkpoint=found.path.name, skipped_sequences=skipped)
    then = f"; its sequences {skipped} are skipped" if skipped else ""
    run.tracker.message(f"{why}: back at step {state.step}, with {found.path.name}{then}")
    raise RolledBack


def newest_good(run: Run) -> Checkpoint | None:
    """Return the newest complete checkpoint that was not written while steps were bad, opened and verified."""

    def warn(text: str) -> None:
        run.tracker.message(f"warning: {text}")
        run.tracker.event(run.state.step, "refused_checkpoint", text=text)

    found = retention.choose(run.run_dir, run.ranks, warn)
    return None if found is None or is_suspect(found.manifest) else found
