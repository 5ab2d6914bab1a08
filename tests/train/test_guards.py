"""What counts as a spike, what follows from it, and what a checkpoint keeps of it."""

from __future__ import annotations

import math
import random
from types import SimpleNamespace
from typing import Any

import pytest

from bigtx.config.schema import GuardsConfig
from bigtx.train import guards as module
from bigtx.train.guards import Guards, Window, open_guards
from bigtx.train.state import RolledBack, RunState
from bigtx.utils.errors import BigtxError


def spikes(values: list[float], *, size: int = 20, deviations: float = 6.0) -> list[int]:
    """The places of the values that are spikes."""
    window = Window("loss", size, deviations)
    return [place for place, value in enumerate(values) if window.judge(value) is not None]


def noisy(count: int, level: float = 3.0, deviation: float = 0.1) -> list[float]:
    generator = random.Random(1)
    return [generator.gauss(level, deviation) for _ in range(count)]


def test_only_what_is_far_above_the_noise_is_a_spike() -> None:
    values = noisy(200)
    assert spikes(values) == []
    values[100], values[120], values[140] = 4.0, 3.5, 1.0
    assert spikes(values) == [100]
    assert spikes(values, deviations=4.0) == [100, 120]


def test_the_limit_is_the_median_and_deviations_of_the_window() -> None:
    """Of 1 to 10, the median is 5.5, the median absolute deviation 2.5."""
    for value, is_spike in ((5.5 + 2 * 1.4826 * 2.5 + 1e-6, True), (5.5 + 2 * 1.4826 * 2.5 - 1e-6, False)):
        window = Window("loss", 10, 2.0)
        assert not any(window.judge(float(before)) for before in (7, 1, 10, 2, 9, 3, 8, 4, 6, 5))
        spike = window.judge(value)
        assert (spike is not None) is is_spike
        if spike:
            assert (spike.value, spike.median, spike.limit) == (value, 5.5, pytest.approx(5.5 + 2 * 1.4826 * 2.5))
            assert str(spike).startswith("its loss 12.91 is a spike (median of the latest steps 5.5, limit 12.91")


def test_equal_losses_have_a_deviation_of_one_percent() -> None:
    assert spikes([2.0] * 20 + [2.11, 2.13], deviations=6.0) == [21]


def test_the_start_of_training_has_no_spikes() -> None:
    falling = [10.0 * 0.97**step for step in range(60)]
    assert spikes(falling) == []
    # Half of the window is needed.
    assert spikes([1.0] * 9 + [50.0]) == [] and spikes([1.0] * 10 + [50.0]) == [10]


def test_a_slow_rise_is_no_spike_and_a_level_that_lasts_is_none_any_more() -> None:
    assert spikes([value + 0.01 * step for step, value in enumerate(noisy(200))]) == []
    assert spikes([*noisy(40), *noisy(40, level=6.0)]) == list(range(40, 50))


def test_what_is_not_finite_is_a_spike_at_any_time_and_enters_no_window() -> None:
    window = Window("loss", 4, 6.0)
    assert window.judge(math.nan) and window.judge(math.inf) and not window.judge(1.0)
    assert list(window.values) == [1.0]


class Engine(SimpleNamespace):
    """An engine whose copies are compared."""

    stage = 1


def guards(world_size: int = 1, **settings: Any) -> Guards:
    fields = {"window": 8, "verify_replicas_every": None} | settings
    return Guards(GuardsConfig(**fields), Engine(), SimpleNamespace(world_size=world_size), tokens=0)  # type: ignore[arg-type]


class Run(SimpleNamespace):
    """A run that notes what it is told."""

    def __init__(self) -> None:
        self.notes: list[Any] = []
        tracker = SimpleNamespace(
            event=lambda step, kind, **facts: self.notes.append((step, kind, facts)), message=self.notes.append
        )
        super().__init__(state=RunState(step=30), tracker=tracker, schedule=SimpleNamespace(total_steps=100))


