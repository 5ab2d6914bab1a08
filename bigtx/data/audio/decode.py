"""Recordings: where they lie, what their headers say, and their samples.

They are decoded by libsndfile through soundfile, and resampled by soxr; both come with the extra `speech`.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bigtx.utils.errors import LaunchError

AUDIO_SUFFIXES = (".wav", ".flac")


@dataclass(frozen=True, slots=True)
class AudioPlace:
    """Where a recording lies: in a file of its own, within an archive, or in memory.

    Attributes:
        name: relative to the folder or archive that was named, so that it stays the same where these move.
        path: of the file that holds it.
        offset: of its first byte in that file.
        size: bytes.
        content: its bytes, where they cannot be read again from the file.
    """

    name: str
    path: str
    offset: int
    size: int
    content: bytes | None = field(default=None, repr=False)

    def __str__(self) -> str:
        """What a digest of the record sees."""
        return f"{self.name} ({self.size} bytes)"

    def read(self) -> bytes:
        """Its bytes.

        Raises:
            OSError: they cannot be read.
        """
        if self.content is not None:
            return self.content
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


class BadAudioError(Exception):
    """A recording that cannot be used; the message is the reason."""


def require_speech() -> None:
    """Do nothing where all packages of the extra `speech` are installed.

    Raises:
        LaunchError: one is not.
    """
    missing = [name for name in ("soundfile", "soxr", "jiwer") if importlib.util.find_spec(name) is None]
    if missing:
        raise LaunchError(
            f"task=transcribe needs packages that are not installed ({', '.join(missing)}): pip install 'bigtx[speech]'"
        )


def read_header(place: AudioPlace) -> tuple[int, int]:
    """Samples a channel, and samples a second.

    Raises:
        BadAudioError: it is empty or no recording.
    """
    if place.size == 0:
        raise BadAudioError("an empty file, without a single byte")
    with _opened(place) as file:
        num_samples, rate = int(file.frames), int(file.samplerate)
    if num_samples <= 0:
        raise BadAudioError("a recording of no samples")
    return num_samples, rate


def num_resampled(num_samples: int, rate: int, wanted_rate: int) -> int:
    """Samples that `decode` gives for a recording."""
    return max(1, round(num_samples * wanted_rate / rate))


def decode(place: AudioPlace, wanted_rate: int, max_samples: int | None = None) -> np.ndarray:
    """The waveform, the mean of its channels, at a rate.

    Args:
        max_samples: of the result; what follows is left out.

    Returns:
        fp32 [samples], in -1 ... 1.

    Raises:
        BadAudioError: it cannot be decoded, or not to its end.
    """
    with _opened(place) as file:
        rate, total = int(file.samplerate), int(file.frames)
        wanted = total if max_samples is None else min(total, -(-max_samples * rate // wanted_rate))
        wave: np.ndarray = file.read(wanted, dtype="float32", always_2d=True).mean(axis=1)
    if len(wave) < wanted:
        raise BadAudioError(f"cut short: {len(wave):,} samples of the {total:,} that its header names")
    if not np.isfinite(wave).all():
        raise BadAudioError("its samples are not all finite")
    wave = resampled(wave, rate, wanted_rate)
    return wave if max_samples is None else wave[:max_samples]


def resampled(wave: np.ndarray, rate: float, wanted_rate: float) -> np.ndarray:
    """A waveform fp32 [samples] at another rate, of exactly as many samples as the ratio gives, rounded."""
    if rate == wanted_rate:
        return wave
    import soxr

    length = max(1, round(len(wave) * wanted_rate / rate))
    result: np.ndarray = soxr.resample(wave, rate, wanted_rate).astype(np.float32, copy=False)[:length]
    return np.pad(result, (0, length - len(result)))


@contextlib.contextmanager
def _opened(place: AudioPlace) -> Iterator[Any]:
    import soundfile

    try:
        with soundfile.SoundFile(io.BytesIO(place.read())) as file:
            yield file
    except soundfile.LibsndfileError as error:
        raise BadAudioError(f"no recording that can be read: {error.error_string}") from None
    except OSError as error:
        raise BadAudioError(f"cannot be read: {error.strerror or error}") from None
