"""Log-mel features, against arithmetic that is written out, and against transformers' own filters."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sounds import tone

from bigtx.config.schema import AudioConfig
from bigtx.config.shape import num_frames
from bigtx.finetuning.tasks.speech import LogMel, mel_filters


@pytest.mark.parametrize(("bins", "rate", "fft"), [(80, 16_000, 400), (40, 8000, 512), (128, 44_100, 2048)])
def test_the_filters_are_slaneys(bins: int, rate: int, fft: int) -> None:
    theirs = pytest.importorskip("transformers.audio_utils").mel_filter_bank(
        fft // 2 + 1, bins, 0.0, rate / 2, rate, norm="slaney", mel_scale="slaney"
    )
    np.testing.assert_allclose(mel_filters(bins, rate, fft), theirs.T, rtol=1e-6, atol=1e-9)


def test_a_filter_by_hand() -> None:
    """Two bands of 0 ... 1000 Hz, where the scale is linear: corners at 0, 333, 667 and 1000 Hz; heights 2 / width."""
    filters = mel_filters(2, 2000, 8)  # The spectrum at 0, 250, 500, 750, 1000 Hz.
    height = 2 / (2000 / 3)
    np.testing.assert_allclose(filters[0], [0, 0.75 * height, 0.5 * height, 0, 0], atol=1e-12)
    np.testing.assert_allclose(filters[1], [0, 0, 0.5 * height, 0.75 * height, 0], atol=1e-12)


def by_hand(sound: np.ndarray, log_mel: LogMel, bins: int, rate: int) -> np.ndarray:
    """The same sum by sum, in fp64."""
    length, fft, hop = log_mel.window_length, log_mel.fft, log_mel.hop
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(length) / length)
    frames = []
    for centre in range(0, len(sound), hop):
        start = centre - fft // 2 + (fft - length) // 2
        places = np.arange(start, start + length)
        inside = (places >= 0) & (places < len(sound))
        piece = np.where(inside, sound[np.clip(places, 0, len(sound) - 1)], 0.0) * window
        turns = np.exp(-2j * np.pi * np.outer(np.arange(fft // 2 + 1), np.arange(length)) / fft)
        frames.append(mel_filters(bins, rate, fft) @ np.abs(turns @ piece) ** 2)
    power = np.log10(np.maximum(np.array(frames), 1e-10))
    power = np.maximum(power, power.max() - 8)
    return (power - power.mean()) / power.std()


def test_the_spectrogram_is_the_sum_that_the_docstring_says() -> None:
    config = AudioConfig(num_mel_bins=20, sample_rate=8000)
    generator = np.random.default_rng(1)
    sound = tone(700, 0.2) + 0.1 * generator.standard_normal(1600, dtype=np.float32)
    log_mel = LogMel(config)
    features = log_mel(sound)
    assert features.shape == (num_frames(log_mel.config, 1600), 20) == (20, 20)
    np.testing.assert_allclose(features.numpy(), by_hand(sound, log_mel, 20, 8000), atol=2e-3)


def test_loudness_does_not_matter_and_silence_is_finite() -> None:
    log_mel = LogMel(AudioConfig(num_mel_bins=20, sample_rate=8000))
    sound = tone(700, 0.2)
    torch.testing.assert_close(log_mel(sound), log_mel(sound / 10), atol=1e-3, rtol=0)
    for silence in (np.zeros(1600, np.float32), np.zeros(1, np.float32)):
        assert log_mel(silence).abs().max() < 1


def test_a_higher_tone_is_in_a_higher_bin() -> None:
    log_mel = LogMel(AudioConfig(num_mel_bins=40, sample_rate=16_000))
    loudest = [int(log_mel(tone(hertz, rate=16_000)).mean(0).argmax()) for hertz in (200, 600, 1500, 4000, 7000)]
    assert loudest == sorted(set(loudest))
