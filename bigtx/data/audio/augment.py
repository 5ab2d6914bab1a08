"""Augmentation: recordings are changed each time that they are read, as drawn from (seed, number of the record).

SpecAugment (arXiv:1904.08779) hides bands of time and of frequency; its time warp is left out, which according to the
article is the least important of the three and the most expensive. Before the spectrogram is computed, a recording may
be played
faster or slower (T. Ko et al., Audio Augmentation for Speech Recognition, Interspeech 2015) and noise may be added.
Loudness is not changed: the features do not depend on it.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from bigtx.config.schema import TranscribeConfig
from bigtx.data.audio.decode import resampled

_STREAM = 7 << 56
"""A label that separates these draws from those of the order of records, which have the same seed."""


def generator(seed: int, number: int) -> np.random.Generator:
    """Return the generator of the record with this number in the run."""
    return np.random.Generator(np.random.Philox(key=[seed, _STREAM | number]))


def changes_waveform(config: TranscribeConfig) -> bool:
    """Return whether recordings are changed before the spectrogram, so that it must be computed each time."""
    return config.speed_change > 0.0 or config.noise_db is not None


def perturbed(wave: np.ndarray, config: TranscribeConfig, draw: np.random.Generator) -> np.ndarray:
    """Return a waveform fp32 [L], changed in speed and with noise, as the config says."""
    if config.speed_change > 0.0:
        speed = 1.0 + config.speed_change * (int(draw.integers(3)) - 1)
        wave = resampled(wave, speed, 1.0)
    if config.noise_db is not None:
        ratio = 10.0 ** (-draw.uniform(config.noise_db, config.noise_db + NOISE_RANGE_DB) / 20.0)
        loudness = float(np.sqrt(np.mean(np.square(wave, dtype=np.float64))))
        wave = wave + (ratio * loudness) * draw.standard_normal(len(wave), dtype=np.float32)
    return wave.astype(np.float32, copy=False)


NOISE_RANGE_DB = 30.0
"""The range of the drawn noise, from the loudest to the faintest, in dB."""


def masked(features: Tensor, config: TranscribeConfig, draw: np.random.Generator) -> Tensor:
    """Return features fp32 [F, M] with bands of time and frequency hidden: set to 0, which is their mean."""
    frames, bins = features.shape
    if not config.num_time_masks and not config.num_frequency_masks:
        return features
    features = features.clone()
    for _ in range(config.num_frequency_masks):
        start, stop = _band(bins, config.max_frequency_mask, draw)
        features[:, start:stop] = 0.0
    for _ in range(config.num_time_masks):
        start, stop = _band(frames, config.max_time_mask, draw)
        features[start:stop] = 0.0
    return features


def _band(length: int, share: float, draw: np.random.Generator) -> tuple[int, int]:
    """Return a band of up to `share` of a length, its width and then its place drawn uniformly (section 2 of the
    article).
    """
    width = int(draw.integers(int(share * length) + 1))
    start = int(draw.integers(length - width + 1))
    return start, start + width
