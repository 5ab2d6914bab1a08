"""What ranks ask each other when something fails."""

from __future__ import annotations

import os
import time
from types import SimpleNamespace
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


def test_the_rank_that_speaks_gives_the_others_time(store: HashStore, monkeypatch: pytest.MonkeyPatch) -> None:
    late = SimpleNamespace(sleep=lambda seconds: store.set("bigtx/waited/2", ""), monotonic=time.monotonic)
    monkeypatch.setattr(ranks, "time", late)
    assert some_ranks(4)[1].silent() == [0, 3]


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
@pytest.mark.parametrize("binds", [True, False])
def test_ranks_part_the_cores_that_they_share(
    monkeypatch: pytest.MonkeyPatch, cores: list[int], expected: list[set[int]], binds: bool
) -> None:
    """Even cores are on one half of the machine, odd ones on the other. With GPUs only the threads are divided."""
    three, threads = some_ranks(3), list[int]()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(ranks.torch, "set_num_threads", threads.append)
    for rank, one in enumerate(three):
        kept = set(cores)
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(cores))
        monkeypatch.setattr(os, "sched_setaffinity", lambda pid, own, kept=kept: (kept.clear(), kept.update(own)))
        monkeypatch.setattr(ranks, "node_of_core", lambda core: core % 2)
        monkeypatch.setattr(one, "gather", lambda value: [value] * 3)
        one._share_cores(binds=binds)
        assert kept == (expected[rank] if binds else set(cores))
    assert threads == [max(1, len(cores) // 3)] * 3
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    three[0]._share_cores(binds=binds)
    assert len(threads) == 3, "the user's value has precedence"


def test_cores_that_a_launcher_has_parted_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rank was given other ones, and the ranks of another host are no peers: a thread for each own core."""
    kept, threads = list[Any](), list[int]()
    first, _, third = some_ranks(3)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(ranks.torch, "set_num_threads", threads.append)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    monkeypatch.setattr(os, "sched_setaffinity", lambda pid, own: kept.append(set(own)))
    monkeypatch.setattr(ranks, "node_of_core", lambda core: 0)
    monkeypatch.setattr(first, "gather", lambda value: [value, (value[0], [2, 3]), ("elsewhere", [0, 1])])
    first._share_cores(binds=True)
    third.rank, third.world_size = 0, 1
    monkeypatch.setattr(third, "gather", lambda value: [value])
    third._share_cores(binds=True)
    assert kept == [] and threads == [2, 2]


def test_one_rank_of_each_of_the_first_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    six = some_ranks(6)
    for one in six:
        one.places = [(host, 100, None) for host in ("b", "b", "a", "b", "c", "a")]
    assert [one.rank for one in six if one.is_first_of_host(among=2)] == [0, 2]
    assert [one.rank for one in six if one.is_first_of_host(among=9)] == [0, 2, 4]
