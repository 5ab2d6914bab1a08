"""How the schema marks a field whose text form people write: counts, sizes, durations, fractions of a run.

A marked field keeps one plain type in the dataclass (int or str), so OmegaConf can hold it; the mark tells the
loader how to read what was written, and resume how far the value may change within one run.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

Change = Literal["free", "by_name", "never"]
"""What resume allows: any change; a change named in `allow_changes`; no change at all."""

LARGEST = {int: 2**63 - 1, float: 1e38}
"""The largest number of each type where a field names no smaller one: about what int64 and fp32 hold."""


def field(
    default: Any = dataclasses.MISSING,
    *,
    kind: str = "",
    change: Change | Literal[""] = "",
    minimum: float | None = None,
    maximum: float | None = None,
    factory: Any = dataclasses.MISSING,
) -> Any:
    """Return a schema field with what the type alone cannot say.

    Args:
        kind: "count" (`10B`, `64k` into an int), "size" (`512 MiB` into bytes), "duration" (`500 steps`,
            `2B tokens`, `30 min`, kept as text), "path" (a file or folder, or a list of them: other words for the same
            place are no change), or "" for the plain type.
        change: how far resume lets the value change; "" means as its section says.
        minimum, maximum: inclusive bounds of a number, or of each number in a list or mapping. Every number has a
            minimum; where it has no maximum, `LARGEST` holds.
    """
    bounds = {name: bound for name, bound in (("minimum", minimum), ("maximum", maximum)) if bound is not None}
    metadata = {"kind": kind, "change": change} | bounds
    if factory is not dataclasses.MISSING:
        return dataclasses.field(default_factory=factory, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def section(factory: Any, *, change: Change) -> Any:
    """Return a nested section; `change` is the default for the fields inside."""
    return field(factory=factory, change=change)
