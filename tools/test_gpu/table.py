"""The table of a check, from its lines of JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from test_gpu.plan import WANTED_MFU

Line = Mapping[str, Any]

OWN_COLUMNS = ("phase", "label", "at")


def lines_of(text: str) -> Iterator[str]:
    """Yield the lines of the table about the last check in a file.

    Args:
        text: the file's content. Its last line may be cut off.
    """
    found: list[Line] = []
    for written in text.splitlines():
        try:
            entry = json.loads(written)
        except ValueError:
            continue
        if "began" in entry:
            found = []
        found.append(entry)
    yield ""
    yield from _columns(
        [("phase", "seconds", "status")]
        + [
            (f"{line['phase']} {line['case']}".strip(), f"{line['seconds']:.0f}", line["status"])
            for line in found
            if "status" in line
        ]
    )
    # A model's last line has its profile too.
    trained = {line["label"]: line for line in found if line.get("phase") == "training" and "tokens_per_second" in line}
    if trained:
        yield ""
        yield from _columns([SPEED_HEADER, *map(_speed, trained.values())])
    yield ""
    for line in found:
        if "label" in line and line["label"] not in trained:
            facts = [f"{key} {_shown(value)}" for key, value in line.items() if key not in OWN_COLUMNS]
            yield f"{line['phase']}, {line['label']}: {', '.join(facts)}"


SPEED_HEADER = (
    "model",
    "MFU",
    "wanted",
    "",
    "tokens/s",
    "ms/step",
    "GiB",
    "GPU busy",
    "recomputed",
    "its time goes to",
)


def _speed(line: Line) -> tuple[str, ...]:
    """Return a model's row: what was reached against what is wanted."""
    reached, wanted = line.get("mfu"), WANTED_MFU.get(line["label"])
    verdict = "" if reached is None or wanted is None else "reached" if reached >= wanted else "below"
    shares = line.get("shares", {})
    return (
        line["label"],
        "" if reached is None else f"{reached:.1%}",
        "" if wanted is None else f"{wanted:.0%}",
        verdict,
        f"{line['tokens_per_second']:,.0f}",
        f"{line['step_ms']:.1f}",
        f"{line['peak_gib']:.1f}",
        f"{line['busy']:.0%}" if "busy" in line else "",
        line.get("recomputed", ""),
        ", ".join(f"{name} {share:.0%}" for name, share in shares.items()),
    )


def _columns(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return "(" + ", ".join(f"{key} {_shown(inner)}" for key, inner in value.items()) + ")"
    if isinstance(value, list):
        return " ".join(map(_shown, value))
    return str(value)
