"""Each rank takes the accelerator of its local rank."""

from __future__ import annotations

from types import SimpleNamespace

import deepspeed
import pytest

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
