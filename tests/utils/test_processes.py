from __future__ import annotations

import os

import pytest

from bigtx.utils import processes

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "CROSS_RANK", "LOCAL_SIZE", "TORCHELASTIC_RUN_ID")


@pytest.mark.parametrize(
    ("environment", "launcher"),
    [
        ({}, "python"),
        ({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "CROSS_RANK": "1", "LOCAL_SIZE": "2"}, "deepspeed"),
        ({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "TORCHELASTIC_RUN_ID": "x"}, "torchrun"),
        ({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, "a launcher that set RANK and WORLD_SIZE"),
    ],
)
def test_place(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], launcher: str) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    place = (processes.rank(), processes.world_size(), processes.local_rank())
    assert place == ((3, 8, 1) if environment else (0, 1, 0))
    assert processes.launcher_name() == launcher


def test_waiting_threads_sleep_soon_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOMP_SPINCOUNT", "5")
    processes.share_cores()
    assert os.environ["GOMP_SPINCOUNT"] == "5"
    monkeypatch.delenv("GOMP_SPINCOUNT")
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    processes.share_cores()
    assert "GOMP_SPINCOUNT" not in os.environ
    monkeypatch.delenv("OMP_WAIT_POLICY")
    monkeypatch.setattr(os, "environ", environment := dict(os.environ))
    processes.share_cores()
    assert environment["GOMP_SPINCOUNT"] == "1000"
