"""Windows of sequences that a run passes over, e.g. those of a loss spike.

A position counts all sequences of the global order, the ones passed over included. So windows change neither which
sequence stands where nor when a phase of the mixture begins, and one integer stays the whole state of the data.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bigtx.utils.units import parse_range


class SkippedWindows:
    """The sequences of a run that are left, by arithmetic.

    Args:
        ranges: as in `data.skip`; the END of a range is the first sequence that is read again. They may overlap.

    Attributes:
        windows: (start, end) of each, ascending, apart from each other.
    """

    def __init__(self, ranges: Sequence[str] = ()) -> None:
        self.windows: list[tuple[int, int]] = []
        for start, end in sorted(map(parse_range, ranges)):
            if self.windows and start <= self.windows[-1][1]:
                start, end = self.windows[-1][0], max(end, self.windows.pop()[1])
            self.windows.append((start, end))
        lengths = np.array([end - start for start, end in self.windows], np.int64)
        # Windows stand between reads: after so many reads comes each, and so many sequences lie in it and before.
        self._passed = np.concatenate([[0], np.cumsum(lengths)])
        self._reads = np.array([start for start, _ in self.windows], np.int64) - self._passed[:-1]

    def before(self, position: int) -> list[tuple[int, int]]:
        """Return the windows, or their parts, before a position."""
        return [(start, min(end, position)) for start, end in self.windows if start < position]

    def read_from(self, position: int, count: int) -> np.ndarray:
        """Return the first `count` sequences from a position on that are not passed over; int64."""
        reads = self._reads_before(position) + np.arange(count)
        return reads + self._passed[np.searchsorted(self._reads, reads, side="right")]

    def after(self, position: int, count: int) -> int:
        """Return the position after reading `count` sequences, at least one, from a position on."""
        last = self._reads_before(position) + count - 1
        return last + int(self._passed[np.searchsorted(self._reads, last, side="right")]) + 1

    def _reads_before(self, position: int) -> int:
        return position - sum(end - start for start, end in self.before(position))
