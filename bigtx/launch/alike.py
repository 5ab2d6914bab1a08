"""Whether the machines of a run are alike: the same code, packages and settings, which each says when they meet.

Machines that differ here train something that nobody asked for, or wait for each other in a collective that only some
of them reach.
"""

from __future__ import annotations

import hashlib
import platform
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from bigtx.utils import hardware

CLOCK_SECONDS = 5.0
"""A clock that differs by more is worth a warning; nothing in bigtx depends on it, since steps are numbered."""
MOST_SHOWN = 6
"""Differences, or machines with the same value, that a message shows."""
_LONGEST_VALUE = 60


def facts_of_machine() -> dict[str, str]:
    """What must be equal on all machines: versions, commit and the code itself. Imports no torch.

    Returns:
        By name. A package that is missing has the value `none`; a commit that cannot be read is left out, since the
        sum over the code says the same.
    """
    versions = dict.fromkeys(hardware.PACKAGES, "none") | hardware.packages()
    commit = {"commit": found} if (found := hardware.git_commit()) else {}
    return {**versions, "Python": platform.python_version(), **commit, "code": _sum_of_code()}


def facts_of_settings(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """A config as facts, by dotted keys."""
    facts: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            facts |= facts_of_settings(value, f"{prefix}{key}.")
        else:
            facts[prefix + key] = _shortened(str(value))
    return facts


def differences(facts: Mapping[int, Mapping[str, str]]) -> dict[str, dict[str, list[int]]]:
    """The facts that are not equal on all machines that know them.

    Args:
        facts: of each machine, by its place.

    Returns:
        For each such fact its values, and the places of the machines that have them; the rarest value first.
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
    """What is not equal on all machines, in words; None where all is.

    Args:
        hosts: the machines' names, by their places.
        facts: of each machine.
    """
    found = differences(facts)
    if not found:
        return None
    if "commit" in found:
        found.pop("code", None)  # It says the same, in figures that nobody knows.
    parts = [
        f"{name} is " + " and ".join(f"{value} on {named(hosts, nodes)}" for value, nodes in values.items())
        for name, values in list(found.items())[:MOST_SHOWN]
    ]
    rest = f"; {len(found) - MOST_SHOWN} more differ" if len(found) > MOST_SHOWN else ""
    return (
        f"the machines of this run are not alike: {'; '.join(parts)}{rest}. Use the same clone, environment and config "
        "on all of them, best on a file system that all of them see"
    )


def why_wrong_clock(hosts: Mapping[int, str], offsets: Mapping[int, float]) -> str | None:
    """Which machines' clocks differ from that of the first one, in words; None where none does by much.

    Args:
        offsets: of each machine, in seconds.
    """
    wrong = {node: offset for node, offset in offsets.items() if abs(offset) > CLOCK_SECONDS}
    if not wrong:
        return None
    shown = [f"{named(hosts, [node])} by {offset:+,.0f} s" for node, offset in list(wrong.items())[:MOST_SHOWN]]
    rest = f" and {len(wrong) - MOST_SHOWN} more machines" if len(wrong) > MOST_SHOWN else ""
    return (
        f"the clock differs from that of {hosts[0]} on {', '.join(shown)}{rest}: times in logs and of files will not "
        "fit together, and W&B may refuse what such a machine sends; have the clocks set (NTP)"
    )


def named(hosts: Mapping[int, str], nodes: Iterable[int]) -> str:
    """Machines, for people.

    >>> named({0: "a", 1: "b"}, [1])
    'b (node 1)'
    """
    nodes = list(nodes)
    shown = ", ".join(
        f"{hosts[node]} (node {node})" if node in hosts else f"node {node}" for node in nodes[:MOST_SHOWN]
    )
    return shown + (f" and {len(nodes) - MOST_SHOWN} more" if len(nodes) > MOST_SHOWN else "")


def _sum_of_code() -> str:
    """A number for all of bigtx's modules, also of an installed copy or a clone with changes of its own."""
    root, total = Path(hardware.__file__).resolve().parents[1], hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        content = path.read_bytes()
        total.update(f"{path.relative_to(root)} {len(content)}\n".encode())
        total.update(content)
    return total.hexdigest()[:12]


def _shortened(text: str) -> str:
    """A long value with a number for all of it, so that two of them differ here where they differ."""
    if len(text) <= _LONGEST_VALUE:
        return text
    return f"{text[: _LONGEST_VALUE - 16]}... ({hashlib.sha256(text.encode()).hexdigest()[:8]})"
