"""Which machine is slow, by all-reduces between pairs of machines.

    round 1   n1–n2   n3–n4
    round 2   n1–n3   n2–n4
    round 3   n1–n4   n2–n3

A slow machine makes each of its links slow. A sound machine has at least one fast link, to another sound machine, so
the best of its links tells how fast a machine is. Two machines have one link, which does not tell whose fault it is.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass

MOST_ROUNDS = 3
"""Links of each machine that are measured: a slow machine is not named because one other is slow, or busy."""
SLOW_FRACTION = 0.5
"""Of the median of all machines; a network whose topology is sound does not differ so much between pairs."""

Pair = tuple[int, int]
"""The places of two machines, the lower one first."""


@dataclass(frozen=True)
class Verdict:
    """What the links tell.

    Attributes:
        silent: machines of which no link gave an answer.
        slow: machines of which all links are slow.
        either: two machines whose link is slow or gives no answer, by the fault of one of them or of both.
        median: of the machines' speeds, in bytes per second.
    """

    silent: tuple[int, ...]
    slow: tuple[int, ...]
    either: tuple[int, ...]
    median: float

    @property
    def bad(self) -> list[int]:
        """All machines that are better left out."""
        return sorted({*self.silent, *self.slow, *self.either})


def rounds(num_nodes: int) -> list[list[Pair]]:
    """Pairs of machines for a few rounds, all of a round at once: each machine has another partner in each round.

    The circle method of round-robin tournaments. Of an odd number of machines, one rests in each round.
    """
    count = num_nodes + num_nodes % 2
    found = []
    for turn in range(min(MOST_ROUNDS, count - 1)):
        circle = [(turn + place) % (count - 1) for place in range(count - 1)]
        pairs = [(circle[0], count - 1), *((circle[place], circle[-place]) for place in range(1, count // 2))]
        found.append(sorted((min(pair), max(pair)) for pair in pairs if max(pair) < num_nodes))
    return found


def judge(links: Mapping[Pair, float], floor: float = 0.0) -> Verdict:
    """Name the machines that are slow.

    Args:
        links: bytes per second of each pair that was measured; 0 where it gave no answer.
        floor: what is slow whatever the others are, in bytes per second.
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
    """The best link of each machine."""
    nodes = sorted({node for pair in links for node in pair})
    return {node: max(speed for pair, speed in links.items() if node in pair) for node in nodes}
