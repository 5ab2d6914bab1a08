"""What is drawn for a record follows from (seed, its number) alone, and hides no more than the config says."""

from __future__ import annotations

import numpy as np
import torch
from sounds import tone

from bigtx.config.schema import TranscribeConfig
from bigtx.finetuning.tasks.speech import NOISE_RANGE_DB, changes_waveform, generator, masked, perturbed


def test_masks_are_drawn_from_the_number_and_stay_within_their_shares() -> None:
    config = TranscribeConfig(num_frequency_masks=1, max_frequency_mask=0.25, num_time_masks=2, max_time_mask=0.1)
    features = torch.ones(100, 40)
    hidden = [masked(features, config, generator(7, number)) for number in range(200)]
    assert all(torch.equal(own, masked(features, config, generator(7, n))) for n, own in enumerate(hidden))
    assert any(not torch.equal(hidden[0], masked(features, config, generator(8, 0))) for _ in range(1))
    bins = [int((own.amax(dim=0) == 0).sum()) for own in hidden]
    frames = [int((own.amax(dim=1) == 0).sum()) for own in hidden]
    assert max(bins) == 10 and min(bins) == 0, "up to a quarter of 40 bins, each width drawn"
    assert 10 < max(frames) <= 20, "two bands of up to a tenth of 100 frames"
    touched = sum(own[:, place].min() == 0 for own in hidden for place in (0, 20, 39))
    assert touched > 0 and bool((features == 1).all()), "the features themselves stay"


def test_no_masks_no_change() -> None:
    features = torch.ones(10, 4)
    config = TranscribeConfig(num_frequency_masks=0, num_time_masks=0)
    assert masked(features, config, generator(1, 1)) is features
    assert not changes_waveform(config)
    short = masked(torch.ones(1, 1), TranscribeConfig(max_time_mask=1.0), generator(1, 5))
    assert short.shape == (1, 1)


def test_speed_and_noise() -> None:
    sound = tone(500, 0.5)
    config = TranscribeConfig(speed_change=0.1)
    assert changes_waveform(config)
    lengths = {len(perturbed(sound, config, generator(1, number))) for number in range(40)}
    assert lengths == {round(4000 / speed) for speed in (0.9, 1.0, 1.1)}
    config = TranscribeConfig(noise_db=10.0)
    ratios = []
    for number in range(100):
        noise = perturbed(sound, config, generator(1, number)) - sound
        ratios.append(10 * np.log10(np.mean(sound**2) / np.mean(noise**2)))
    assert 9.5 < min(ratios) < 15 and 30 < max(ratios) < 10.5 + NOISE_RANGE_DB
