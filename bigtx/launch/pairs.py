"""Find slow machines, by all-reduces between pairs of machines.

    round 1   n1–n2   n3–n4
    round 2   n1–n3   n2–n4
    round 3   n1–n4   n2–n3

A slow machine makes each of its links slow. A sound machine has at least one fast link, to another sound machine, so
the best of a machine's links shows how fast the machine is. Two machines have one link, which does not show which of
them is slow.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass

MOST_ROUNDS = 3
"""Links of each machine that are measured. Several are, so that one slow or busy partner does not count against it."""
SLOW_FRACTION = 0.5
"""A machine is slow below this fraction of the median. In a sound network the pairs differ by less."""

Pair = tuple[int, int]
"""The numbers of two machines, the lower one first."""


@dataclass(frozen=True)
class Verdict:
    """The result of measuring the links.

    Attributes:
        silent: machines none of whose links gave an answer.
        slow: machines whose links are all slow.
        either: two machines whose link is slow or gives no answer; one of them or both are the cause.
        median: the median of the machines' speeds, in bytes per second.
    """

    silent: tuple[int, ...]
    slow: tuple[int, ...]
    either: tuple[int, ...]
    median: float

    @property
    def bad(self) -> list[int]:
        """Return all machines to exclude."""
        return sorted({*self.silent, *self.slow, *self.either})


def rounds(num_nodes: int) -> list[list[Pair]]:
    """Return pairs of machines for a few rounds. Each machine has another partner in each round.

    The pairs of a round are measured at the same time. They follow the circle method of round-robin tournaments; of an
    odd number of machines, one is idle in each round.
    """
    count = num_nodes + num_nodes % 2
    found = []
    for turn in range(min(MOST_ROUNDS, count - 1)):
        circle = [(turn + place) % (count - 1) for place in range(count - 1)]
        pairs = [(circle[0], count - 1), *((circle[place], circle[-place]) for place in range(1, count // 2))]
        found.append(sorted((min(pair), max(pair)) for pair in pairs if max(pair) < num_nodes))
    return found


def judge(links: Mapping[Pair, float], floor: float = 0.0) -> Verdict:
    """Decide which machines are slow or do not answer.

    Args:
        links: bytes per second of each pair that was measured; 0 where it gave no answer.
        floor: the lowest sufficient speed in bytes per second, independent of the other machines.
    """
    speeds = speeds_of(links)
    median = statistics.median(speeds.values())
    least = max(floor, SLOW_FRACTION * median)
    low = [node for node, speed in speeds.items() if speed < least or speed == 0]
    if len(speeds) == 2:
        return Verdict((), (), tuple(low), median)
    silent = tuple(node for node in low if speeds[node] == 0)
    return Verdict(silent, tuple(node for node in low if speeds[node] > 0), (), median)


def speeds_of(links: Mapping[Pair, float]) -> dict[int, float]:
    """Return the speed of each machine's best link, in bytes per second."""
    nodes = sorted({node for pair in links for node in pair})
    return {node: max(speed for pair, speed in links.items() if node in pair) for node in nodes}
