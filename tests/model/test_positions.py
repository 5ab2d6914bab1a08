"""Rotations, sinusoids and buckets against their published formulas, written out one number at a time."""

from __future__ import annotations

import math

import pytest
import torch

from bigtx.config.schema import ModelConfig, RopeScalingConfig
from bigtx.model.embed import RelativeBias, rotary_frequencies, rotate, rotation, sinusoids


def config(**scaling: object) -> ModelConfig:
    return ModelConfig(hidden_size=128, num_heads=2, rope_theta=500_000.0, rope_scaling=RopeScalingConfig(**scaling))


def plain(index: int, width: int = 64, theta: float = 500_000.0) -> float:
    return theta ** (-2 * index / width)


def frequencies(**scaling: object) -> tuple[list[float], float]:
    found, magnitude = rotary_frequencies(config(**scaling), 500_000.0, "cpu")
    assert found.dtype == torch.float32
    return found.tolist(), magnitude


def test_plain_and_linear() -> None:
    assert frequencies()[0] == pytest.approx([plain(index) for index in range(32)], rel=1e-5)
    found, magnitude = frequencies(method="linear", factor=4.0)
    assert found == pytest.approx([plain(index) / 4 for index in range(32)], rel=1e-5) and magnitude == 1.0


def test_llama3() -> None:
    """The cases of Llama 3.1's own code."""

    def expected(frequency: float) -> float:
        wave_length = 2 * math.pi / frequency
        if wave_length < 8192 / 4.0:
            return frequency
        if wave_length > 8192 / 1.0:
            return frequency / 8.0
        smooth = (8192 / wave_length - 1.0) / (4.0 - 1.0)
        return (1 - smooth) * frequency / 8.0 + smooth * frequency

    found, _ = frequencies(method="llama3", factor=8.0)
    assert found == pytest.approx([expected(plain(index)) for index in range(32)], rel=1e-5)
    assert found[0] == 1.0 and found[-1] == pytest.approx(plain(31) / 8)


def test_yarn() -> None:
    """Equations 17 to 23 of arXiv:2309.00071, with dimensions rounded outwards as its authors' code does."""

    def dimension(turns: float) -> float:
        return 64 * math.log(4096 / (turns * 2 * math.pi)) / (2 * math.log(500_000.0))

    low, high = math.floor(dimension(32.0)), math.ceil(dimension(1.0))

    def expected(index: int) -> float:
        ramp = min(max((index - low) / (high - low), 0.0), 1.0)
        return plain(index) / 16.0 * ramp + plain(index) * (1 - ramp)

    found, magnitude = frequencies(method="yarn", factor=16.0, original_length=4096)
    assert found == pytest.approx([expected(index) for index in range(32)], rel=1e-5)
    assert magnitude == pytest.approx(0.1 * math.log(16.0) + 1.0)


def test_yarn_makes_rotations_larger() -> None:
    """Equation 22: both the cosines and the sines are multiplied by the square root of 1/t."""
    cos, sin = rotation(config(method="yarn", factor=16.0, original_length=4096), torch.tensor([[0, 3]]))
    magnitude = 0.1 * math.log(16.0) + 1.0
    assert cos[0, 0, 0].tolist() == pytest.approx([magnitude] * 32) and not sin[0, 0, 0].any()
    # The first dimension is not interpolated: it turns by 1 at each position.
    assert float(cos[0, 0, 1, 0]) == pytest.approx(magnitude * math.cos(3.0))
    assert float(sin[0, 0, 1, 0]) == pytest.approx(magnitude * math.sin(3.0))


def test_rotations_keep_lengths_and_see_distances_only() -> None:
    generator = torch.Generator().manual_seed(1)
    query, key = torch.randn(2, 1, 1, 1, 64, generator=generator)

    def score(query_position: int, key_position: int) -> float:
        turns = [rotation(config(), torch.tensor([[position]])) for position in (query_position, key_position)]
        return float((rotate(query, turns[0]) * rotate(key, turns[1])).sum())

    assert rotate(query, rotation(config(), torch.tensor([[777]]))).norm() == pytest.approx(
        float(query.norm()), rel=1e-5
    )
    assert score(5, 3) == pytest.approx(score(1005, 1003), abs=1e-3)
    assert abs(score(5, 3) - score(5, 4)) > 1e-2


def test_far_positions_of_bf16_models_stay_apart() -> None:
    cos, _ = rotation(config(), torch.tensor([[4000, 4001]]))
    assert cos.dtype == torch.float32 and not torch.equal(cos[..., 0, :], cos[..., 1, :])


def test_sinusoids() -> None:
    waves = sinusoids(torch.tensor([[0, 7]]), 6)
    assert waves[0, 0].tolist() == [0.0, 0.0, 0.0, 1.0, 1.0, 1.0]
    angles = [7 * 10_000 ** (-index / 3) for index in range(3)]
    expected = [math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles]
    assert waves[0, 1].tolist() == pytest.approx(expected, abs=1e-5)
    assert sinusoids(torch.tensor([[3]]), 7).shape == (1, 1, 7)


def test_relative_buckets() -> None:
    """T5's for a decoder: 16 exact distances, then 16 by logarithm up to 128."""
    settings = ModelConfig(positions="relative", relative_num_buckets=32, relative_max_distance=128)
    bias = RelativeBias(settings, both_ways=False)

    def expected(distance: int) -> int:
        if distance < 16:
            return distance
        return min(31, 16 + int(math.log(distance / 16) / math.log(128 / 16) * 16))

    distances = torch.arange(300)
    assert bias.bucket(distances).tolist() == [expected(distance) for distance in range(300)]
    assert bias.bucket(-distances).tolist() == [0] * 300


def test_relative_buckets_both_ways() -> None:
    """T5's for an encoder: the same with half of the buckets, the other half for what follows."""
    settings = ModelConfig(positions="relative", relative_num_buckets=32, relative_max_distance=128)
    bias = RelativeBias(settings, both_ways=True)

    def expected(distance: int) -> int:
        if distance < 8:
            return distance
        return min(15, 8 + int(math.log(distance / 8) / math.log(128 / 8) * 8))

    distances = torch.arange(1, 300)
    assert bias.bucket(distances).tolist() == [expected(distance) for distance in range(1, 300)]
    assert bias.bucket(-distances).tolist() == [16 + expected(distance) for distance in range(1, 300)]
    assert bias.bucket(torch.tensor([0])).tolist() == [0]
