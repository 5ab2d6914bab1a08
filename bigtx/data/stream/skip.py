"""Windows of sequences that a run skips, e.g. those of a loss spike.

A position counts all sequences of the global order, including skipped ones. So windows do not change the place of a
sequence or the start of a phase of the mixture, and one integer is still the whole state of the data.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bigtx.utils.units import parse_range


class SkippedWindows:
    """The remaining sequences of a run, by arithmetic.

    Args:
        ranges: the ranges of `data.skip`; the END of a range is the first sequence that is read again. They may
            overlap.

    Attributes:
        windows: (start, end) of each, ascending, without overlaps.
    """

    def __init__(self, ranges: Sequence[str] = ()) -> None:
        self.windows: list[tuple[int, int]] = []
        for start, end in sorted(map(parse_range, ranges)):
            if self.windows and start <= self.windows[-1][1]:
                start, end = self.windows[-1][0], max(end, self.windows.pop()[1])
            self.windows.append((start, end))
        lengths = np.array([end - start for start, end in self.windows], np.int64)
        # Windows are between reads: how many reads come before each, and how many sequences are in it and in earlier
        # ones.
        self._passed = np.concatenate([[0], np.cumsum(lengths)])
        self._reads = np.array([start for start, _ in self.windows], np.int64) - self._passed[:-1]

    def before(self, position: int) -> list[tuple[int, int]]:
        """Return the windows, or their parts, before a position."""
        return [(start, min(end, position)) for start, end in self.windows if start < position]

    def read_from(self, position: int, count: int) -> np.ndarray:
        """Return the first `count` sequences from a position on that are not skipped; int64."""
        reads = self._reads_before(position) + np.arange(count)
        return reads + self._passed[np.searchsorted(self._reads, reads, side="right")]

    def after(self, position: int, count: int) -> int:
        """Return the position after reading `count` sequences, at least one, from a position on."""
        last = self._reads_before(position) + count - 1
        return last + int(self._passed[np.searchsorted(self._reads, last, side="right")]) + 1

    def _reads_before(self, position: int) -> int:
        return position - sum(end - start for start, end in self.before(position))
