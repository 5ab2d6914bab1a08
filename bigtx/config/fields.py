"""Marks of the schema's fields that people write as text: counts, sizes, durations, fractions of a run.

A marked field keeps one plain type in the dataclass (int or str), so OmegaConf can hold it; the mark says how the
loader reads the text, and how far the value may change on resume.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

Change = Literal["free", "by_name", "never"]
"""The changes that resume allows: any change; a change named in `allow_changes`; no change at all."""

LARGEST = {int: 2**63 - 1, float: 1e38}
"""The largest number of each type where a field has no smaller maximum: about what int64 and fp32 hold."""


def field(
    default: Any = dataclasses.MISSING,
    *,
    kind: str = "",
    change: Change | Literal[""] = "",
    minimum: float | None = None,
    maximum: float | None = None,
    factory: Any = dataclasses.MISSING,
) -> Any:
    """Return a schema field with properties that the type cannot express.

    Args:
        kind: "count" (`10B`, `64k` into an int), "size" (`512 MiB` into bytes), "duration" (`500 steps`,
            `2B tokens`, `30 min`, kept as text), "path" (a file or folder, or a list of them: another spelling of the
            same place is not a change), or "" for the plain type.
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
