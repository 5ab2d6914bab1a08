"""Metrics of a window of steps."""

from __future__ import annotations

import json
import math

import torch

from bigtx.engine.engine import StepResult
from bigtx.model.experts import Routing, shares_of
from bigtx.train.meter import Meter


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
