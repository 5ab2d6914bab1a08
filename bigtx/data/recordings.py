"""Recordings: their places, headers and samples, and the check of all of them before a run's first step.

They are decoded by libsndfile through soundfile, and resampled by soxr; both come with the extra `speech`. libsndfile
reads a truncated wav as a shorter one, so `with_length` first compares its size with its header (RIFF, RF64, AIFF).

    places ──this rank's share, in threads──▶ (samples, rate) or the fault ──▶ all ranks
                       ▲ recordings.jsonl: those that were good before, by path, offset, size and time
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import struct
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from bigtx.utils.errors import LaunchError
from bigtx.utils.files import json_value, open_file, write_atomic
from bigtx.utils.hardware import num_cores
from bigtx.utils.log import ProgressLine
from bigtx.utils.units import clock

_KINDS = {b"RIFF": ("<", b"data"), b"RIFX": (">", b"data"), b"RF64": ("<", b"data"), b"FORM": (">", b"SSND")}
"""The byte order of numbers and the name of the chunk with the samples, by a file's first bytes."""
_HEAD, _CHUNK_HEAD = 12, 8
_IN_DS64 = 0xFFFFFFFF
_SIZE_IN_DS64 = 16
"""Bytes from the start of a ds64 chunk to the size of the samples (EBU Tech 3306)."""


class BadAudioError(Exception):
    """A recording that cannot be used; the message is the reason."""


def with_length(content: bytes) -> bytes:
    """Return the bytes of a recording with its length in the header, even if the program that recorded it wrote
    to a pipe and could not fill it in: sox and others leave a size of about 2 GiB, ffmpeg 0xFFFFFFFF, some 0.
    libsndfile reads these to the end of the file, except 0, which is replaced by the true size here.

    Raises:
        BadAudioError: the header gives more bytes than the file has.
    """
    order, wanted = _KINDS.get(content[:4], ("", b""))
    at, in_ds64 = _HEAD, None
    while order and at + _CHUNK_HEAD <= len(content):
        name, size = struct.unpack_from(f"{order}4sI", content, at)
        available = len(content) - at - _CHUNK_HEAD
        if name == b"ds64" and available >= 16:
            (in_ds64,) = struct.unpack_from("<Q", content, at + _SIZE_IN_DS64)
        if name != wanted:
            at += _CHUNK_HEAD + size + size % 2
            continue
        if size == _IN_DS64 and in_ds64 is not None:
            size = in_ds64
        if size == 0 and available and not _are_chunks(content, at + _CHUNK_HEAD, order):
            return content[: at + 4] + struct.pack(f"{order}I", min(available, _IN_DS64)) + content[at + 8 :]
        if size > available and not _is_open(size):
            raise BadAudioError(f"cut short: {available:,} bytes of sound of the {size:,} in its header")
        break
    return content


def _is_open(size: int) -> bool:
    return size >= (1 << 63) or size == _IN_DS64 or 0x7FFF_0000 <= size <= 0x8000_0000


def _are_chunks(content: bytes, at: int, order: str) -> bool:
    """Return whether other chunks, and nothing else, fill the rest of a file."""
    while at + _CHUNK_HEAD <= len(content):
        at += _CHUNK_HEAD + struct.unpack_from(f"{order}I", content, at + 4)[0]
        at += at % 2
    return at in (len(content), len(content) + 1)


AUDIO_SUFFIXES = (".wav", ".flac")


@dataclass(frozen=True, slots=True)
class AudioPlace:
    """The place of a recording: a file of its own, an archive, or memory.

    Attributes:
        name: relative to the folder or archive that was named, so that it does not change if these are moved.
        path: the file that holds it.
        offset: the position of its first byte in that file.
        size: in bytes.
        content: its bytes, if they cannot be read again from the file.
    """

    name: str
    path: str
    offset: int
    size: int
    content: bytes | None = field(default=None, repr=False)

    def __str__(self) -> str:
        """Return the text that a digest of the record includes."""
        return f"{self.name} ({self.size} bytes)"

    def read(self) -> bytes:
        """Return its bytes.

        Raises:
            OSError: they cannot be read.
        """
        if self.content is not None:
            return self.content
        with open_file(self.path) as file:
            file.seek(self.offset)
            return file.read(self.size)


BLOCK_SAMPLES = 1 << 20
"""Samples that are decoded at once."""
OPEN_LENGTH = 1 << 60
"""The number of samples that libsndfile reports where the header does not define it."""
SAMPLE_RATES = (1000, 1_000_000)
"""Sampling rates that are accepted, in samples per second."""


def require_speech() -> None:
    """Check that all packages of the extra `speech` are installed.

    Raises:
        LaunchError: a package is missing.
    """
    missing = [name for name in ("soundfile", "soxr", "jiwer") if importlib.util.find_spec(name) is None]
    if missing:
        raise LaunchError(
            f"task=transcribe needs packages that are not installed ({', '.join(missing)}): pip install 'bigtx[speech]'"
        )


