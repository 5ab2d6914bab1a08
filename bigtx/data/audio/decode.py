"""Recordings: their places, their headers, and their samples.

They are decoded by libsndfile through soundfile, and resampled by soxr; both come with the extra `speech`. libsndfile
reads a truncated wav as a shorter one, so `riff.with_length` first compares its size with its header.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bigtx.data.audio.riff import BadAudioError, with_length
from bigtx.utils.errors import LaunchError
from bigtx.utils.files import open_file

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
