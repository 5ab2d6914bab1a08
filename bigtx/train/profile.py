"""A profiler trace and a memory snapshot of one step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile


@contextmanager
def profiled(run_dir: Path, *, enabled: bool, rank: int) -> Iterator[None]:
    """Write `profile/rank-00000.trace.json` (open it in Perfetto) and, on CUDA, `rank-00000.memory.pickle`
    (open it at pytorch.org/memory_viz) of what happens inside.
    """
    if not enabled:
        yield
        return
    folder = run_dir / "profile"
    folder.mkdir(parents=True, exist_ok=True)
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.memory._record_memory_history(max_entries=200_000)
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda, profile_memory=True) as trace:
        yield
    trace.export_chrome_trace(str(folder / f"rank-{rank:05d}.trace.json"))
    if cuda:
        torch.cuda.memory._dump_snapshot(str(folder / f"rank-{rank:05d}.memory.pickle"))
        torch.cuda.memory._record_memory_history(enabled=None)
