"""Adapters in the model: what they add, where they are, and how they begin."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from bigtx.config.load import load
from bigtx.config.runs import shipped_configs
from bigtx.config.schema import ExpertsConfig, FinetuneConfig, LoraConfig, ModelConfig, PretrainConfig
from bigtx.config.shape import adapted_matrices, useless_targets
from bigtx.engine.trainable import layer_factors, parameter_groups
from bigtx.model.initial import initial_value
from bigtx.model.layers import Adapter, Linear
from bigtx.model.size import count_parameters, flops_per_token, parameter_shapes
from bigtx.model.transformer import Transformer

MODEL = ModelConfig(vocab_size=200, hidden_size=32, num_layers=3, num_heads=4, max_sequence_length=32)
SHAPES: dict[str, dict[str, Any]] = {
    "decoder": {},
    "encoder": {"shape": "encoder", "norm": "layer", "mlp": "gelu", "attention_bias": True, "mlp_bias": True},
    "encoder_decoder": {"shape": "encoder_decoder", "positions": "relative", "num_decoder_layers": 2},
    "experts": {"experts": ExpertsConfig(num_experts=4, shared_size=32, shared_gate=True)},
    "experts alone": {"experts": ExpertsConfig(num_experts=4)},
}


def model_of(**fields: Any) -> tuple[ModelConfig, Transformer]:
    config = dataclasses.replace(MODEL, **fields)
    model = Transformer(config)
    model.init_weights(1)
    return config, model.eval()


def logits(model: Transformer) -> torch.Tensor:
    tokens = torch.arange(24).view(2, 12) * 7 % 200
    with torch.no_grad():
        return model(tokens, target_tokens=tokens if model.config.shape == "encoder_decoder" else None)


@pytest.mark.parametrize("name", SHAPES)
def test_new_adapters_change_nothing_and_trained_ones_what_a_sum_of_matrices_would(name: str) -> None:
    lora = LoraConfig(rank=4, alpha=6)
    config, adapted = model_of(lora=lora, **SHAPES[name])
    _, plain = model_of(**SHAPES[name])
    assert {key: tuple(value.shape) for key, value in adapted.named_parameters()} == parameter_shapes(config)
    assert count_parameters(config).total == sum(parameter.numel() for parameter in adapted.parameters())
    weights = dict(plain.named_parameters())
    assert all(torch.equal(value, weights[key]) for key, value in adapted.named_parameters() if ".adapter." not in key)
    assert torch.equal(logits(adapted), logits(plain))
    with torch.no_grad():
        for key in adapted_matrices(config):
            adapter = adapted.get_submodule(key).adapter
            assert isinstance(adapter, Adapter)
            adapter.b.normal_(std=0.3)
            weights[f"{key}.weight"].add_(adapter.b @ adapter.a, alpha=1.5)
    assert torch.allclose(logits(adapted), logits(plain), atol=1e-5)
    assert not torch.allclose(logits(adapted), logits(model_of(**SHAPES[name])[1]), atol=1e-3)


@pytest.mark.parametrize("name", [name for name in shipped_configs() if not name.startswith("data/")])
def test_the_names_of_matrices_are_those_of_the_module(name: str) -> None:
    """Without a list of targets all matrices of the blocks have adapters, but for those that score and mix experts."""
    schema = FinetuneConfig if name.startswith("finetune/") else PretrainConfig
    model = load(schema, [name], check=False).model
    config = dataclasses.replace(model, vocab_size=200, num_layers=min(3, model.num_layers), lora=LoraConfig(rank=1))
    if model.num_decoder_layers:
        config.num_decoder_layers = 2
    with torch.device("meta"):
        module = Transformer(config)
    matrices = [key for key, part in module.named_modules() if isinstance(part, Linear) and ".blocks." in key]
    assert sorted(adapted_matrices(config)) == sorted(
        key for key in matrices if not key.endswith((".router", ".shared_gate"))
    )


def test_where_adapters_are() -> None:
    def ends(targets: list[str], **fields: Any) -> list[str]:
        config = dataclasses.replace(MODEL, num_layers=2, lora=LoraConfig(rank=1, targets=targets), **fields)
        assert not useless_targets(config) and not list(config.problems())
        return adapted_matrices(config)

    assert len(ends([])) == 2 * 7
    assert ends(["attention.query"]) == [f"decoder.blocks.{layer}.attention.query" for layer in (0, 1)]
    assert ends(["decoder.blocks.1.mlp.*"]) == [f"decoder.blocks.1.mlp.{part}" for part in ("gate", "up", "down")]
    assert ends(["cross_attention.*", "*.value"], shape="encoder_decoder", positions="relative") == [
        *(f"encoder.blocks.{layer}.attention.value" for layer in (0, 1)),
        *(
            f"decoder.blocks.{layer}.{part}"
            for layer in (0, 1)
            for part in (
                "attention.value",
                *(f"cross_attention.{name}" for name in ("query", "key", "value", "output")),
            )
        ),
    ]
    # The experts' own matrices, the router and the gate of the shared expert have none.
    assert {name.split(".", 3)[3] for name in ends(["mlp.*"], **SHAPES["experts"])} == {
        f"mlp.shared.{part}" for part in ("gate", "up", "down")
    }


def test_targets_that_find_nothing() -> None:
    for targets, fields, expected in (
        (["atention.query"], {}, "attention.query"),
        (["cross_attention.*"], {}, "matches no matrix of a block"),
        (["mlp.up"], SHAPES["experts alone"], "matrices of a mixture's experts, and its router, have no adapters"),
    ):
        config = dataclasses.replace(MODEL, lora=LoraConfig(rank=2, targets=targets), **fields)
        (problem,) = config.problems()
        assert problem.key == "model.lora.targets" and expected in str(problem), problem
    # Similar names, or all of them if none is similar.
    lora = LoraConfig(rank=2, targets=["atention.query", "zzz", "mlp.up"])
    attention, mlp = [f"attention.{part}" for part in ("query", "key", "value", "output")], ["gate", "up", "down"]
    assert useless_targets(dataclasses.replace(MODEL, lora=lora)) == {
        "atention.query": attention[:3],
        "zzz": [*attention, *(f"mlp.{part}" for part in mlp)],
    }
    (problem,) = dataclasses.replace(MODEL, lora=LoraConfig(targets=["mlp.*"])).problems()
    assert "has no effect without model.lora.rank" in str(problem)


def test_initial_values() -> None:
    name, shape = "decoder.blocks.0.mlp.down.adapter.a", (64, 256)
    a = initial_value(name, shape, MODEL, 1)
    assert a.std() == pytest.approx((3 * 256) ** -0.5, rel=0.02)
    assert torch.equal(initial_value(name, shape, MODEL, 1, 300, 5000), a.view(-1)[300:5000])
    assert not initial_value("decoder.blocks.0.mlp.down.adapter.b", (256, 64), MODEL, 1).any()


def test_dropout_is_of_what_an_adapter_reads_and_of_rows_with_a_seed_alone() -> None:
    adapter, other = (Adapter(LoraConfig(rank=2, dropout=0.5), 64, 64, name) for name in ("mlp.up", "mlp.gate"))
    torch.nn.init.ones_(adapter.a)
    torch.nn.init.ones_(adapter.b)
    x = torch.ones(3, 64)
    assert torch.equal(adapter(x), torch.full((3, 64), 8 * 2 * 64.0))
    seeds = torch.tensor([10**15, 10**16, 10**17])
    assert adapter(x, seeds).unique().numel() > 1
    assert not torch.equal(adapter.dropout(x, seeds), other.dropout(x, seeds))


def test_a_step_of_adapters_costs_less() -> None:
    config = dataclasses.replace(MODEL, lora=LoraConfig(rank=1))
    assert 0.6 < flops_per_token(config, 16) / flops_per_token(MODEL, 16) < 0.95


def test_layers_and_their_rates() -> None:
    names = [name for name in parameter_shapes(dataclasses.replace(MODEL, **SHAPES["encoder_decoder"]))]
    factors = layer_factors(names, 0.5)
    assert factors["embedding.weight"] == factors["decoder.relative_bias.table.weight"] == 0.125
    assert [factors[f"encoder.blocks.{layer}.mlp.up.weight"] for layer in range(3)] == [0.25, 0.5, 1.0]
    assert [factors[f"decoder.blocks.{layer}.cross_attention.key.weight"] for layer in range(2)] == [0.5, 1.0]
    assert factors["head.weight"] == factors["encoder.norm.weight"] == factors["decoder.norm.weight"] == 1.0
    assert set(layer_factors(names, 1.0).values()) == {1.0}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_adapters_are_adamws_in_any_case(optimizer: str) -> None:
    from bigtx.config.schema import OptimizerConfig

    config, model = model_of(lora=LoraConfig(rank=2))
    settings = OptimizerConfig(name=optimizer, layer_decay=0.5)  # type: ignore[arg-type]
    groups = parameter_groups(settings, model.named_parameters())
    of_adapters = [group for group in groups if group["name"] == "adapters"]
    assert [group["peak_learning_rate"] for group in of_adapters] == [3e-4, 1.5e-4, 0.75e-4]
    assert {group["method"] for group in of_adapters} == {"adamw"}
    held = sum(len(group["params"]) for group in of_adapters)
    assert held == 2 * len(adapted_matrices(config))
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
