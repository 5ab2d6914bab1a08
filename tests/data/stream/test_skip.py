"""Windows of sequences that are passed over."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from bigtx.data.stream.order import SkippedWindows

windows = st.lists(st.tuples(st.integers(0, 100), st.integers(1, 20)), max_size=6)


@given(windows, st.integers(0, 150), st.integers(1, 60))
def test_what_is_read_is_what_is_left(drawn: list[tuple[int, int]], position: int, count: int) -> None:
    skipped = SkippedWindows([f"{start}-{start + length}" for start, length in drawn])
    gone = {sequence for start, length in drawn for sequence in range(start, start + length)}
    left = [sequence for sequence in range(position, position + count + 200) if sequence not in gone][:count]
    assert skipped.read_from(position, count).tolist() == left
    assert skipped.after(position, count) == left[-1] + 1
    behind = {sequence for start, end in skipped.before(position) for sequence in range(start, end)}
    assert behind == {sequence for sequence in gone if sequence < position}
    assert all(a[1] < b[0] for a, b in zip(skipped.windows, skipped.windows[1:], strict=False))


def test_ranges_are_read_as_people_write_them() -> None:
    assert SkippedWindows(["1.5k-2k", "100-200"]).windows == [(100, 200), (1500, 2000)]
    assert SkippedWindows(["1e3 - 1_100"]).read_from(998, 4).tolist() == [998, 999, 1100, 1101]
