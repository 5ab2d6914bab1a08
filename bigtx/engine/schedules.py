"""The learning rate as a factor on its peak, a pure function of the step."""

from __future__ import annotations

import math

from bigtx.config.schema import ScheduleConfig
from bigtx.utils.errors import ConfigError
from bigtx.utils.units import parse_duration


def resolve_steps(text: str, *, total_steps: int, tokens_per_step: int, key: str) -> int:
    """Return a duration of the config in optimizer steps, rounded to the nearest.

    Args:
        text: the duration: "500 steps", "2B tokens" or "5 %".
        total_steps: the steps of the run.
        tokens_per_step: the tokens of a step, for a duration in tokens.
        key: the config key, for the error.

    Raises:
        ConfigError: the duration is a time, which has no fixed number of steps.
    """
    duration = parse_duration(text)
    if duration.unit == "steps":
        return round(duration.value)
    if duration.unit == "tokens":
        return round(duration.value / tokens_per_step)
    if duration.unit == "fraction":
        return round(duration.value * total_steps)
    raise ConfigError(f"{key}={text!r} is a time; write steps, tokens or a share of the run, e.g. {key}='5 %'")


class Schedule:
    """A linear warm-up, followed by the chosen shape.

    cosine: from 1 to `minimum_factor` along half a cosine. warmup_stable_decay: 1, then a linear decrease to
    `minimum_factor` over the last `decay` (arXiv:2404.06395). constant: 1.
    """

    def __init__(self, config: ScheduleConfig, *, total_steps: int, tokens_per_step: int) -> None:
        sizes = {"total_steps": total_steps, "tokens_per_step": tokens_per_step}
        self.name = config.name
        self.minimum = config.minimum_factor
        self.total_steps = total_steps
        self.warmup_steps = resolve_steps(config.warmup, key="schedule.warmup", **sizes)
        self.decay_steps = resolve_steps(config.decay, key="schedule.decay", **sizes)

    def factor(self, step: int) -> float:
        """Return the factor for the update that ends step `step` (the first is 1)."""
        if step <= self.warmup_steps:
            return step / self.warmup_steps
        if self.name == "constant":
            return 1.0
        if self.name == "warmup_stable_decay":
            remaining = max(0, self.total_steps - step)
            share = 1.0 if remaining >= self.decay_steps else remaining / self.decay_steps
            return self.minimum + (1 - self.minimum) * share
        progress = min(1.0, (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps))
        return self.minimum + (1 - self.minimum) * 0.5 * (1 + math.cos(math.pi * progress))
