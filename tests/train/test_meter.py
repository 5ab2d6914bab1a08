"""Metrics of a window of steps."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import torch

from bigtx.engine.engine import StepResult
from bigtx.model.experts import Routing, shares_of
from bigtx.train import state
from bigtx.train.state import Meter, memory_gib


def routed(counts: list[list[float]], *, skipped: bool = False) -> StepResult:
    """Ten tokens, whose probabilities are the shares that the experts had."""
    loads = torch.tensor(counts, dtype=torch.float32)
    routing = Routing(loads, 10 * shares_of(loads), torch.full((len(counts), 1), 40.0))
    return StepResult(torch.tensor(6.0), grad_norm=1.0, skipped=skipped, routing=routing)


def new_meter() -> Meter:
    return Meter(flops_per_token=1.0, peak_flops=None)


def experts(meter: Meter) -> dict[str, float]:
    return {name: value for name, value in meter.metrics().items() if name.startswith("experts/")}


def test_loads_are_of_the_whole_window_and_of_the_worst_layer() -> None:
    meter = new_meter()
    meter.add(routed([[8, 0, 0, 0], [2, 2, 2, 2]]), num_labels=4, num_tokens=8, wait_seconds=0.0)
    meter.add(routed([[0, 8, 8, 0], [4, 4, 4, 4]]), num_labels=4, num_tokens=8, wait_seconds=0.0)
    meter.add(routed([[math.nan] * 4] * 2, skipped=True), num_labels=4, num_tokens=8, wait_seconds=0.0)
    expected = {"experts/balance": 2.0, "experts/router_z": 4.0, "experts/max_load": 8 / 6, "experts/min_load": 0.0}
    assert experts(meter) == expected
    assert experts(meter) == {}  # The window ended.


def test_a_window_goes_on_after_a_checkpoint() -> None:
    straight, stopped, resumed = new_meter(), new_meter(), new_meter()
    first, second = routed([[3, 1]]), routed([[1, 6]])
    for meter in (straight, stopped):
        meter.add(first, num_labels=4, num_tokens=8, wait_seconds=0.0)
    resumed.restore(json.loads(json.dumps(stopped.to_dict())))
    for meter in (straight, resumed):
        meter.add(second, num_labels=4, num_tokens=8, wait_seconds=0.0)
    assert experts(straight) == experts(resumed) != {}


def test_without_experts_there_is_nothing_to_say_about_them() -> None:
    meter = new_meter()
    meter.add(StepResult(torch.tensor(6.0), 1.0, False), num_labels=4, num_tokens=8, wait_seconds=0.0)
    assert "routing" not in meter.to_dict()
    metrics = meter.metrics()
    assert metrics["train/loss"] == 1.5 and not any(name.startswith("experts/") for name in metrics)


class Clock:
    """A clock that goes on where a test says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(state.time, "monotonic", lambda: self.now)

    def pass_(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def step(meter: Meter, clock: Clock, seconds: float, loss_sum: float, **fields: float) -> None:
    """One step that takes so long; `fields` are those of `Meter.add`."""
    clock.pass_(seconds)
    result = StepResult(torch.tensor(loss_sum), 1.0, skipped=math.isnan(loss_sum))
    meter.add(result, **fields)  # type: ignore[arg-type]


def test_rates_are_of_the_windows_own_time(clock: Clock) -> None:
    meter = Meter(flops_per_token=6_000.0, peak_flops=1e6)
    clock.pass_(500.0)  # Building the rest of the run.
    meter.start()
    step(meter, clock, 4.0, 6.0, num_labels=4, num_tokens=100, wait_seconds=1.0)
    for seconds in (50.0, 70.0):  # Validation after each step: no time of the window's.
        meter.pause()
        clock.pass_(seconds)
        meter.resume()
        step(meter, clock, 3.0, 3.0, num_labels=1, num_tokens=30, wait_seconds=2.5)
    first = meter.metrics()
    assert first["train/loss"] == 2.0  # 12 / 6, and not the mean of the steps' means.
    assert first["perf/tokens_per_second"] == 16.0
    assert first["perf/step_seconds"] == pytest.approx(10 / 3)
    assert first["perf/data_wait_fraction"] == 0.25
    assert first["perf/mfu"] == pytest.approx(0.096)

    step(meter, clock, 8.0, 9.0, num_labels=3, num_tokens=40, wait_seconds=4.5)
    second = meter.metrics()
    assert second["train/loss"] == 3.0 and second["perf/tokens_per_second"] == 5.0
    assert second["perf/step_seconds"] == 8.0
    assert second["perf/data_wait_fraction"] == 0.25  # 2 of 8 s: what was waited before is behind.
    assert second["perf/mfu"] == pytest.approx(0.03)


def test_a_skipped_step_takes_time_and_tokens_but_gives_no_loss(clock: Clock) -> None:
    meter = Meter(flops_per_token=1.0, peak_flops=None)
    step(meter, clock, 1.0, math.nan, num_labels=50, num_tokens=60, wait_seconds=0.0)
    step(meter, clock, 1.0, 5.0, num_labels=2, num_tokens=20, wait_seconds=0.0)
    metrics = meter.metrics()
    assert (metrics["train/loss"], metrics["perf/tokens_per_second"], metrics["perf/step_seconds"]) == (2.5, 40.0, 1.0)
    assert "perf/mfu" not in metrics
    step(meter, clock, 1.0, math.nan, num_labels=50, num_tokens=60, wait_seconds=0.0)
    assert math.isnan(meter.metrics()["train/loss"])


def test_the_loss_of_a_window_goes_on_after_a_checkpoint_and_its_time_does_not(clock: Clock) -> None:
    stopped, resumed = new_meter(), new_meter()
    step(stopped, clock, 5.0, 1.0 / 3.0, num_labels=3, num_tokens=1000, wait_seconds=0.0)
    resumed.restore(json.loads(json.dumps(stopped.to_dict())))
    resumed.start()
    step(resumed, clock, 2.0, 2.0, num_labels=1, num_tokens=10, wait_seconds=0.0)
    metrics = resumed.metrics()
    assert metrics["train/loss"] == pytest.approx((1.0 / 3.0 + 2.0) / 4, rel=1e-7)
    assert metrics["perf/tokens_per_second"] == 5.0


def test_memory_is_the_peak_of_this_process() -> None:
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"))
    assert peak is not None
    assert memory_gib() == pytest.approx(int(peak[1]) / 2**20, rel=0.02)


def test_a_meter_that_returns_to_a_checkpoint_forgets_what_came_after_it(clock: Clock) -> None:
    meter = new_meter()
    step(meter, clock, 5.0, 1.0, num_labels=3, num_tokens=1000, wait_seconds=4.0)
    saved = meter.to_dict()
    meter.add(routed([[3, 1]]), num_labels=4, num_tokens=8, wait_seconds=7.0)
    meter.restore(saved)
    assert meter.to_dict() == saved and not meter.routing.steps
    step(meter, clock, 2.0, 2.0, num_labels=1, num_tokens=10, wait_seconds=0.5)
    metrics = meter.metrics()
    assert metrics["train/loss"] == 3.0 / 4 and metrics["perf/tokens_per_second"] == 5.0
    assert metrics["perf/data_wait_fraction"] == 0.25, "of a new loader"
