"""Where a run is: what a checkpoint records of the data."""

from __future__ import annotations

import math

import pytest

from bigtx.train.state import HARMLESS_SKIPS, Cadence, RunState
from bigtx.utils.errors import CheckpointError, ConfigError


def test_a_state_comes_back_as_it_was_saved() -> None:
    state = RunState(skipped_sequences=["8-16"])
    state.advance(sequences=24, tokens=160, skipped=True)
    assert (state.step, state.sequences, state.tokens, state.skipped_in_a_row) == (1, 24, 160, 1)
    assert RunState.from_dict(state.to_dict()) == state


def test_a_state_of_before_windows_has_none() -> None:
    saved = RunState(step=3, sequences=24).to_dict()
    del saved["skipped_sequences"]
    assert RunState.from_dict(saved).skipped_sequences == []


def test_a_state_of_a_later_version_is_refused() -> None:
    with pytest.raises(CheckpointError, match="has novelty, which this bigtx does not know; resume with the version"):
        RunState.from_dict(RunState().to_dict() | {"novelty": 1})


def test_a_new_run_has_done_nothing() -> None:
    saved = RunState().to_dict()
    zero = ("step", "sequences", "tokens", "skipped_steps", "skipped_in_a_row", "harmless_skips", "measured_since_best")
    zero += ("spikes", "spikes_in_a_row", "roll_backs")
    nothing = {"skipped_sequences": [], "best_step": None, "best_value": None, "owes_validation": False}
    assert saved == dict.fromkeys(zero, 0) | nothing


def test_only_windows_to_come_may_change() -> None:
    state = RunState(step=3, sequences=1000, skipped_sequences=["10-20", "2k-3k"])
    state.pass_over(["10-15", "15-20", "1000-1100"])
    assert state.skipped_sequences == ["10-15", "15-20", "1000-1100"]
    for ranges in ([], ["10-20", "30-40"], ["10-21"], ["10-20", "999-1100"]):
        with pytest.raises(ConfigError, match=r"is at sequence 1,000 and has skipped \[10-20\]"):
            state.pass_over(ranges)


def test_judged_anew_any_number_is_the_best_so_far() -> None:
    state = RunState(step=5)
    assert state.judge(0.9, lower=False) and not state.judge(0.8, lower=False)
    assert (state.best_step, state.best_value, state.measured_since_best) == (5, 0.9, 1)
    state.forget_best()
    assert state.measured_since_best == 0
    state.step = 6
    assert state.judge(30.0, lower=True) and state.best_step == 6


def test_a_good_step_ends_a_row_of_skipped_ones() -> None:
    state = RunState()
    rows = []
    for skipped in (True, True, False, True, False):
        state.advance(sequences=0, tokens=0, skipped=skipped)
        rows.append((state.skipped_in_a_row, state.is_suspect))
    assert rows == [(1, True), (2, True), (0, False), (1, True), (0, False)]
    assert state.skipped_steps == 3


def test_what_the_loss_scale_skips_is_harmless() -> None:
    state = RunState(harmless_skips=HARMLESS_SKIPS["fp16"])
    suspect = []
    for _ in range(3):
        state.advance(sequences=0, tokens=0, skipped=True)
        suspect.append(state.is_suspect)
    assert suspect == [False, False, True]


def test_no_number_and_no_suspect_weights_are_ever_the_best() -> None:
    state = RunState(step=1)
    assert not state.judge(math.nan, lower=True) and state.best_step is None
    state.skipped_in_a_row = 1
    assert not state.judge(1.0, lower=True) and state.best_step is None
    state.skipped_in_a_row = 0
    assert state.judge(2.0, lower=True) and state.measured_since_best == 0
    assert not state.judge(math.nan, lower=False) and state.best_value == 2.0


@pytest.mark.parametrize(
    ("every", "due_at"), [("3 steps", [3, 6, 9]), ("250 tokens", [3, 5, 8, 10]), ("25 s", [3, 5, 8, 10])]
)
def test_a_cadence_is_due_once_for_each_multiple(every: str, due_at: list[int]) -> None:
    cadence = Cadence(every)
    due = [
        step for step in range(1, 11) if cadence.due(RunState(step=step, tokens=100 * step), elapsed_seconds=10 * step)
    ]
    assert due == due_at


@pytest.mark.parametrize(("lower", "values"), [(True, [3.0, 2.0, 2.0, 2.5, 1.5]), (False, [0.1, 0.2, 0.2, 0.1, 0.3])])
def test_an_equal_measurement_is_no_better_one(lower: bool, values: list[float]) -> None:
    state, found = RunState(), []
    for value in values:
        state.step += 10
        found.append((state.judge(value, lower=lower), state.best_step, state.measured_since_best))
    assert found == [(True, 10, 0), (True, 20, 0), (False, 20, 1), (False, 20, 2), (True, 50, 0)]
    assert state.best_value == values[-1]


def test_what_is_no_number_counts_against_patience_and_hides_no_later_best() -> None:
    state, found = RunState(step=10), []
    for value in (math.nan, 2.0, math.nan, math.nan, 1.0):
        found.append((state.judge(value, lower=True), state.measured_since_best))
    assert found == [(False, 1), (True, 0), (False, 1), (False, 2), (True, 0)]
    assert state.best_value == 1.0


def test_suspect_weights_count_against_patience() -> None:
    state = RunState(step=10, harmless_skips=2, skipped_in_a_row=2)
    assert state.judge(2.0, lower=True)
    state.skipped_in_a_row = 3
    assert not state.judge(1.0, lower=True) and (state.best_value, state.measured_since_best) == (2.0, 1)


def test_steps_tokens_and_skips_add_up_and_the_place_in_the_data_is_taken() -> None:
    state = RunState(step=4, sequences=40, tokens=400, skipped_steps=2)
    state.advance(sequences=72, tokens=100, skipped=False)
    state.advance(sequences=80, tokens=50, skipped=True)
    assert (state.step, state.sequences, state.tokens) == (6, 80, 550)
    assert (state.skipped_steps, state.skipped_in_a_row) == (3, 1)


def due_at(cadence: Cadence, numbers: list[tuple[int, int, float]]) -> list[bool]:
    """For the steps, tokens and seconds after each step."""
    return [cadence.due(RunState(step=step, tokens=tokens), seconds) for step, tokens, seconds in numbers]


@pytest.mark.parametrize("every", ["250 tokens", "25 s"])
def test_a_step_that_passes_several_multiples_is_due_once(every: str) -> None:
    numbers = [(1, 240, 24.0), (2, 800, 80.0), (3, 900, 90.0), (4, 1000, 100.0), (5, 1000, 100.0)]
    assert due_at(Cadence(every), numbers) == [False, True, False, True, False]


def test_a_resumed_run_is_due_by_what_it_had_consumed() -> None:
    numbers = [(8, 800, 0.0), (9, 900, 0.0), (10, 1000, 0.0), (11, 1250, 0.0)]
    assert due_at(Cadence("250 tokens", tokens=760), numbers) == [False, False, True, True]
    # The multiple that it was saved at is not due again.
    assert due_at(Cadence("250 tokens", tokens=750), numbers[:2]) == [False, False]


def test_minutes_are_minutes_and_no_time_is_no_interval() -> None:
    assert due_at(Cadence("2 min"), [(1, 0, 119.0), (2, 0, 120.0), (3, 0, 239.0), (4, 0, 240.0)]) == [
        False,
        True,
        False,
        True,
    ]
    assert due_at(Cadence("1 steps"), [(1, 0, 0.0), (2, 0, 0.0)]) == [True, True]
