from __future__ import annotations

import os

import pytest

from bigtx.utils import processes

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "CROSS_RANK", "LOCAL_SIZE", "TORCHELASTIC_RUN_ID", "SLURM_PROCID")


@pytest.mark.parametrize(
    ("environment", "launcher"),
    [
        ({}, None),
        ({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "CROSS_RANK": "1", "LOCAL_SIZE": "2"}, "deepspeed"),
        ({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "TORCHELASTIC_RUN_ID": "x"}, "torchrun"),
        ({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "SLURM_PROCID": "3", "SLURM_STEP_ID": "0"}, "srun"),
        ({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, "a launcher that set RANK and WORLD_SIZE"),
    ],
)
def test_place(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], launcher: str | None) -> None:
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


@pytest.mark.parametrize("name", [None, "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_segments_are_extended_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch, name: str | None) -> None:
    environment = {} if name is None else {name: "backend:native"}
    monkeypatch.setattr(os, "environ", environment)
    processes.extend_segments()
    assert environment == ({name: "backend:native"} if name else {"PYTORCH_ALLOC_CONF": "expandable_segments:True"})


WHOLE = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({}, None),
        (WHOLE, None),
        ({"WORLD_SIZE": "1"}, None),
        (
            {"RANK": "3"},
            "holds RANK=3, which a launcher sets, but not WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT",
        ),
        ({"WORLD_SIZE": "4"}, "holds WORLD_SIZE=4, which a launcher sets, but not RANK"),
        ({"RANK": "0", "WORLD_SIZE": "1"}, "but not LOCAL_RANK, MASTER_ADDR, MASTER_PORT"),
        (WHOLE | {"RANK": "two"}, "RANK=two, which is not a number"),
        (WHOLE | {"RANK": "2"}, "ranks go from 0 to 1"),
    ],
)
def test_half_an_environment_of_a_launcher_is_refused(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], words: str | None
) -> None:
    for name in (*VARIABLES, "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    problem = processes.launcher_problem()
    assert problem is None if words is None else problem is not None and words in problem and "unset" in problem
    if words and environment.keys() != WHOLE.keys():
        assert processes.rank() == 0


def test_a_world_size_alone_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert (processes.world_size(), processes.launcher_name()) == (1, None)
