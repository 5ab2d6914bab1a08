"""Recordings are found, decoded and resampled; what is none is refused with the reason."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import soundfile
from sounds import RATE, tone, wav

from bigtx.data.audio.decode import AudioPlace, BadAudioError, decode, num_resampled, read_header, resampled


def in_memory(content: bytes) -> AudioPlace:
    return AudioPlace("x.wav", "nowhere", 0, len(content), content)


def flac(sound: np.ndarray, rate: int) -> bytes:
    content = io.BytesIO()
    soundfile.write(content, sound, rate, format="FLAC")
    return content.getvalue()


@pytest.mark.parametrize("encode", [wav, flac])
@pytest.mark.parametrize(("rate", "wanted"), [(8000, 8000), (44_100, 16_000), (8000, 16_000)])
def test_a_tone_stays_a_tone(encode: object, rate: int, wanted: int) -> None:
    sound = tone(500, 0.5, rate)
    place = in_memory(encode(np.stack([sound, sound], axis=1), rate))  # type: ignore[operator]
    assert read_header(place) == (len(sound), rate)
    heard = decode(place, wanted)
    assert heard.dtype == np.float32 and len(heard) == num_resampled(len(sound), rate, wanted)
    inner = slice(wanted // 10, -wanted // 10)
    np.testing.assert_allclose(heard[inner], tone(500, 0.5, wanted)[: len(heard)][inner], atol=5e-3)


def test_channels_are_averaged_and_the_rest_is_left_out() -> None:
    sound = np.stack([tone(500), np.zeros_like(tone(500))], axis=1)
    heard = decode(in_memory(wav(sound)), RATE, max_samples=100)
    assert len(heard) == 100
    np.testing.assert_allclose(heard, tone(500)[:100] / 2, atol=1e-3)
    assert len(decode(in_memory(wav(tone(500))), 16_000, max_samples=101)) == 101


def test_a_recording_within_a_file(tmp_path: Path) -> None:
    content = wav(tone(500))
    (tmp_path / "archive").write_bytes(b"x" * 777 + content + b"y" * 99)
    place = AudioPlace("a.wav", str(tmp_path / "archive"), 777, len(content))
    np.testing.assert_allclose(decode(place, RATE), tone(500), atol=1e-3)
    assert str(place) == f"a.wav ({len(content)} bytes)"


@pytest.mark.parametrize("length", [1, 999, 1000, 12_345])
@pytest.mark.parametrize("speed", [0.9, 1.1, 2.0])
def test_resampling_gives_the_length_that_is_asked_for(length: int, speed: float) -> None:
    assert len(resampled(np.zeros(length, np.float32), speed, 1.0)) == max(1, round(length / speed))


def test_what_is_no_recording_says_why(tmp_path: Path) -> None:
    for content, reason in (
        (b"", "an empty file"),
        (b"these are words, and no sound at all", "no recording that can be read"),
        (wav(np.zeros(0, np.float32)), "no samples"),
        (flac(tone(500, 1.0), RATE)[:2000], "cut short|no recording"),
    ):
        with pytest.raises(BadAudioError, match=reason):
            read_header(in_memory(content))
            decode(in_memory(content), RATE)
    with pytest.raises(BadAudioError, match="cannot be read"):
        read_header(AudioPlace("a.wav", str(tmp_path / "a.wav"), 0, 10))
    broken = io.BytesIO()
    soundfile.write(broken, np.array([0.0, np.nan]), RATE, format="WAV", subtype="FLOAT")
    with pytest.raises(BadAudioError, match="finite"):
        decode(in_memory(broken.getvalue()), RATE)
