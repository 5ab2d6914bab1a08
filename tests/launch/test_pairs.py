"""The arithmetic that names a slow machine."""

from __future__ import annotations

import random

import pytest

from bigtx.launch.consistency import MOST_ROUNDS, judge, rounds


@pytest.mark.parametrize("count", [2, 3, 4, 5, 6, 7, 8, 31, 128])
def test_each_machine_meets_another_one_in_each_round(count: int) -> None:
    found = rounds(count)
    assert len(found) == min(MOST_ROUNDS, count - 1 + count % 2)
    pairs = [pair for each in found for pair in each]
    assert len(set(pairs)) == len(pairs) and all(0 <= low < high < count for low, high in pairs)
    for each in found:
        nodes = [node for pair in each for node in pair]
        assert len(set(nodes)) == len(nodes) == count - count % 2


def measured(count: int, slow: set[int], speed: float = 1e9, slow_speed: float = 1e8) -> dict[tuple[int, int], float]:
    """Links of which those of slow machines are slow, and the others as unlike as they are in practice."""
    generator = random.Random(count)
    pairs = [pair for each in rounds(count) for pair in each]
    return {pair: (slow_speed if slow & {*pair} else speed) * generator.uniform(0.8, 1.2) for pair in pairs}


@pytest.mark.parametrize("count", [3, 4, 5, 8, 128])
@pytest.mark.parametrize("slow", [0, 1, 2])
def test_a_slow_machine_is_named_and_its_partners_are_not(count: int, slow: int) -> None:
    verdict = judge(measured(count, {slow}))
    assert (verdict.slow, verdict.silent, verdict.either) == ((slow,), (), ()) and verdict.bad == [slow]


@pytest.mark.parametrize("count", [2, 3, 4, 128])
def test_equal_machines_are_all_well(count: int) -> None:
    assert judge(measured(count, set())).bad == []


def test_several_slow_machines_are_named() -> None:
    assert judge(measured(64, {3, 17, 40})).slow == (3, 17, 40)


def test_a_machine_without_an_answer_is_not_called_slow() -> None:
    verdict = judge(measured(5, {4}, slow_speed=0))
    assert (verdict.silent, verdict.slow) == ((4,), ())


def test_of_two_machines_nobody_can_tell_which_is_slow() -> None:
    assert judge({(0, 1): 1e6}).bad == []
    verdict = judge({(0, 1): 1e6}, floor=1e8)
    assert (verdict.either, verdict.slow) == ((0, 1), ())
    assert judge({(0, 1): 0.0}).either == (0, 1)


def test_what_is_slow_without_comparison() -> None:
    links = measured(4, set())
    assert judge(links, floor=1e8).bad == [] and judge(links, floor=1e10).slow == (0, 1, 2, 3)