def read_header(place: AudioPlace) -> tuple[int, int]:
    """Return the samples per channel and the samples per second, without decoding.

    Raises:
        BadAudioError: it is empty or not a recording.
    """
    with _opened(place) as file:
        return _samples_by_header(file), int(file.samplerate)


def examine(place: AudioPlace) -> tuple[int, int]:
    """Decode a recording to its end, in little memory, so that faults are found before training.

    Returns:
        Samples per channel, and samples per second.

    Raises:
        BadAudioError: it is empty or not a recording, or `decode` could not decode it to its end.
    """
    with _opened(place) as file:
        return sum(map(len, _blocks(file, None))), int(file.samplerate)


def _samples_by_header(file: Any) -> int:
    num_samples = int(file.frames)
    if num_samples <= 0:
        raise BadAudioError("a recording without samples")
    if num_samples >= OPEN_LENGTH:
        raise BadAudioError(
            "its header does not say how many samples it has, as if it was written to a pipe; write it again, e.g. "
            "ffmpeg -i OLD.flac NEW.flac"
        )
    return num_samples


def num_resampled(num_samples: int, rate: int, wanted_rate: int) -> int:
    """Return the number of samples that `decode` returns for a recording."""
    return max(1, round(num_samples * wanted_rate / rate))


def decode(place: AudioPlace, wanted_rate: int, max_samples: int | None = None) -> np.ndarray:
    """Return the waveform, the mean of its channels, at a rate.

    Args:
        max_samples: the most samples of the result; the rest is left out.

    Returns:
        fp32 [samples], in -1 ... 1.

    Raises:
        BadAudioError: it cannot be decoded, or not to its end.
    """
    with _opened(place) as file:
        rate = int(file.samplerate)
        blocks = list(_blocks(file, None if max_samples is None else -(-max_samples * rate // wanted_rate)))
    wave = resampled(np.concatenate(blocks), rate, wanted_rate)
    return wave if max_samples is None else wave[:max_samples]


def _blocks(file: Any, wanted: int | None) -> Iterator[np.ndarray]:
    """Yield the mean of the channels, fp32 [samples] for each piece of a recording.

    Args:
        wanted: the number of samples to read; None: all.

    Raises:
        BadAudioError: there are fewer than the header says, or some are not finite.
    """
    total, found = _samples_by_header(file), 0
    wanted = total if wanted is None else min(total, wanted)
    while found < wanted:
        block: np.ndarray = file.read(min(BLOCK_SAMPLES, wanted - found), dtype="float32", always_2d=True).mean(axis=1)
        if not len(block):
            break
        if not np.isfinite(block).all():
            raise BadAudioError("its samples are not all finite")
        found += len(block)
        yield block
    if found < wanted:
        raise BadAudioError(f"cut short: {found:,} samples of the {total:,} in its header")


def resampled(wave: np.ndarray, rate: float, wanted_rate: float) -> np.ndarray:
    """Return a waveform fp32 [samples] at another rate, with the number of samples that the ratio gives, rounded."""
    if rate == wanted_rate:
        return wave
    import soxr

    length = max(1, round(len(wave) * wanted_rate / rate))
    result: np.ndarray = soxr.resample(wave, rate, wanted_rate).astype(np.float32, copy=False)[:length]
    return np.pad(result, (0, length - len(result)))


@contextlib.contextmanager
def _opened(place: AudioPlace) -> Iterator[Any]:
    import soundfile

    if place.size == 0:
        raise BadAudioError("an empty file")
    try:
        with soundfile.SoundFile(io.BytesIO(with_length(place.read()))) as file:
            least, most = SAMPLE_RATES
            if not least <= file.samplerate <= most:
                raise BadAudioError(f"{file.samplerate:,} samples per second; only {least:,} to {most:,} can be used")
            yield file
    except soundfile.LibsndfileError as error:
        reason = error.error_string.strip() or "its samples are damaged or cut short"
        raise BadAudioError(f"not a recording that can be read: {reason}") from None
    except OSError as error:
        raise BadAudioError(f"cannot be read: {error.strerror or error}") from None


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
    with contextlib.suppress(OSError, ValueError, TypeError):
        for line in path.read_text(encoding="utf-8", errors="surrogateescape").splitlines():
            *key, samples, rate = json_value(line)
            known[tuple(key)] = (int(samples), int(rate))
    return known


def _write(path: Path, good: Mapping[Key, Found]) -> None:
    lines = "".join(json.dumps([*key, *found]) + "\n" for key, found in good.items())
    # The file saves time, but a run does not need it.
    with contextlib.suppress(OSError):
        write_atomic(path, lines)
