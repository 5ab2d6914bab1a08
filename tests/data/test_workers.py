"""Worker processes: what only one of them may do at a time."""

from __future__ import annotations

import functools
import time
from itertools import pairwise
from pathlib import Path

import pytest

from bigtx.data.workers import Workers, alone


def hold(path: Path, number: int) -> int:
    with alone(), path.open("a") as file:
        begin = time.monotonic()
        time.sleep(0.02)
        print(begin, time.monotonic(), file=file)
    return number


@pytest.mark.parametrize("num_processes", [1, 2])
def test_only_one_process_at_a_time_is_alone(tmp_path: Path, num_processes: int) -> None:
    path = tmp_path / "spans"
    with Workers(num_processes, functools.partial(int)) as workers:
        assert list(workers.map(functools.partial(hold, path), range(12))) == list(range(12))
    spans = sorted(tuple(map(float, line.split())) for line in path.read_text().splitlines())
    assert len(spans) == 12
    assert all(end <= begin for (_, end), (begin, _) in pairwise(spans))
