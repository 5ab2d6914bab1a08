"""Metrics of the steps between two log lines."""

from __future__ import annotations

import resource
import time
from typing import Any

import torch

from bigtx.engine.engine import StepResult
from bigtx.model.experts import Routing


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
            "train/loss": float(self.loss_sum) / self.labels if self.labels else float("nan"),
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
        """Continue a window that `to_dict` gave."""
        self.labels = saved["labels"]
        self.loss_sum = torch.tensor(float.fromhex(saved["loss_sum"]), dtype=torch.float64)
        if "routing" in saved:
            self.routing.restore(saved["routing"])


def memory_gib() -> float:
    """Return the peak memory of this process: allocated on the accelerator, or resident without one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
