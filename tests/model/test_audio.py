"""The front end is the convolutions that it says, and a model that hears gives each recording what it gives alone."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from bigtx.config.schema import AudioConfig, ModelConfig
from bigtx.model.cache import KeyValueCache
from bigtx.model.embed import FrontEnd
from bigtx.model.size import count_parameters, flops_per_row, parameter_shapes
from bigtx.model.transformer import Transformer

BINS = 6


def hearing(**changes: Any) -> ModelConfig:
    strides = changes.pop("strides", [1, 2])
    audio = AudioConfig(num_mel_bins=BINS, strides=strides)
    sizes = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "vocab_size": 70, "max_sequence_length": 40}
    return ModelConfig(**{**sizes, "init_std": 0.2, "audio": audio, **changes})


def model_of(config: ModelConfig) -> Transformer:
    model = Transformer(config)
    model.init_weights(1)
    return model.eval()


@pytest.mark.parametrize("strides", [[1, 2], [2], [2, 2], [1, 1, 3]])
def test_the_convolutions_are_those_of_torch(strides: list[int]) -> None:
    config = hearing(strides=strides)
    front = FrontEnd(config)
    generator = torch.Generator().manual_seed(1)
    for parameter in front.parameters():
        parameter.data.normal_(generator=generator)
    features = torch.randn(2, 23, BINS, generator=generator)
    x = features.transpose(1, 2)
    for convolution, stride in zip(front.convolutions, strides, strict=True):
        weight = convolution.weight.view(16, 3, -1).transpose(1, 2)  # type: ignore[operator]
        x = F.gelu(F.conv1d(x, weight, convolution.bias, stride=stride, padding=1))  # type: ignore[arg-type]
    columns, lengths = front(features, torch.tensor([23, 23]))
    torch.testing.assert_close(columns, x.transpose(1, 2), rtol=1e-4, atol=1e-4)
    assert lengths.tolist() == [columns.shape[1]] * 2


KINDS: dict[str, dict[str, Any]] = {
    "encoder": {"shape": "encoder"},
    "encoder, three": {"shape": "encoder", "strides": [2, 2, 2], "embedding_norm": True, "norm": "layer"},
    "learned": {"shape": "encoder_decoder", "positions": "learned", "num_decoder_layers": 1},
    "sinusoidal": {"shape": "encoder_decoder", "positions": "sinusoidal", "tie_embeddings": True},
    "relative": {"shape": "encoder_decoder", "positions": "relative", "num_token_types": 2},
}


@pytest.mark.parametrize("kind", KINDS)
def test_padding_is_not_heard(kind: str) -> None:
    model = model_of(hearing(**KINDS[kind]))
    lengths, generator = (37, 12, 25), torch.Generator().manual_seed(1)
    recordings = [torch.randn(1, length, BINS, generator=generator) for length in lengths]
    batch = torch.cat([F.pad(own, (0, 0, 0, 48 - own.shape[1]), value=5.0) for own in recordings])
    target = torch.randint(0, 70, (3, 5), generator=generator)
    decodes = model.decoder is not None
    texts = {"target_tokens": target} if decodes else {}
    together = model(features=batch, feature_lengths=torch.tensor(lengths), **texts)
    for row, own in enumerate(recordings):
        texts = {"target_tokens": target[row : row + 1]} if decodes else {}
        alone = model(features=own, feature_lengths=torch.tensor([own.shape[1]]), **texts)
        torch.testing.assert_close(together[row, : alone.shape[1]], alone[0], rtol=1e-4, atol=1e-4)
    other = model(
        features=batch.flip(0), feature_lengths=torch.tensor(lengths[::-1]), **texts and {"target_tokens": target}
    )
    assert (other[0] - together[0]).abs().max() > 1e-3, "what is heard matters"


def test_a_cache_goes_on_from_what_was_heard() -> None:
    config = hearing(shape="encoder_decoder")
    model, target = model_of(config), torch.randint(0, 70, (2, 6), generator=torch.Generator().manual_seed(2))
    heard = {"features": torch.randn(2, 30, BINS), "feature_lengths": torch.tensor([30, 14])}
    at_once = model(**heard, target_tokens=target)
    cache = KeyValueCache(config.num_layers)
    parts = []
    for place in range(6):
        positions = torch.full((2, 1), place)
        own = heard if place == 0 else {}
        parts.append(model(**own, target_tokens=target[:, place : place + 1], target_positions=positions, cache=cache))
    torch.testing.assert_close(torch.cat(parts, dim=1), at_once, rtol=1e-4, atol=1e-4)


def test_parameters_are_counted_as_they_are_built() -> None:
    choices: dict[str, list[Any]] = {
        "shape": ["encoder", "encoder_decoder"],
        "positions": ["rope", "learned"],
        "strides": [[2], [1, 2], [2, 2, 2]],
        "tie_embeddings": [False, True],
    }
    for values in itertools.product(*choices.values()):
        config = hearing(**dict(zip(choices, values, strict=True)))
        if config.shape == "encoder" and config.tie_embeddings:
            continue  # The config's rules refuse it.
        with torch.device("meta"):
            model = Transformer(config)
        built = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        assert parameter_shapes(config) == built
        assert ("embedding.weight" in built) == (config.shape == "encoder_decoder")
        assert count_parameters(config).total == sum(parameter.numel() for parameter in model.parameters())


def test_arithmetic_of_the_front_end() -> None:
    """Whisper's: a product of 3 M D for each frame, one of 3 D D for each column."""
    config, silent = hearing(shape="encoder"), hearing(shape="encoder")
    silent.audio = AudioConfig()
    more = flops_per_row(config, source=10, target=0, predicted=10) - flops_per_row(
        silent, source=10, target=0, predicted=10
    )
    assert more == 6 * (20 * 3 * BINS * 16 + 10 * 3 * 16 * 16)
