"""Initial weights are a function of the seed and the name, whole or in pieces."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch

from bigtx.config.schema import ExpertsConfig, ModelConfig
from bigtx.model import initial
from bigtx.model.initial import initial_value
from bigtx.model.transformer import Transformer

CONFIG = ModelConfig(vocab_size=1000, hidden_size=128, num_layers=3, num_heads=4, norm="layer", norm_bias=True)
PINNED = [0.044994764, 1.0123044, -1.5491681, 0.62705797, 0.09839581, 0.86294818]


def started(config: ModelConfig, seed: int) -> dict[str, torch.Tensor]:
    model = Transformer(config)
    model.init_weights(seed)
    return dict(model.named_parameters())


def test_same_seed_same_weights() -> None:
    first, again, other = (started(CONFIG, seed) for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    drawn = [name for name in first if first[name].dim() == 2]
    assert drawn and not any(torch.equal(first[name], other[name]) for name in drawn)


def test_every_parameter_has_its_own_values() -> None:
    values = started(CONFIG, 1)
    square = [value for value in values.values() if value.shape == (128, 128)]
    assert len(square) == 3 * 4
    assert len({tuple(value.flatten()[:8].tolist()) for value in square}) == len(square)


def test_it_never_changes() -> None:
    """A run's start must be the same in every later version."""
    value = initial_value("blocks.0.mlp.up.weight", (2, 3), ModelConfig(init_std=1.0), seed=7)
    assert value.flatten().tolist() == pytest.approx(PINNED, rel=1e-6)


def test_pieces_make_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(initial, "RUN", 100)
    for name, shape in (
        ("embedding.weight", (37, 9)),
        ("decoder.norm.weight", (333,)),
        ("decoder.blocks.0.mlp.up.bias", (333,)),
    ):
        whole = initial_value(name, shape, CONFIG, 3)
        assert whole.shape == shape and whole.dtype == torch.float32
        borders = [0, 1, 99, 100, 101, 250, 333]
        pieces = [initial_value(name, shape, CONFIG, 3, start, stop) for start, stop in itertools.pairwise(borders)]
        assert torch.equal(torch.cat(pieces), whole.flatten())
    assert initial_value("embedding.weight", (37, 9), CONFIG, 3, 5, 5).shape == (0,)


def test_runs_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(initial, "RUN", 100)
    value = initial_value("embedding.weight", (2, 100), CONFIG, 3)
    assert not torch.equal(value[0], value[1])


@pytest.mark.parametrize(
    ("init", "projection"), [("normal", 0.02), ("scaled", 0.02 / math.sqrt(6)), ("zero_projections", 0.0)]
)
@pytest.mark.parametrize("experts", [{}, {"num_experts": 4, "shared_size": 96, "shared_gate": True}])
def test_deviations(init: str, projection: float, experts: dict[str, Any]) -> None:
    config = ModelConfig(
        vocab_size=1000,
        hidden_size=128,
        num_layers=3,
        num_heads=4,
        init=init,  # type: ignore[arg-type]
        qk_norm=True,
        attention_bias=True,
        experts=ExpertsConfig(**experts),
    )
    projections = ("attention.output.weight", ".mlp.down.weight", ".mlp.down", ".mlp.shared.down.weight")
    for name, value in started(config, 1).items():
        if name.endswith("norm.weight"):
            assert torch.equal(value, torch.ones_like(value)), name
        elif name.endswith(".bias"):
            assert not value.any(), name
        else:
            expected = projection if name.endswith(projections) else 0.02
            # Four times the spread of a deviation and of a mean that are estimated from so many values.
            spread = 4 / math.sqrt(value.numel())
            assert value.std().item() == pytest.approx(expected, rel=spread), name
            assert abs(value.mean().item()) <= spread * expected, name


def deviation(name: str, **changes: Any) -> float:
    """Of a parameter of a model with such settings, exactly: what a value of deviation 1 is multiplied with."""
    shape = (8, 12)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(initial, "_normal", lambda *_: np.ones(96, np.float32))
        value = initial_value(name, shape, ModelConfig(vocab_size=100, num_heads=4, hidden_size=64, **changes), 3)
    assert len(value.unique()) == 1
    return value[0, 0].item()


def test_deviations_by_hand() -> None:
    """A stack's projections are divided by the root of the number of sums in its residual stream."""
    sides: dict[str, Any] = {"shape": "encoder_decoder", "num_layers": 2, "num_decoder_layers": 5, "init": "scaled"}
    for part in ("attention.output.weight", "mlp.down.weight", "cross_attention.output.weight"):
        assert deviation(f"decoder.blocks.1.{part}", **sides) == pytest.approx(0.02 / math.sqrt(3 * 5))
    for part in ("attention.output.weight", "mlp.down.weight"):
        assert deviation(f"encoder.blocks.1.{part}", **sides) == pytest.approx(0.02 / math.sqrt(2 * 2))
        assert deviation(f"decoder.blocks.1.{part}", num_layers=7, init="scaled") == pytest.approx(0.02 / math.sqrt(14))
    assert deviation("decoder.blocks.1.attention.key.weight", **sides) == pytest.approx(0.02)
    assert deviation("embedding.weight", init_std=0.5, **sides) == pytest.approx(0.5)
    # Scores are query times key times the scale: 1 / 4 as a rule, where heads are 16 wide.
    query = "decoder.blocks.1.attention.query.weight"
    assert deviation(query) == pytest.approx(0.02)
    assert deviation(query, attention_scale=1.0) == pytest.approx(0.02 / 4)
    assert deviation(query, attention_scale=0.25) == pytest.approx(0.02)
    # PyTorch's own initial values of a matrix of 12 inputs have the variance 1 / (3 * 12).
    assert deviation("decoder.blocks.1.attention.query.adapter.a") == pytest.approx(1 / 6)
    assert deviation("decoder.blocks.1.attention.query.adapter.b") == 0.0
    assert deviation("bigrams.table.weight", bigram_rows=50) == 0.0
    assert deviation("bigrams.widen.weight", bigram_rows=50, bigram_size=9) == pytest.approx(1 / 3)
