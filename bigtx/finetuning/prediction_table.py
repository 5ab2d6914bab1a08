"""Predictions as a table on a terminal: the answer, its probability, and the beginning of the text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TextIO

from bigtx.data.records.record import Record
from bigtx.finetuning.prediction_lines import Item
from bigtx.finetuning.tasks.task import RecordTask
from bigtx.utils.terminal import fitted, visible, width

ANSWERS = ("label", "response", "translation", "text")
"""Keys of predictions that hold an answer; other predictions have only numbers."""
MAX_READ = 1000
"""Only so many characters of a text are read."""
GAP = "  "


@dataclass
class PredictionTable:
    """A table whose rows are written one after the other. The first rows determine the widths of the columns.

    Attributes:
        columns: the width of the terminal.
    """

    task: RecordTask
    stream: TextIO
    columns: int
    _widths: list[int] = field(default_factory=list)

    def add(self, items: Sequence[Item], lines: Sequence[Mapping[str, Any]]) -> None:
        """Write a row for each record.

        Args:
            lines: the output lines of the items.
        """
        rows = [self._row(item, line) for item, line in zip(items, lines, strict=True)]
        if not self._widths:
            headers = ["answer", "confidence", "text"]
            self._widths = self._fit([headers, *rows], has_confidence=any(row[1] for row in rows))
            self._write(headers)
        for row in rows:
            self._write(row)
        self.stream.flush()

    def _row(self, item: Item, line: Mapping[str, Any]) -> list[str]:
        if "prediction" not in line:
            return ["(error)", "", _one_line(str(line.get("error")))]
        assert isinstance(item, Record)
        answer, confidence = answer_of(line["prediction"])
        shown = "" if confidence is None else f"{confidence:.1%}"
        return [_one_line(answer), shown, _one_line(self.task.shown(item))]

    def _fit(self, rows: Sequence[Sequence[str]], *, has_confidence: bool) -> list[int]:
        """Return the widths of the columns: at most half of the terminal for the answer, and the rest for the text."""
        first = min(max(width(row[0]) for row in rows), max(8, self.columns // 2))
        second = len("confidence") if has_confidence else 0
        taken = first + len(GAP) + (second + len(GAP) if second else 0)
        return [first, second, max(8, self.columns - taken)]

    def _write(self, cells: Sequence[str]) -> None:
        answer, confidence, text = self._widths
        parts = [fitted(cells[0], answer)]
        if confidence:
            parts.append(cells[1].rjust(confidence))
        parts.append(fitted(cells[2], text).rstrip())
        print(GAP.join(parts).rstrip(), file=self.stream)


def answer_of(prediction: Mapping[str, Any]) -> tuple[str, float | None]:
    """Return the answer of a prediction, and its probability if it is known."""
    for key in ANSWERS:
        if key in prediction:
            answer = prediction[key]
            return str(answer), prediction.get("probabilities", {}).get(answer)
    return ", ".join(f"{key} {value:.4g}" for key, value in prediction.items()), None


def _one_line(text: str) -> str:
    return visible(" ".join(text[:MAX_READ].split()))
