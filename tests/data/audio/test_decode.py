"""Recordings are found, decoded and resampled; what is none is refused with the reason."""

from __future__ import annotations

import io
import struct
from pathlib import Path

import numpy as np
import pytest
import soundfile
from sounds import RATE, tone, wav

from bigtx.data.recordings import AudioPlace, BadAudioError, decode, examine, num_resampled, read_header, resampled


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
        (b"these are words, and no sound at all", "not a recording that can be read"),
        (wav(np.zeros(0, np.float32)), "without samples"),
        (flac(tone(500, 1.0), RATE)[:2000], "cut short|not a recording"),
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


@pytest.mark.parametrize("form", ["WAV", "WAVEX", "RF64", "AIFF"])
@pytest.mark.parametrize("share", [0.3, 0.5, 0.99])
def test_half_a_recording_is_not_taken_for_a_short_one(form: str, share: float) -> None:
    """libsndfile shortens the header to what there is."""
    content = io.BytesIO()
    soundfile.write(content, tone(500, 0.5), RATE, format=form)
    whole = content.getvalue()
    assert examine(in_memory(whole)) == read_header(in_memory(whole)) == (RATE // 2, RATE)
    cut = in_memory(whole[: int(share * len(whole))])
    for look in (read_header, examine, lambda place: decode(place, RATE)):
        with pytest.raises(BadAudioError, match=r"cut short: .* bytes of sound of the 8,0"):
            look(cut)


@pytest.mark.parametrize("size", [0, 0xFFFFFFFF, 0x7FFFF000, 0x80000000])
def test_a_wav_that_was_written_to_a_pipe_is_read_to_its_end(size: int) -> None:
    """Recorders cannot go back to write how long it became."""
    sound, raw = tone(500), bytearray(wav(tone(500)))
    raw[4:8] = raw[40:44] = struct.pack("<I", size)
    place = in_memory(bytes(raw))
    assert read_header(place) == examine(place) == (len(sound), RATE)
    np.testing.assert_allclose(decode(place, RATE), sound, atol=1e-3)


def test_an_empty_wav_with_notes_behind_it_has_no_samples() -> None:
    with pytest.raises(BadAudioError, match="without samples"):
        examine(in_memory(wav(np.zeros(0, np.float32)) + b"LIST\x04\0\0\0INFO"))


def test_a_flac_that_was_written_to_a_pipe_is_refused() -> None:
    """Its header says 0 samples, which libsndfile takes for as many as there can be, and cannot read."""
    content = bytearray(flac(tone(500, 3.0), RATE))
    content[21] &= 0xF0
    content[22:26] = bytes(4)
    for look in (read_header, examine):
        with pytest.raises(BadAudioError, match="does not say how many samples"):
            look(in_memory(bytes(content)))


def test_damage_within_a_recording_and_rates_that_cannot_be_are_told() -> None:
    content = bytearray(flac(np.random.default_rng(1).standard_normal(40_000).astype(np.float32) / 8, RATE))
    content[len(content) // 2] ^= 16
    assert read_header(in_memory(bytes(content))) == (40_000, RATE), "the header does not know"
    with pytest.raises(BadAudioError, match="not a recording that can be read: "):
        examine(in_memory(bytes(content)))
    raw = bytearray(wav(tone(500)))
    raw[24:28] = struct.pack("<I", 3)
    with pytest.raises(BadAudioError, match="3 samples per second"):
        examine(in_memory(bytes(raw)))
