"""The time of a call on the device."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch


def device() -> torch.device:
    """Return the device that is checked: the GPU, or in a dry run the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def wait() -> None:
    """Wait until the device has done all that it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def milliseconds(call: Callable[[], Any], *, rounds: int = 10, warm: int = 3) -> float:
    """Return the median time of a call.

    Args:
        call: work for the device.
        rounds: how often the call is measured.
        warm: how often it is made before, because first calls compile and allocate.
    """
    times = []
    for number in range(warm + rounds):
        wait()
        began = time.perf_counter()
        call()
        wait()
        if number >= warm:
            times.append(time.perf_counter() - began)
    return statistics.median(times) * 1e3
