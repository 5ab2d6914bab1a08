"""Each rank takes the accelerator of its local rank, or cores of its own."""

from __future__ import annotations

import os
import socket
from types import SimpleNamespace
from typing import Any

import deepspeed
import pytest
import torch
from engine.ranks import run_ranks

from bigtx.engine import builds, ranks
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


@pytest.mark.parametrize(
    ("hosts", "note"),
    [
        (["a"], "1 of 4 GPUs of a is used"),
        (["a", "a", "b"], "2 of 4 GPUs of a are used"),
        (["a", "a", "a", "a"], None),
    ],
)
def test_gpus_that_are_not_used_are_mentioned(
    monkeypatch: pytest.MonkeyPatch, hosts: list[str], note: str | None
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(socket, "gethostname", lambda: "a")
    some = object.__new__(ranks.Ranks)
    answers = iter([[(host, 4) for host in hosts]])
    monkeypatch.setattr(some, "gather", lambda value: next(answers))
    found = some.notes_on_devices()
    assert len(found) == len(set(hosts)) * (note is not None)
    assert note is None or note in found[0]


def test_the_only_device_that_is_shown_is_the_own_one(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    accelerator = SimpleNamespace(device_name=lambda: "cuda", device_count=lambda: 1, set_device=taken.append)
    monkeypatch.setattr(deepspeed, "get_accelerator", lambda: accelerator)
    monkeypatch.setenv("LOCAL_RANK", "3")
    ranks.use_own_device()
    assert taken == [0] and os.environ["LOCAL_RANK"] == "0"


def test_ranks_with_the_same_gpu_are_named() -> None:
    assert ranks.shared_gpus([("a", "GPU-1"), ("a", "GPU-2"), ("b", "GPU-3")]) is None
    assert ranks.shared_gpus([("a", None), ("a", None)]) is None
    problem = ranks.shared_gpus([("a", "GPU-1"), ("b", "GPU-3"), ("b", "GPU-2"), ("b", "GPU-3")])
    assert problem is not None and problem.startswith("ranks 1, 3 on b have the same GPU (GPU-3)")


@pytest.mark.parametrize("address", ["127.0.0.1", "no-such-host.invalid"])
def test_a_place_to_meet_that_does_not_answer_is_named(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))  # It does not listen.
        port = held.getsockname()[1]
        for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", address), ("MASTER_PORT", str(port))):
            monkeypatch.setenv(name, value)
        with pytest.raises(LaunchError, match=rf"rank 1 on .* does not reach rank 0 at {address}:{port}: .+"):
            ranks.reach_first(0.3)
    assert ranks.MEET_SECONDS < 60


def test_a_rank_that_is_early_meets_the_first_one_within_half_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0

    def connect(*given: Any, timeout: float) -> Any:
        if now < 107.7:
            raise ConnectionRefusedError
        return SimpleNamespace(close=lambda: None)

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds

    for name, value in (("RANK", "1"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(ranks, "time", SimpleNamespace(monotonic=lambda: now, sleep=sleep))
    monkeypatch.setattr(socket, "create_connection", connect)
    ranks.reach_first(60.0)
    assert 107.7 <= now < 108.2


def test_ranks_wait_for_the_first_one_before_they_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []

    def reach(seconds: float) -> None:
        told.append(seconds)
        raise LaunchError("rank 0 does not answer")

    for name in ("set_environment_of_single_process", "use_own_device", "wait_in_every_group"):
        monkeypatch.setattr(ranks, name, lambda *given: None)
    monkeypatch.setattr(builds, "leave_out_unused", lambda: None)
    monkeypatch.setattr(builds, "take_turns", lambda: None)
    monkeypatch.setattr(deepspeed, "init_distributed", lambda **given: told.append("meet"))
    monkeypatch.setattr(ranks, "reach_first", reach)
    with pytest.raises(LaunchError, match="rank 0 does not answer"):
        ranks.Ranks(timeout_seconds=1.0)
    assert told == [ranks.MEET_SECONDS]


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What two ranks say of themselves."""
    stages = [{"stage": stage} for stage in range(4)]
    scenarios = {"cores": ["cores", {}], "agree": ["agree", {}], "time-outs": ["time_outs", {"cases": stages}]}
    return run_ranks(tmp_path_factory.mktemp("ranks"), 2, "several", scenarios=scenarios)


@pytest.mark.dist
def test_the_time_out_reaches_every_process_group(answers: dict[str, Any]) -> None:
    found = answers["time-outs"]
    assert len(found) > 2, "DeepSpeed made no group of its own: the test tests nothing"
    assert set(found) == {300.0}


@pytest.mark.dist
def test_ranks_agree(answers: dict[str, Any]) -> None:
    assert answers["agree"] == {
        "begun before": [[1, 14, 10]] * 2,
        "sums": [[3, 20, 2**41]] * 2,
        "gathered": [[{"rank": 0}, {"rank": 1}]] * 2,
        "first": ["of 0"] * 2,
        "on first": ["done by 0", None],
    }


@pytest.mark.dist
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core has no parts")
def test_own_cores(answers: dict[str, Any]) -> None:
    first, second = answers["cores"]
    assert first and second and not set(first) & set(second)
    assert set(first) | set(second) <= os.sched_getaffinity(0)
