"""The check that decodes all recordings of a run once, before its first step, and records which are good.

places ──this rank's share, in threads──▶ (samples, rate) or the fault ──▶ all ranks
                   ▲ recordings.jsonl: those that were good before, by path, offset, size and time
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import xxhash

from bigtx.data.audio.decode import AudioPlace, examine
from bigtx.data.audio.riff import BadAudioError
from bigtx.utils.files import write_atomic
from bigtx.utils.hardware import num_cores
from bigtx.utils.log import ProgressLine, clock

FILE = "recordings.jsonl"
"""The file in the run folder that lists the recordings that were decoded to their end."""

Found = tuple[int, int] | str
"""Samples per channel and samples per second of a recording; or its fault."""
Key = tuple[str | int, ...]


def look_at(
    places: Iterable[AudioPlace],
    *,
    memory: Path | None = None,
    share: tuple[int, int] = (0, 1),
    gather: Callable[[Any], Sequence[Any]] = lambda own: [own],
) -> dict[AudioPlace, Found]:
    """Decode recordings, each once, except those that are known to be good and have not changed since.

    Args:
        memory: the file that lists the good ones; None for no file.
        share: (i, n): this process decodes the i-th of n shares.
        gather: returns what all n processes pass to it, in the order of their shares.
    """
    known = _read(memory) if memory else {}
    keys = {place: _key(place) for place in dict.fromkeys(places)}
    unknown = [place for place, key in keys.items() if key is None or key not in known]
    number, count = share
    own = list(range(number, len(unknown), count))
    examined = zip(own, _examine([unknown[at] for at in own], is_shown=number == 0), strict=True)
    found: dict[AudioPlace, Found] = {place: known[key] for place, key in keys.items() if key in known}
    for at, result in (pair for part in gather(list(examined)) for pair in part):
        found[unknown[at]] = result
    good = {key: result for place, key in keys.items() if key and not isinstance(result := found[place], str)}
    if memory and number == 0 and good.keys() - known.keys():
        _write(memory, good)
    return found


def _examine(places: Sequence[AudioPlace], *, is_shown: bool) -> list[Found]:
    """Return the result for each place. libsndfile decodes without Python's lock, so threads are enough."""
    begin, line, found = time.monotonic(), ProgressLine(), list[Found]()
    with ThreadPoolExecutor(num_cores()) as pool:
        for result in pool.map(_of_one, places):
            found.append(result)
            if is_shown:
                share = len(found) / len(places)
                left = clock((time.monotonic() - begin) * (1 / share - 1))
                line.show(f"decoding recordings, once: {len(found):,} of {len(places):,}, {left} left", share)
    line.clear()
    return found


def _of_one(place: AudioPlace) -> Found:
    try:
        return examine(place)
    except BadAudioError as error:
        return str(error)


def _key(place: AudioPlace) -> Key | None:
    """Return a key that changes with the bytes; None if the file cannot be inspected."""
    if place.content is not None:
        return (xxhash.xxh3_128_hexdigest(place.content), place.size)
    try:
        changed = os.stat(place.path).st_mtime_ns
    except OSError:
        return None
    return (os.path.abspath(place.path), place.offset, place.size, changed)


def _read(path: Path) -> dict[Key | None, Found]:
    """Return the good recordings in a file; the recordings of damaged lines are decoded again."""
    known: dict[Key | None, Found] = {}
    with contextlib.suppress(OSError, ValueError):
        for line in path.read_text(encoding="utf-8", errors="surrogateescape").splitlines():
            *key, samples, rate = json.loads(line)
            known[tuple(key)] = (int(samples), int(rate))
    return known


def _write(path: Path, good: Mapping[Key, Found]) -> None:
    lines = "".join(json.dumps([*key, *found]) + "\n" for key, found in good.items())
    # The file saves time, but a run does not need it.
    with contextlib.suppress(OSError):
        write_atomic(path, lines)
