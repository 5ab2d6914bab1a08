"""Each rank takes the accelerator of its local rank, or cores of its own."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import deepspeed
import pytest
from engine.ranks import run_ranks

from bigtx.engine import ranks
from bigtx.utils.errors import LaunchError


@pytest.mark.parametrize("local_rank", ["0", "1", "2"])
def test_own_device(monkeypatch: pytest.MonkeyPatch, local_rank: str) -> None:
    taken: list[int] = []
    accelerator = SimpleNamespace(device_name=lambda: "cuda", device_count=lambda: 2, set_device=taken.append)
    monkeypatch.setattr(deepspeed, "get_accelerator", lambda: accelerator)
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    if local_rank == "2":
        with pytest.raises(LaunchError, match=r"local rank 2 .* shows 2"):
            ranks.use_own_device()
    else:
        ranks.use_own_device()
        assert taken == [int(local_rank)]


@pytest.mark.dist
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core has no parts")
def test_own_cores(tmp_path: Path) -> None:
    first, second = run_ranks(tmp_path, 2, "cores")
    assert first and second and not set(first) & set(second)
    assert set(first) | set(second) <= os.sched_getaffinity(0)