def step(guard: Guards, run: Any, loss: float, norm: float = 1.0) -> bool:
    """A step with this loss; returns whether its update was left out."""
    refused = guard.refuses(loss, norm)
    run.state.advance(sequences=8 * (run.state.step + 1), tokens=1, skipped=False, refused=refused)
    guard.after_step(run, sequences="240-248", refused=refused)
    return refused


@pytest.mark.parametrize(("spike", "refused"), [("warn", False), ("skip", True)])
def test_a_spike_is_reported_and_its_update_left_out_where_asked(spike: str, refused: bool) -> None:
    guard, run = guards(spike=spike), Run()
    assert not any(step(guard, run, loss) for loss in noisy(8))
    assert run.notes == []
    assert step(guard, run, 6.0) is refused and step(guard, run, 7.0) is refused
    facts = run.notes[0][2]
    assert run.notes[0][:2] == (39, "spike") and (facts["value"], facts["skipped"]) == (6.0, refused)
    assert facts["median"] == pytest.approx(3.0, abs=0.2) and facts["sequences"] == "240-248"
    texts = [note for note in run.notes if isinstance(note, str)]
    if refused:
        assert len(texts) == 2 and texts[0].startswith("step 39 (sequences 240-248) skipped: its loss 6 is a spike")
    else:  # Once for spikes in a row.
        assert len(texts) == 1 and texts[0].startswith("warning: step 39 (sequences 240-248): its loss 6 is a spike")
    assert run.state.spikes == 2 and not run.state.is_suspect and not run.state.is_bad_step
    step(guard, run, 3.0)
    step(guard, run, 9.0)
    assert len([note for note in run.notes if isinstance(note, str)]) == len(texts) + 1


def test_an_update_waits_for_the_judgement_only_where_it_may_be_left_out() -> None:
    judged = {spike: guards(spike=spike).may_refuse for spike in ("off", "warn", "skip", "roll_back")}
    assert judged == {"off": False, "warn": False, "skip": True, "roll_back": True}
    comparing, state = guards(world_size=2, verify_replicas_every="2 steps"), RunState()
    found = []
    for number in range(1, 5):
        state.step = number
        comparing.before_step(state, 0.0)
        found.append(comparing.may_refuse)
    assert found == [False, True, False, True]


@pytest.mark.parametrize(("deviations", "refused"), [(6.0, True), (60.0, False)])
def test_more_deviations_make_fewer_spikes(deviations: float, refused: bool) -> None:
    guard, run = guards(spike="skip", deviations=deviations), Run()
    assert not any(step(guard, run, loss) for loss in noisy(8))
    assert step(guard, run, 4.5) is refused


def test_the_gradient_is_compared_where_asked() -> None:
    for deviations, refused in ((None, False), (6.0, True)):
        guard, run = guards(spike="skip", gradient_deviations=deviations), Run()
        assert not any(step(guard, run, loss, norm) for loss, norm in zip(noisy(8), noisy(8), strict=True))
        assert step(guard, run, 3.0, norm=100.0) is refused
        assert not refused or run.notes[0][2]["what"] == "gradient norm"


def test_a_checkpoint_keeps_the_windows() -> None:
    guard, other = guards(spike="skip", gradient_deviations=6.0), guards(spike="skip", gradient_deviations=6.0)
    for loss in noisy(8):
        guard.refuses(loss, 2 * loss)
    other.refuses(1.0, 1.0)
    other.restore(guard.to_dict())
    assert other.to_dict() == guard.to_dict() and len(guard.to_dict()["losses"]) == len(guard.to_dict()["norms"]) == 8
    assert other.refuses(9.0, 6.0) and guard.refuses(9.0, 6.0)
    other.restore({})  # Of a checkpoint without guards.
    assert not other.refuses(9.0, 6.0)


