"""Check that the machines of a run have the same code, packages and settings, and find slow ones.

Machines that differ would train something other than the user asked for, or wait for each other in a collective that
only some of them reach. They exchange these facts when they connect.

Slow machines are found by all-reduces between pairs of machines:

    round 1   n1–n2   n3–n4
    round 2   n1–n3   n2–n4
    round 3   n1–n4   n2–n3

A slow machine makes each of its links slow. A sound machine has at least one fast link, to another sound machine, so
the best of a machine's links shows how fast the machine is. Two machines have one link, which does not show which of
them is slow.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import secrets
import statistics
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bigtx.utils import hardware
from bigtx.utils.units import format_names

CLOCK_SECONDS = 5.0
"""A clock that differs by more causes a warning. bigtx itself does not depend on clocks, since steps are numbered."""
MOST_SHOWN = 6
"""The most differences, or machines with the same value, that a message shows."""
_LONGEST_VALUE = 60


def facts_of_machine() -> dict[str, str]:
    """Return the facts that must be equal on all machines: versions, commit and the code itself. Does not import torch.

    Returns:
        The facts by name. A missing package has the value `none`. A commit that cannot be read is left out, since the
        hash of the code shows the same differences.
    """
    versions = dict.fromkeys(hardware.PACKAGES, "none") | hardware.packages()
    commit = {"commit": found} if (found := hardware.git_commit()) else {}
    return {**versions, "Python": platform.python_version(), **commit, "code": _hash_of_code()}


def facts_of_settings(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Return the settings of a config as facts, by their dotted keys."""
    facts: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            facts |= facts_of_settings(value, f"{prefix}{key}.")
        else:
            facts[prefix + key] = _shortened(str(value))
    return facts


def differences(facts: Mapping[int, Mapping[str, str]]) -> dict[str, dict[str, list[int]]]:
    """Return the facts that are not equal on all machines that have them.

    Args:
        facts: the facts of each machine, by the machine's number.

    Returns:
        For each such fact its values, each with the numbers of the machines that have it; the rarest value is first.
    """
    found: dict[str, dict[str, list[int]]] = {}
    for name in dict.fromkeys(name for each in facts.values() for name in each):
        nodes = defaultdict(list)
        for node, own in sorted(facts.items()):
            if name in own:
                nodes[own[name]].append(node)
        if len(nodes) > 1:
            found[name] = dict(sorted(nodes.items(), key=lambda item: len(item[1])))
    return found


def why_different(hosts: Mapping[int, str], facts: Mapping[int, Mapping[str, str]]) -> str | None:
    """Return a message about the facts that differ between machines; None where all are equal.

    Args:
        hosts: the machines' names, by their numbers.
        facts: the facts of each machine, by its number.
    """
    found = differences(facts)
    if not found:
        return None
    if "commit" in found:
        found.pop("code", None)  # A hash says no more than the commit.
    parts = [
        f"{name} is " + " and ".join(f"{value} on {named(hosts, nodes)}" for value, nodes in values.items())
        for name, values in list(found.items())[:MOST_SHOWN]
    ]
    rest = f"; {len(found) - MOST_SHOWN} more differ" if len(found) > MOST_SHOWN else ""
    return (
        f"the machines of this run differ: {'; '.join(parts)}{rest}. Use the same clone, environment and config on all "
        "of them, preferably on a file system that all of them see"
    )


def why_wrong_clock(hosts: Mapping[int, str], offsets: Mapping[int, float]) -> str | None:
    """Return a warning about clocks that differ from that of the first machine; None where all are close to it.

    Args:
        hosts: the machines' names, by their numbers.
        offsets: how far each machine's clock is ahead, in seconds.
    """
    wrong = {node: offset for node, offset in offsets.items() if abs(offset) > CLOCK_SECONDS}
    if not wrong:
        return None
    shown = [f"{named(hosts, [node])} by {offset:+,.0f} s" for node, offset in list(wrong.items())[:MOST_SHOWN]]
    rest = f" and {len(wrong) - MOST_SHOWN} more machines" if len(wrong) > MOST_SHOWN else ""
    return (
        f"the clock differs from that of {hosts[0]} on {', '.join(shown)}{rest}: the times in logs and of files will "
        "not match, and W&B may refuse what such a machine sends; synchronize the clocks (NTP)"
    )


def named(hosts: Mapping[int, str], nodes: Iterable[int]) -> str:
    """Return the names and numbers of machines for a message.

    >>> named({0: "a", 1: "b"}, [1])
    'b (node 1)'
    """
    names = [f"{hosts[node]} (node {node})" if node in hosts else f"node {node}" for node in nodes]
    return format_names(names, MOST_SHOWN)


def _hash_of_code() -> str:
    """Return a hash of all modules of bigtx, which also shows changes in an installed copy or in a clone."""
    root, total = Path(hardware.__file__).resolve().parents[1], hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        content = path.read_bytes()
        total.update(f"{path.relative_to(root)} {len(content)}\n".encode())
        total.update(content)
    return total.hexdigest()[:12]


def _shortened(text: str) -> str:
    """Return a value; a long one is cut and ends with a hash, so that two long values stay different."""
    if len(text) <= _LONGEST_VALUE:
        return text
    return f"{text[: _LONGEST_VALUE - 16]}... ({hashlib.sha256(text.encode()).hexdigest()[:8]})"


SEEN_SECONDS = 10.0
"""How long a machine looks for the file: a network file system may show a new file only after some seconds."""
_RETRY_SECONDS = 0.1


def nearest_folder(path: Path) -> Path:
    """Return a folder, or the nearest existing one above it."""
    path = path.absolute()
    return next((each for each in (path, *path.parents) if each.is_dir()), path)


@contextlib.contextmanager
def file_for_all(folder: Path) -> Iterator[Path | None]:
    """Create a file in a folder, or in the nearest existing one above it, until the context is closed.

    Its name is new, so no machine can have cached that the file is missing.

    Yields:
        The absolute path; None where the file cannot be written, which the run itself will report.
    """
    path = nearest_folder(folder) / f".bigtx-start-{secrets.token_hex(8)}"
    try:
        path.touch(exist_ok=False)
    except OSError:
        yield None
        return
    try:
        yield path
    finally:
        with contextlib.suppress(OSError):
            path.unlink()


def sees(path: Path, seconds: float = SEEN_SECONDS) -> bool:
    """Return whether this machine sees a file that another one has just written, within some seconds."""
    deadline = time.monotonic() + seconds
    while True:
        with contextlib.suppress(OSError):
            # NFS asks the server again for a folder's contents when the folder is opened.
            os.close(os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY))
        if path.exists():
            return True
        if time.monotonic() >= deadline:
            return False
        time.sleep(_RETRY_SECONDS)


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
