"""Warnings about slow ranks, disks and memory: when, once, and with which numbers."""

from __future__ import annotations

import shutil
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from bigtx.train import health
from bigtx.train.health import Growth, Health, Report, Stragglers, disk_warnings, memory_warnings
from bigtx.utils.heartbeat import Heart, Phase

GIB = 2**30


def reports(*times: tuple[float, float]) -> list[Report]:
    """Ranks with these times for data and forward passes."""
    return [Report(f"n{rank}", data, compute) for rank, (data, compute) in enumerate(times)]


def test_a_slow_rank_is_named_after_some_windows() -> None:
    stragglers, slow = Stragglers(), reports((0.0, 0.1), (0.0, 0.1), (0.1, 0.4))
    for _ in range(2):
        assert stragglers.note(slow, 10, 0.5) == ({"perf/slowest_rank": 2.0, "perf/straggler_ratio": 5.0}, [])
    ((notice),) = stragglers.note(slow, 10, 0.5)[1]
    assert notice.facts == {"rank": 2, "host": "n2", "ratio": 5.0, "where": "computing"} and notice.badness == 5.0
    assert notice.text.startswith("rank 2 on n2 is slow: it needs 5.0 times the median") and "0.5 s" in notice.text


def test_a_rank_that_waits_for_data_is_named_so() -> None:
    stragglers = Stragglers()
    notices = [stragglers.note(reports((0.9, 0.1), (0.0, 0.1)), 10, 1.0)[1] for _ in range(3)]
    assert [len(each) for each in notices] == [0, 0, 1] and notices[2][0].facts["where"] == "waiting for data"


@pytest.mark.parametrize(
    ("times", "steps", "step_seconds"),
    [
        ([(0.0, 0.1), (0.0, 0.15)], 100, 0.1),  # 1.5 times, and no more.
        ([(0.0, 0.1), (0.0, 0.3)], 100, 4.1),  # Less than a twentieth of the step.
        ([(0.0, 0.1), (0.0, 0.3)], 3, 0.5),  # 1.8 s in all.
        ([(0.0, 0.5)], 100, 0.1),  # A single rank.
    ],
)
def test_small_delays_are_no_warning(times: list[tuple[float, float]], steps: int, step_seconds: float) -> None:
    stragglers = Stragglers()
    for _ in range(3):
        assert stragglers.note(reports(*times), steps, step_seconds)[1] == []


def test_ranks_that_take_turns_are_no_stragglers() -> None:
    stragglers, first, second = Stragglers(), reports((0.0, 1.0), (0.0, 0.1)), reports((0.0, 0.1), (0.0, 1.0))
    assert not any(stragglers.note(each, 100, 1.0)[1] for each in [first, first, second, second, first, first])
    even = reports((0.0, 0.1), (0.0, 0.1))
    assert not any(stragglers.note(each, 100, 1.0)[1] for each in [second, second, even, second, second])


def test_the_disk_has_space_for_so_many_checkpoints(tmp_path: Path) -> None:
    assert disk_warnings(tmp_path, 20 * GIB, 10 * GIB) == []
    (one,) = disk_warnings(tmp_path, 19 * GIB, 10 * GIB)
    assert "19 GiB are free, and 1 more checkpoint of 10 GiB fits" in one.text and one.facts["fits"] == 1
    (none,) = disk_warnings(tmp_path, 9 * GIB, 10 * GIB)
    assert "no more checkpoint of 10 GiB fits" in none.text and none.badness > 2 * one.badness
    assert disk_warnings(tmp_path, 0, 0)[0].facts["fits"] == 0


def test_of_a_machine_that_says_nothing_all_memory_is_free() -> None:
    unknown = Report("a", 0, 0)
    assert unknown.host_free == unknown.host_total and memory_warnings([unknown]) == []


