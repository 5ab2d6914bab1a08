"""Every setting of the section `model` changes the model: its parameters, what it hears, or its losses."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from bigtx.config.schema import ModelConfig
from bigtx.config.settings import leaves
from bigtx.finetuning.tasks.speech import LogMel
from bigtx.model.experts import routing_loss
from bigtx.model.transformer import Transformer

BASE: dict[str, Any] = {
    "vocab_size": 70,
    "hidden_size": 32,
    "num_layers": 2,
    "num_heads": 4,
    "max_sequence_length": 40,
    "init_std": 0.25,
}
EXPERTS = {"experts.num_experts": 4}
AUDIO = {"shape": "encoder", "audio.num_mel_bins": 16}
LLAMA3 = {"rope_scaling.method": "llama3", "rope_scaling.factor": 4.0, "rope_scaling.original_length": 64}
YARN = {
    "rope_scaling.method": "yarn",
    "rope_scaling.factor": 4.0,
    "rope_scaling.original_length": 4096,
    "head_width": 32,
}
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "shape": ("encoder", {}),
    "vocab_size": (90, {}),
    "hidden_size": (64, {}),
    "num_layers": (3, {}),
    "num_decoder_layers": (1, {"shape": "encoder_decoder"}),
    "num_heads": (2, {}),
    "num_kv_heads": (2, {}),
    "head_width": (16, {}),
    "mlp": ("relu", {}),
    "mlp_size": (48, {}),
    "experts.num_experts": (4, {}),
    "experts.num_active": (3, EXPERTS),
    "experts.expert_size": (16, EXPERTS),
    "experts.shared_size": (16, EXPERTS),
    "experts.shared_gate": (True, EXPERTS | {"experts.shared_size": 16}),
    "experts.normalize_weights": (False, EXPERTS),
    "experts.balance_loss": (1.0, EXPERTS),
    "experts.router_z_loss": (0.1, EXPERTS),
    "audio.num_mel_bins": (16, {"shape": "encoder"}),
    "audio.sample_rate": (8000, AUDIO),
    "audio.window_ms": (40.0, AUDIO),
    "audio.hop_ms": (20.0, AUDIO),
    "audio.strides": ([2], AUDIO),
    "norm": ("layer", {}),
    "norm_placement": ("post", {}),
    "embedding_norm": (True, {}),
    "bigram_rows": (64, {}),
    "bigram_size": (16, {"bigram_rows": 64}),
    "norm_eps": (0.1, {}),
    "norm_scale": (False, {}),
    "norm_bias": (True, {"norm": "layer"}),
    "qk_norm": (True, {}),
    "attention_scale": (1.0, {}),
    "attention_window": (3, {}),
    "global_attention_every": (2, {"attention_window": 3}),
    "prefix_attention": (True, {}),
    "positions": ("learned", {}),
    "position_offset": (2, {"positions": "learned"}),
    "rope_theta": (100.0, {}),
    "local_rope_theta": (100.0, {"attention_window": 3}),
    "rope_scaling.method": ("linear", {"rope_scaling.factor": 4.0}),
    "rope_scaling.factor": (4.0, {"rope_scaling.method": "linear"}),
    "rope_scaling.original_length": (64, {"rope_scaling.method": "llama3", "rope_scaling.factor": 4.0}),
    "rope_scaling.low_frequency_factor": (0.5, LLAMA3),
    "rope_scaling.high_frequency_factor": (8.0, LLAMA3),
    "rope_scaling.beta_fast": (8.0, YARN),
    "rope_scaling.beta_slow": (4.0, YARN),
    "relative_num_buckets": (16, {"positions": "relative"}),
    "relative_max_distance": (20, {"positions": "relative"}),
    "max_sequence_length": (48, {"positions": "learned"}),
    "num_token_types": (2, {}),
    "attention_bias": (True, {}),
    "attention_output_bias": (True, {}),
    "mlp_bias": (True, {}),
    "tie_embeddings": (True, {}),
    "head_bias": (True, {}),
    "head_transform": (True, {}),
    "num_classes": (3, {}),
    "class_head": ("pooler", {"num_classes": 3}),
    "dropout": (0.5, {}),
    "attention_dropout": (0.5, {}),
    "lora.rank": (2, {}),
    "lora.alpha": (2.0, {"lora.rank": 2}),
    "lora.dropout": (0.5, {"lora.rank": 2}),
    "lora.targets": (["mlp.*"], {"lora.rank": 2}),
    "logit_scale": (0.5, {}),
    "logit_soft_cap": (3.0, {}),
    "init_std": (0.1, {}),
    "init": ("normal", {}),
}
"""A value of each setting other than its default, and what else has to be set for it to matter."""


def config_of(settings: dict[str, Any]) -> ModelConfig:
    config = ModelConfig()
    for key, value in settings.items():
        section, _, name = key.rpartition(".")
        if section:
            name, value = section, dataclasses.replace(getattr(config, section), **{name: value})
        config = dataclasses.replace(config, **{name: value})
    return config


def behaviour(settings: dict[str, Any]) -> tuple[dict[str, tuple[int, ...]], list[float]]:
    """The shapes of all parameters, and what the model makes of a text, or of a sound."""
    config = config_of(BASE | settings)
    model = Transformer(config)
    model.init_weights(1)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1 or name == "bigrams.table.weight" or name.endswith("adapter.b"):
            parameter.data.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
    tokens = torch.arange(48).view(2, 24) * 7 % 70
    labels = tokens.roll(-1, dims=1)
    inputs: dict[str, Any] = {"tokens": tokens, "labels": labels, "sequence_ids": torch.tensor([3, 4])}
    if config.audio.num_mel_bins:
        wave = np.random.default_rng(1).standard_normal(8000).astype(np.float32)
        features = LogMel(config.audio)(wave)[None]
        inputs = {
            "features": features,
            "feature_lengths": torch.tensor([features.shape[1]]),
            "sequence_ids": torch.tensor([3]),
        }
    if config.shape == "encoder_decoder":
        inputs["target_tokens"] = tokens.flip(1)
    if config.prefix_attention:
        inputs["prefix_mask"] = torch.arange(24)[None] < torch.tensor([[6], [9]])
    if config.num_classes:
        inputs["pool"] = torch.full((2, 24), 1 / 24)
        del inputs["labels"]
    found = model.train()(**inputs)
    numbers = [(found if torch.is_tensor(found) else found.loss_sum).sum().item()]
    if config.experts.num_experts:
        numbers.append(routing_loss(found.routing, torch.tensor([0.4, 0.3, 0.2, 0.1]), config.experts).item())
    assert all(map(np.isfinite, numbers))
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}, numbers


def test_every_setting_is_tried() -> None:
    assert set(CASES) == {setting.key for setting in leaves(ModelConfig)}


@pytest.mark.parametrize("key", CASES)
def test_it_changes_the_model(key: str) -> None:
    value, context = CASES[key]
    assert key not in context
    assert behaviour(context) == behaviour(context), "nothing else differs from one model to the next"
    assert behaviour(context | {key: value}) != behaviour(context)
