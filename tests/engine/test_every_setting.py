"""Every setting of the sections `optimizer`, `schedule` and `engine` does something: another value, other numbers."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn

from bigtx.config.deepspeed import deepspeed_config
from bigtx.config.schema import LoraConfig, ModelConfig, OptimizerConfig, PretrainConfig, ScheduleConfig
from bigtx.config.settings import leaves
from bigtx.engine.fragments import Fragment
from bigtx.engine.optimizers import Optimizer, Schedule
from bigtx.engine.trainable import frozen_parameters, parameter_groups

NAMES = {
    "embedding.weight": (6, 4),
    "decoder.blocks.0.mlp.up.weight": (8, 4),
    "decoder.blocks.1.mlp.up.weight": (8, 4),
    "decoder.blocks.1.mlp.up.adapter.a": (2, 4),
    "decoder.norm.weight": (4,),
}
MUON = {"name": "muon"}
OPTIMIZER: dict[str, tuple[Any, dict[str, Any]]] = {
    "name": ("muon", {}),
    "learning_rate": (1e-2, {}),
    "beta1": (0.5, {}),
    "beta2": (0.5, {}),
    "eps": (0.1, {}),
    "weight_decay": (0.5, {}),
    "decay_embeddings": (False, {}),
    "embedding_learning_rate_scale": (0.5, {}),
    "muon_learning_rate": (0.1, MUON),
    "muon_momentum": (0.5, MUON),
    "muon_num_iterations": (2, MUON),
    "muon_weight_decay": (0.5, MUON),
    "freeze": (["embedding.*"], {}),
    "train_also": (["*norm*"], {}),
    "layer_decay": (0.5, {}),
    "ema_decay": (0.5, {}),
}
"""A value of each setting other than its default, and what else has to be set for it to matter."""
SCHEDULE: dict[str, tuple[Any, dict[str, Any], dict[int, tuple[float, float]]]] = {
    "name": ("constant", {}, {99: (0.1, 1.0)}),
    "warmup": ("10 steps", {}, {5: (0.996, 0.5)}),
    "decay": ("50 %", {"name": "warmup_stable_decay"}, {75: (1.0, 0.55)}),
    "minimum_factor": (0.5, {}, {100: (0.1, 0.5)}),
}
"""The same; and at some steps the factor by default and with the value."""


def updated(settings: dict[str, Any]) -> dict[str, Any]:
    """The parameters and the averages of them after three updates; None for what is frozen."""
    config = OptimizerConfig(**settings)
    model = ModelConfig(lora=LoraConfig(rank=2 if "train_also" in settings else 0))
    frozen = frozen_parameters(PretrainConfig(optimizer=config, model=model), NAMES)
    generator = torch.Generator().manual_seed(1)
    parameters = {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in NAMES.items()}
    for name in frozen:
        parameters[name].requires_grad_(False)
    groups = parameter_groups(config, parameters.items())
    optimizer = Optimizer(groups, config, torch.float32, torch.device("cpu"))
    places = [(number, flat) for number, group in enumerate(optimizer.param_groups) for flat in group["params"]]
    names = {id(parameter): name for name, parameter in parameters.items()}
    held = [Fragment(names[id(flat)], tuple(flat.shape), 0, flat.numel(), number, flat, 0) for number, flat in places]
    optimizer.bind(held, places, replicated=True)
    for _ in range(3):
        for parameter in parameters.values():
            gradient = torch.randn(parameter.shape, generator=generator)
            parameter.grad = gradient if parameter.requires_grad else None
        optimizer.step()
    found: dict[str, Any] = {name: None for name in frozen}
    for _, flat in places:
        average = optimizer.state[flat].get("ema")
        found[names[id(flat)]] = flat.tolist(), None if average is None else average.tolist()
    return found


def test_every_setting_is_tried() -> None:
    assert set(OPTIMIZER) == {setting.key for setting in leaves(OptimizerConfig)}
    assert set(SCHEDULE) == {setting.key for setting in leaves(ScheduleConfig)}


@pytest.mark.parametrize("key", OPTIMIZER)
def test_the_optimizer(key: str) -> None:
    value, context = OPTIMIZER[key]
    if key == "train_also":
        with_adapters = LoraConfig(rank=2)
        frozen = [
            frozen_parameters(
                PretrainConfig(optimizer=OptimizerConfig(train_also=globs), model=ModelConfig(lora=with_adapters)),
                NAMES,
            )
            for globs in ([], value)
        ]
        assert set(frozen[0]) - set(frozen[1]) == {"decoder.norm.weight"}
        return
    before = updated(context)
    assert before == updated(context)
    after = updated(context | {key: value})
    changed = {name for name in NAMES if before[name] != after[name]}
    assert changed == {
        "decay_embeddings": {"embedding.weight"},
        "embedding_learning_rate_scale": {"embedding.weight"},
        "freeze": {"embedding.weight"},
        "weight_decay": {name for name in NAMES if "norm" not in name},
        "layer_decay": {"embedding.weight", "decoder.blocks.0.mlp.up.weight"},
        "name": {name for name in NAMES if name.endswith("up.weight")},
    }.get(key, {name for name in NAMES if name.endswith("up.weight")} if context else set(NAMES))


@pytest.mark.parametrize("key", SCHEDULE)
def test_the_schedule(key: str) -> None:
    value, context, expected = SCHEDULE[key]
    factors = [
        Schedule(ScheduleConfig(**context, **changes), total_steps=100, tokens_per_step=1)
        for changes in ({}, {key: value})
    ]
    for step, both in expected.items():
        assert [schedule.factor(step) for schedule in factors] == pytest.approx(both, abs=2e-3)


@pytest.mark.parametrize(
    ("key", "value", "context", "keys"),
    [
        ("engine.zero_stage", 2, {}, {"zero_optimization.stage"}),
        ("engine.precision", "fp16", {}, {"bf16.enabled", "fp16.enabled"}),
        ("engine.offload_optimizer", "cpu", {}, {"zero_optimization.offload_optimizer"}),
        ("engine.offload_parameters", "cpu", {"engine.zero_stage": 3}, {"zero_optimization.offload_param"}),
        ("engine.overlap_communication", False, {}, {"zero_optimization.overlap_comm"}),
        ("engine.bucket_size", 1000, {}, {f"zero_optimization.{name}_bucket_size" for name in ("reduce", "allgather")}),
        ("train.gradient_clipping", 0.5, {}, {"gradient_clipping"}),
        ("train.global_batch_size", 64, {}, {"train_batch_size", "gradient_accumulation_steps"}),
        ("train.micro_batch_size", 8, {}, {"train_micro_batch_size_per_gpu", "gradient_accumulation_steps"}),
        ("deepspeed", {"comms_logger": {"enabled": True}}, {}, {"comms_logger.enabled"}),
    ],
)
def test_what_deepspeed_is_told(key: str, value: Any, context: dict[str, Any], keys: set[str]) -> None:
    told = [flat(deepspeed_config(changed(context | changes), world_size=1)) for changes in ({}, {key: value})]
    assert {name for name in told[0].keys() | told[1].keys() if told[0].get(name) != told[1].get(name)} == keys


def changed(settings: dict[str, Any]) -> PretrainConfig:
    config = PretrainConfig()
    for key, value in settings.items():
        name, _, inner = key.partition(".")
        section = dataclasses.replace(getattr(config, name), **{inner: value}) if inner else value
        config = dataclasses.replace(config, **{name: section})
    return config


def flat(section: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in section.items():
        nested = isinstance(value, dict) and value and not name.startswith("offload")
        found |= flat(value, f"{prefix}{name}.") if nested else {prefix + name: value}
    return found