def test_memory_that_is_nearly_full() -> None:
    full = Report("a", 0, 0, anonymous=60 * GIB, host_free=4 * GIB, host_total=100 * GIB)
    free = replace(full, anonymous=20 * GIB, host_free=5 * GIB)
    assert memory_warnings([free]) == []
    (notice,) = memory_warnings([replace(full, anonymous=9), full, replace(free, host="b")])
    assert notice.text == (
        "the memory of a is nearly full: 4 GiB of 100 GiB are free; its largest rank is 1 with 60 GiB"
    )
    assert (notice.kind, notice.subject, notice.badness) == ("low_memory", "memory a", 25.0)
    gpu = Report("a", 0, 0, device_peak=95 * GIB, device_total=100 * GIB)
    assert memory_warnings([gpu, replace(gpu, device_peak=0, device_total=0)]) == []
    (near,) = memory_warnings([gpu, replace(gpu, device_peak=96 * GIB)])
    assert (near.kind, near.subject, near.badness) == ("low_device_memory", "device 1", 1.0)
    assert near.facts["rank"] == 1 and "at most 96 GiB of 100 GiB were in use" in near.text
    (retried,) = memory_warnings([replace(gpu, retries=7)])
    assert "7 allocations had to collect free memory first" in retried.text and retried.badness == 8.0


def grown(sizes: list[float]) -> list[Any]:
    growth, found = Growth(), []
    for number, size in enumerate(sizes):
        report = Report("a", 0, 0, anonymous=int(size * GIB), host_free=38 * GIB)
        found = growth.note([report], 100 * number)
    return found


def test_memory_that_grows_steadily() -> None:
    (notice,) = grown([10 + 0.2 * number for number in range(20)])
    assert "from 10 GiB to 13.8 GiB in 1,900 steps" in notice.text and "for about 19,000 steps" in notice.text
    assert grown([10 + 0.2 * number for number in range(19)]) == []
    assert grown([10 + 0.1 * number for number in range(20)]) == []  # Less than a fifth.
    assert grown([0.1 + 0.05 * number for number in range(20)]) == []  # Less than 1 GiB.
    assert grown([10 + 0.5 * (number % 19) for number in range(20)]) == []  # It returns to what it was.


class Told:
    def __init__(self) -> None:
        self.messages: list[str] = []
        self.events: list[tuple[int, str, dict[str, Any]]] = []

    def message(self, text: str) -> None:
        self.messages.append(text)

    def event(self, step: int, kind: str, **facts: Any) -> None:
        self.events.append((step, kind, facts))


def test_a_warning_comes_once_and_again_when_it_is_clearly_worse(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heart, told = Heart(bytearray(64), 0), Told()
    monkeypatch.setattr(health, "own_heart", lambda: heart)
    usage = namedtuple("usage", ["free"])
    free = [1500]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(free[0]))
    optimizer = SimpleNamespace(state_kinds=lambda group: ["exp_avg", "exp_avg_sq"])
    engine = SimpleNamespace(
        owned=[SimpleNamespace(numel=50, group=0)], optimizer=optimizer, forward_seconds=lambda: None
    )
    other = Report("b", 0.0, 0.1, checkpoint=400)
    gathered: list[Report] = []

    def gather(own: Report) -> list[Report]:
        gathered.append(own)
        return [own, other]

    watched = Health(cast(Any, SimpleNamespace(rank=0, gather=gather)), cast(Any, engine), tmp_path)
    heart.seconds[Phase.DATA], heart.seconds[Phase.FORWARD], heart.entries[Phase.LOGGING] = 1.0, 3.0, 10
    metrics = watched.look(10, 0.5, cast(Any, told))
    assert (gathered[0].data, gathered[0].compute, gathered[0].checkpoint) == (0.1, 0.3, 600)
    assert gathered[0].anonymous > 2**20 and 0 < gathered[0].host_free <= gathered[0].host_total
    assert metrics["perf/slowest_rank"] == 0.0 and metrics["perf/straggler_ratio"] == pytest.approx(4.0)
    assert metrics["perf/disk_free_gib"] == 1500 / GIB and metrics["perf/host_free_gib"] > 0
    assert [event[:2] for event in told.events] == [(10, "low_disk")] and "1 more checkpoint" in told.messages[0]
    assert told.messages[0].startswith("warning: the disk of ")
    free[0] = 751
    watched.look(20, 0.5, cast(Any, told))
    assert len(told.events) == 1 and gathered[1].data == gathered[1].compute == 0.0
    free[0] = 750
    watched.look(30, 0.5, cast(Any, told))
    assert len(told.events) == 2 and "no more checkpoint" in told.messages[1]
    second = Health(cast(Any, SimpleNamespace(rank=1, gather=gather)), cast(Any, engine), tmp_path)
    assert second.look(10, 0.5, cast(Any, told)) == {} and len(told.events) == 2