@pytest.mark.parametrize(("patience", "steps", "total"), [(3, 3, 100), (1, 1, 100), (3, 1, 39)])
def test_spikes_in_a_row_return_the_run(patience: int, steps: int, total: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """After as many as the patience, or at the end of the run. A good step between them counts them from 1 again."""
    done: list[tuple[str, dict[str, Any]]] = []

    def returned(run: Any, why: str, **facts: Any) -> None:
        done.append((why, facts))
        raise RolledBack

    monkeypatch.setattr(module, "roll_back", returned)
    guard, run = guards(spike="roll_back", patience=patience, window=16), Run()
    for loss in noisy(8):
        step(guard, run, loss)
    run.schedule.total_steps = total
    if patience > 1 and total == 100:
        assert step(guard, run, 6.0) and step(guard, run, 6.0) and run.state.is_suspect and run.state.is_bad_step
        assert not step(guard, run, 3.0) and not run.state.is_suspect
    for _ in range(steps - 1):
        assert step(guard, run, 6.0)
    with pytest.raises(RolledBack):
        step(guard, run, 6.0)
    ((why, facts),) = done
    assert why == f"{steps} spikes in a row (up to step {run.state.step})" and facts == {}


def test_a_run_without_a_good_checkpoint_continues(monkeypatch: pytest.MonkeyPatch) -> None:
    tries: list[str] = []
    monkeypatch.setattr(module, "roll_back", lambda run, why, **facts: tries.append(why))
    guard, run = guards(spike="roll_back", patience=2, window=16), Run()
    for loss in noisy(8):
        step(guard, run, loss)
    assert all(step(guard, run, 6.0) for _ in range(4))
    assert len(tries) == 2 and run.notes[-1].startswith("there is no good checkpoint to return to yet")
    assert run.state.spikes_in_a_row == 0


def test_copies_are_compared_when_due_and_before_a_save(monkeypatch: pytest.MonkeyPatch) -> None:
    guard, run = guards(world_size=2, spike="off", verify_replicas_every="4 steps"), Run()
    answers, steps = [""], []
    monkeypatch.setattr(guard, "_compare", lambda: steps.append(run.state.step) or answers[0])
    for _ in range(10):
        guard.before_step(run.state, 0)
        step(guard, run, 1.0)
    assert steps == [32, 36], "before the update of the next step"
    guard.before_save(run)
    assert len(steps) == 3 and run.notes == []
    answers[0] = "rank 1 (node): the copy of a.weight differs from the right one"
    done: list[dict[str, Any]] = []
    monkeypatch.setattr(module, "roll_back", lambda run, why, **facts: done.append({"why": why, **facts}))
    with pytest.raises(BigtxError, match=r"rank 1 .*There is no good checkpoint"):
        guard.before_save(run)
    guard.before_step(run.state, 0)
    assert guard.refuses(1.0, 1.0), "its update would be the first with wrong weights"
    with pytest.raises(BigtxError, match="rank 1"):
        guard.after_step(run, sequences="0-8", refused=True)
    assert [facts["skip_data"] for facts in done] == [False, False] and done[0]["why"] == answers[0]


@pytest.mark.parametrize(
    ("world_size", "stage", "every", "compares"),
    [(2, 0, "4 steps", True), (2, 2, "4 steps", True), (2, 3, "4 steps", False), (1, 0, "4 steps", False)],
)
def test_without_anything_to_guard_there_are_no_guards(world_size: int, stage: int, every: str, compares: bool) -> None:
    engine: Any = SimpleNamespace(stage=stage)
    ranks: Any = SimpleNamespace(world_size=world_size)
    found = open_guards(GuardsConfig(spike="off", verify_replicas_every=every), engine, ranks, None)
    assert (found is not None) is compares
    assert open_guards(GuardsConfig(spike="off", verify_replicas_every=None), engine, ranks, None) is None
    checkpoint: Any = SimpleNamespace(manifest={"state": {"tokens": 5}, "guards": {"losses": [1.0, 2.0]}})
    resumed = open_guards(GuardsConfig(verify_replicas_every=None), engine, ranks, checkpoint)
    assert resumed is not None and resumed.to_dict() == {"losses": [1.0, 2.0]}
