"""What ranks ask each other when something fails."""

from __future__ import annotations

import os
import time
from typing import Any

import pytest
from torch._C._distributed_c10d import HashStore

from bigtx.engine import ranks
from bigtx.engine.ranks import Ranks
from bigtx.utils.errors import BigtxError


def some_ranks(count: int) -> list[Ranks]:
    """Ranks that share nothing but rank 0's store; two on each machine."""
    made = [object.__new__(Ranks) for _ in range(count)]
    for rank, one in enumerate(made):
        one.rank, one.world_size, one.local_rank = rank, count, rank % 2
    return made


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> HashStore:
    held = HashStore()
    monkeypatch.setattr(ranks.dist.distributed_c10d, "_get_default_store", lambda: held)
    monkeypatch.setattr(ranks, "GATHER_SECONDS", 0.0)
    return held


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
def test_one_rank_speaks_for_all_whichever_fails_first(store: HashStore, order: tuple[int, ...]) -> None:
    three = some_ranks(3)
    assert [three[rank].is_first_to_fail() for rank in order] == [True, False, False]
    assert not three[order[0]].is_first_to_fail()


def test_the_ranks_that_wait_find_who_does_not(store: HashStore) -> None:
    five = some_ranks(5)
    for rank in (0, 3):
        store.set(f"bigtx/waited/{rank}", "")
    assert five[1].silent() == [2, 4]
    assert five[2].silent() is None  # One rank has spoken of it.


@pytest.mark.parametrize("is_stopped", [True, False])
def test_without_rank_0_one_rank_of_each_machine_speaks(monkeypatch: pytest.MonkeyPatch, is_stopped: bool) -> None:
    """Its store never answers where rank 0 is stopped, and refuses where it is gone."""

    def no_store() -> Any:
        if is_stopped:
            time.sleep(0.5)
        raise RuntimeError("Broken pipe")

    monkeypatch.setattr(ranks.dist.distributed_c10d, "_get_default_store", no_store)
    for name in ("STORE_SECONDS", "GATHER_SECONDS"):
        monkeypatch.setattr(ranks, name, 0.01)
    one_to_five = some_ranks(6)[1:]
    assert [rank.is_first_to_fail() for rank in one_to_five] == [True, True, False, True, False]
    assert [rank.silent() for rank in one_to_five] == [[0], [0], None, [0], None]


def test_what_rank_0_does_is_known_to_all(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = some_ranks(2)
    sent: list[Any] = []
    monkeypatch.setattr(first, "from_first", lambda value: sent.append(value) or value)
    monkeypatch.setattr(second, "from_first", lambda value: sent.pop(0))

    def fail() -> None:
        raise BigtxError("no")

    assert first.on_first(lambda: 5) == 5 and second.on_first(fail) is None
    with pytest.raises(BigtxError, match="no"):
        first.on_first(fail)
    with pytest.raises(BigtxError, match="no"):
        second.on_first(lambda: 5)


@pytest.mark.parametrize(
    ("cores", "expected"),
    [
        ([0, 1, 2, 3, 4, 5], [{0, 2}, {4, 1}, {3, 5}]),
        ([0, 1, 2, 3], [{0}, {2}, {1}]),
        ([0, 1], [{0, 1}] * 3),  # Fewer than ranks: all keep all.
    ],
)
def test_ranks_part_the_cores_that_they_share(
    monkeypatch: pytest.MonkeyPatch, cores: list[int], expected: list[set[int]]
) -> None:
    """Even cores are on one half of the machine, odd ones on the other."""
    three = some_ranks(3)
    for rank, one in enumerate(three):
        kept = set(cores)
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(cores))
        monkeypatch.setattr(os, "sched_setaffinity", lambda pid, own, kept=kept: (kept.clear(), kept.update(own)))
        monkeypatch.setattr(ranks, "node_of_core", lambda core: core % 2)
        monkeypatch.setattr(one, "gather", lambda value: [value] * 3)
        one._keep_to_own_cores()
        assert kept == expected[rank]


def test_cores_that_a_launcher_has_parted_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rank was given other ones, and the ranks of another host are no peers."""
    kept: list[Any] = []
    first, _, third = some_ranks(3)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    monkeypatch.setattr(os, "sched_setaffinity", lambda pid, own: kept.append(set(own)))
    monkeypatch.setattr(ranks, "node_of_core", lambda core: 0)
    monkeypatch.setattr(first, "gather", lambda value: [value, (value[0], [2, 3]), ("elsewhere", [0, 1])])
    first._keep_to_own_cores()
    assert kept == [{0, 1}]
    third.world_size = 1
    third._keep_to_own_cores()
    assert kept == [{0, 1}]


@pytest.mark.parametrize(("local", "threads"), [({"LOCAL_SIZE": "4"}, 2), ({"LOCAL_WORLD_SIZE": "16"}, 1), ({}, 8)])
def test_threads_are_divided_among_the_ranks_of_a_machine(
    monkeypatch: pytest.MonkeyPatch, local: dict[str, str], threads: int
) -> None:
    taken: list[int] = []
    for name in ("OMP_NUM_THREADS", "LOCAL_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in local.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.setattr(ranks.torch, "set_num_threads", taken.append)
    ranks.use_share_of_cores()
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    ranks.use_share_of_cores()
    assert taken == [threads]
