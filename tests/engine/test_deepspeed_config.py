"""The generated DeepSpeed JSON, and raw keys beside it."""

from __future__ import annotations

from typing import Any

import pytest
from engine.engines import Case

from bigtx.engine.deepspeed_config import deepspeed_config
from bigtx.utils.errors import ConfigError


def settings(stage: int = 1, world_size: int = 2, **fields: Any) -> dict[str, Any]:
    return deepspeed_config(Case(stage=stage, **fields).config(world_size), world_size=world_size)


def test_every_key_that_matters_is_written() -> None:
    written = settings(stage=3, precision="bf16", accumulation=2, offload=True, offload_parameters=True)
    assert written["train_batch_size"] == 8
    assert written["train_micro_batch_size_per_gpu"] == 2
    assert written["gradient_accumulation_steps"] == 2
    assert written["gradient_clipping"] == 0.5
    assert written["bf16"]["enabled"] and not written["fp16"]["enabled"]
    assert written["data_types"] == {"grad_accum_dtype": "fp32"}
    assert written["communication_data_type"] == "fp32"
    zero = written["zero_optimization"]
    assert (zero["stage"], zero["reduce_bucket_size"]) == (3, 20_000)
    assert zero["offload_optimizer"]["device"] == zero["offload_param"]["device"] == "cpu"
    # What DeepSpeed leaves to its defaults, which change between releases.
    assert {"overlap_comm", "reduce_scatter", "stage3_param_persistence_threshold", "sub_group_size"} <= zero.keys()


def test_raw_keys_are_added() -> None:
    raw = {
        "communication_data_type": "bf16",
        "comms_logger": {"enabled": True},
        "fp16": {"loss_scale_window": 100},
        "zero_optimization": {"stage3_max_live_parameters": 5},
    }
    plain, changed = settings(stage=3, precision="fp16"), settings(stage=3, precision="fp16", deepspeed=raw)
    assert changed["communication_data_type"] == "bf16"
    assert changed["comms_logger"] == {"enabled": True}
    assert changed["fp16"] == plain["fp16"] | {"loss_scale_window": 100}
    assert changed["zero_optimization"] == plain["zero_optimization"] | {"stage3_max_live_parameters": 5}
    assert settings(deepspeed={"zero_optimization": {"stage": 1}}) == settings(), "agreement is no contradiction"


@pytest.mark.parametrize(
    ("raw", "named"),
    [
        ({"zero_optimization": {"stage": 2}}, "engine.zero_stage"),
        ({"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}, "engine.offload_optimizer"),
        ({"bf16": {"enabled": True}}, "engine.precision"),
        ({"amp": {"enabled": True}}, "engine.precision"),
        ({"gradient_clipping": 3.0}, "train.gradient_clipping"),
        ({"train_batch_size": 16}, "train.global_batch_size"),
        ({"optimizer": {"type": "Adam"}}, "optimizer"),
        ({"scheduler": {"type": "WarmupLR"}}, "schedule"),
        ({"activation_checkpointing": {"partition_activations": True}}, "engine.activation_checkpointing"),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, "fp32"),
        ({"bf16": True}, "must be a section"),
        ({"zero_optimisation": {"stage": 1}}, "zero_optimization"),
    ],
)
def test_contradictions_name_both(raw: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError) as caught:
        settings(deepspeed=raw)
    key = next(iter(raw))
    assert f"deepspeed.{key}" in str(caught.value) and named in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"stage": 0, "precision": "fp16"}, "engine.precision=fp16"),
        ({"stage": 0, "offload": True}, "engine.offload_optimizer=cpu"),
        ({"stage": 2, "offload_parameters": True}, "engine.offload_parameters=cpu"),
    ],
)
def test_what_deepspeed_cannot_do_is_refused(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=rf"{named}.* needs engine\.zero_stage"):
        settings(**fields)


def test_null_takes_a_raw_key_back() -> None:
    raw = {"zero_optimization": {"stage": None}, "train_batch_size": None, "gradient_clipping": None}
    assert settings(deepspeed=raw) == settings()
