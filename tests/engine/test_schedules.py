"""The learning rate's factor at every bend of each shape, by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest

from bigtx.config.schema import ScheduleConfig
from bigtx.engine.optimizers import Schedule, resolve_steps
from bigtx.utils.errors import ConfigError


def factors(*steps: int, total_steps: int = 100, tokens_per_step: int = 500, **fields: Any) -> list[float]:
    config = ScheduleConfig(**{"warmup": "10 steps", "decay": "20 steps", "minimum_factor": 0.1} | fields)
    schedule = Schedule(config, total_steps=total_steps, tokens_per_step=tokens_per_step)
    return [schedule.factor(step) for step in steps]


@pytest.mark.parametrize("name", ["cosine", "warmup_stable_decay", "constant"])
def test_the_warm_up_rises_from_the_first_step_on(name: str) -> None:
    assert factors(1, 5, 9, 10, name=name) == pytest.approx([0.1, 0.5, 0.9, 1.0])
    # Without one the first step is a whole one; cosine falls from step 0 on, where nothing is updated.
    first = 0.1 + 0.9 * (1 + math.cos(math.pi / 100)) / 2 if name == "cosine" else 1.0
    assert factors(1, name=name, warmup="0 steps") == [pytest.approx(first)]


def test_cosine_falls_to_the_minimum_and_stays() -> None:
    # 90 steps: a third of them gives cos(60 degrees), a half cos(90), two thirds cos(120).
    assert factors(10, 40, 55, 70, 100, 101, 200, name="cosine") == pytest.approx(
        [1.0, 0.1 + 0.9 * 0.75, 0.55, 0.1 + 0.9 * 0.25, 0.1, 0.1, 0.1]
    )
    assert factors(11, name="cosine")[0] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 90)) / 2)
    assert factors(55, 100, name="cosine", minimum_factor=0.0) == pytest.approx([0.5, 0.0])
    assert factors(55, 100, name="cosine", minimum_factor=1.0) == [1.0, 1.0]


def test_warmup_stable_decay_falls_over_the_last_steps_alone() -> None:
    assert factors(11, 79, 80, 81, 90, 99, 100, 101, 200, name="warmup_stable_decay") == pytest.approx(
        [1.0, 1.0, 1.0, 0.955, 0.55, 0.145, 0.1, 0.1, 0.1]
    )
    assert factors(98, 99, 100, name="warmup_stable_decay", decay="1 steps") == [1.0, 1.0, pytest.approx(0.1)]


def test_without_a_decay_the_rate_stays() -> None:
    assert factors(11, 99, 100, 101, name="warmup_stable_decay", decay="0 %") == [1.0] * 4


def test_constant_knows_no_minimum_and_no_decay() -> None:
    assert factors(11, 90, 100, 101, name="constant") == [1.0] * 4


@pytest.mark.parametrize("warmup", ["10 steps", "5k tokens", "10 %"])
@pytest.mark.parametrize("decay", ["20 steps", "10k tokens", "20 %"])
def test_lengths_are_steps_tokens_or_shares(warmup: str, decay: str) -> None:
    found = factors(5, 10, 11, 80, 90, 100, name="warmup_stable_decay", warmup=warmup, decay=decay)
    assert found == pytest.approx([0.5, 1.0, 1.0, 1.0, 0.55, 0.1])


def test_a_run_of_warm_up_alone_or_with_one_step_after_it() -> None:
    assert factors(1, 100, name="cosine", warmup="100 %") == pytest.approx([0.01, 1.0])
    assert factors(99, 100, name="cosine", warmup="99 steps") == pytest.approx([1.0, 0.1])


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("7 steps", 7),
        ("2B tokens", 2000),
        ("2.4M tokens", 2),
        ("2.6M tokens", 3),
        ("5 %", 50),
        ("0.16 %", 2),
        ("0 %", 0),
    ],
)
def test_a_length_is_rounded_to_whole_steps(text: str, steps: int) -> None:
    assert resolve_steps(text, total_steps=1000, tokens_per_step=1_000_000, key="schedule.warmup") == steps


def test_a_time_is_no_length_of_a_schedule() -> None:
    with pytest.raises(ConfigError, match=r"schedule.decay='30 min' is a time; write .* schedule.decay='5 %'"):
        resolve_steps("30 min", total_steps=1000, tokens_per_step=1, key="schedule.decay")
