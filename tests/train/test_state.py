"""Where a run is: what a checkpoint records of the data."""

from __future__ import annotations

import pytest

from bigtx.train.state import RunState
from bigtx.utils.errors import ConfigError


def test_a_state_comes_back_as_it_was_saved() -> None:
    state = RunState(skipped_sequences=["8-16"])
    state.advance(sequences=24, tokens=160, skipped=True)
    assert (state.step, state.sequences, state.tokens, state.skipped_in_a_row) == (1, 24, 160, 1)
    assert RunState.from_dict(state.to_dict()) == state


def test_a_state_of_before_windows_has_none() -> None:
    saved = RunState(step=3, sequences=24).to_dict()
    del saved["skipped_sequences"]
    assert RunState.from_dict(saved).skipped_sequences == []


def test_only_windows_to_come_may_change() -> None:
    state = RunState(step=3, sequences=1000, skipped_sequences=["10-20", "2k-3k"])
    state.pass_over(["10-15", "15-20", "1000-1100"])
    assert state.skipped_sequences == ["10-15", "15-20", "1000-1100"]
    for ranges in ([], ["10-20", "30-40"], ["10-21"], ["10-20", "999-1100"]):
        with pytest.raises(ConfigError, match=r"stands at sequence 1,000 and has passed over \[10-20\]"):
            state.pass_over(ranges)


def test_judged_anew_any_number_is_the_best_so_far() -> None:
    state = RunState(step=5)
    assert state.judge(0.9, lower=False) and not state.judge(0.8, lower=False)
    assert (state.best_step, state.best_value, state.measured_since_best) == (5, 0.9, 1)
    state.forget_best()
    assert state.measured_since_best == 0
    state.step = 6
    assert state.judge(30.0, lower=True) and state.best_step == 6
