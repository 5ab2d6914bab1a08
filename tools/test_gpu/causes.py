"""Where the time of a step goes, by torch's profiler."""

from __future__ import annotations

import collections
import re
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from test_gpu import timing

KINDS = (
    ("attention", r"flash|fmha|sdpa|attention|flex"),
    ("products", r"gemm|nvjet|cutlass|xmma|cublas|matmul|addmm|::mm"),
    ("communication", r"nccl"),
    ("update", r"adam|multi_tensor|foreach"),
    ("fused", r"triton"),
    ("copies", r"memcpy|memset|copy|fill"),
)
"""Kinds of kernels and the words in their names by which they are known; the first one that fits counts."""

HOST_CALLS = r"(cuda|cu)(Launch|Stream|Device|Event)\w*(Kernel|Synchronize)\w*|cudaMemcpyAsync"


def causes(step: Callable[[], Any]) -> dict[str, Any]:
    """Profile one step: how much of it the GPU is busy, with which kinds of kernels, and what the host calls."""
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as profiled:
        timing.wait()
        began = time.perf_counter()
        step()
        timing.wait()
        wall = (time.perf_counter() - began) * 1e6
    kernels: collections.Counter[str] = collections.Counter()
    calls: collections.Counter[str] = collections.Counter()
    spans = []
    for event in profiled.events() or ():
        if str(event.device_type).endswith("CUDA"):
            spans.append((event.time_range.start, event.time_range.end))
            kernels[event.name] += event.time_range.elapsed_us()
        elif re.fullmatch(HOST_CALLS, event.name):
            calls[event.name] += 1
    kinds: collections.Counter[str] = collections.Counter()
    for name, spent in kernels.items():
        kinds[kind_of(name)] += spent
    busy = union(spans)
    return {
        "busy": busy / wall,
        "shares": {kind: spent / max(busy, 1e-9) for kind, spent in kinds.most_common()},
        "host_calls": dict(calls),
        "longest_kernels_ms": {name[:90]: spent / 1e3 for name, spent in kernels.most_common(12)},
    }


def kind_of(kernel: str) -> str:
    """Return the kind of a kernel, by its name."""
    return next((kind for kind, words in KINDS if re.search(words, kernel, re.IGNORECASE)), "other")


def union(spans: list[tuple[float, float]]) -> float:
    """Return the time that is covered by spans, which may overlap."""
    covered, end = 0.0, float("-inf")
    for start, stop in sorted(spans):
        covered += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return covered
