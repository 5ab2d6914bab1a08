"""The generated DeepSpeed JSON, and raw keys beside it."""

from __future__ import annotations

from typing import Any

import pytest
from engine.engines import Case

from bigtx.config.deepspeed import deepspeed_config
from bigtx.config.schema import EngineConfig, PretrainConfig
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
        ({"timers": {"throughput": {"enabled": True}}}, "bigtx works only with False"),
        ({"prescale_gradients": True}, "bigtx works only with False"),
        ({"gradient_predivide_factor": 2.0}, "bigtx works only with 1.0"),
        ({"zero_optimization": {"zero_hpz_partition_size": 8}}, "bigtx works only without this key"),
        ({"zero_optimization": {"zero_quantized_weights": True}}, "bigtx works only without this key"),
        ({"bf16": True}, "must be a section"),
        ({"zero_optimisation": {"stage": 1}}, "zero_optimization"),
    ],
)
def test_contradictions_name_both(raw: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError) as caught:
        settings(deepspeed=raw)
    key = next(iter(raw))
    assert f"deepspeed.{key}" in str(caught.value) and named in str(caught.value)


def test_null_takes_a_raw_key_back() -> None:
    raw = {"zero_optimization": {"stage": None}, "train_batch_size": None, "gradient_clipping": None}
    assert settings(deepspeed=raw) == settings()


SWITCHES = [
    # stage, precision, bf16, fp16, autocast
    (0, "fp32", False, False, False),
    (0, "bf16", False, False, True),
    (1, "bf16", True, False, False),
    (3, "bf16", True, False, False),
    (2, "fp16", False, True, False),
    (3, "fp32", False, False, False),
]


@pytest.mark.parametrize(("stage", "precision", "bf16", "fp16", "autocast"), SWITCHES)
def test_the_arithmetic_of_each_stage_and_precision(
    stage: int, precision: Any, bf16: bool, fp16: bool, autocast: bool
) -> None:
    """At stage 0 the engine casts and clips by itself. The loss scale begins at 2^16, and waits 1000 steps to rise."""
    config = PretrainConfig(run_dir="unused", engine=EngineConfig(zero_stage=stage, precision=precision))
    config.train.global_batch_size, config.train.micro_batch_size, config.train.gradient_clipping = 48, 4, 0.5
    made = deepspeed_config(config, world_size=3)
    assert made["bf16"] == {"enabled": bf16, "check_grad_overflow": True, "immediate_grad_update": True}
    assert made["fp16"] == {
        "enabled": fp16,
        "loss_scale": 0,
        "initial_scale_power": 16,
        "loss_scale_window": 1000,
        "hysteresis": 2,
        "consecutive_hysteresis": False,
        "min_loss_scale": 1,
    }
    assert made["torch_autocast"] == {"enabled": autocast, "dtype": "bfloat16"}
    assert made["gradient_clipping"] == (0.5 if stage else 0.0)
    assert made["data_types"] == {"grad_accum_dtype": "fp32"} and made["communication_data_type"] == "fp32"
    batches = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    assert [made[name] for name in batches] == [48, 4, 4]
    assert made["timers"] == {"throughput": {"enabled": False}}
    assert not made["prescale_gradients"] and made["gradient_predivide_factor"] == 1.0


@pytest.mark.parametrize(("stage", "parameters"), [(1, "none"), (3, "none"), (3, "cpu")])
def test_what_is_sharded_and_where_it_is_kept(stage: int, parameters: Any) -> None:
    engine = EngineConfig(
        zero_stage=stage,
        offload_optimizer="cpu",
        offload_parameters=parameters,
        bucket_size=123,
        overlap_communication=False,
    )
    made = deepspeed_config(PretrainConfig(run_dir="unused", engine=engine), world_size=1)["zero_optimization"]
    on_cpu = {"device": "cpu", "pin_memory": True}
    expected = {
        "stage": stage,
        "overlap_comm": False,
        "contiguous_gradients": True,
        "reduce_scatter": True,
        "reduce_bucket_size": 123,
        "allgather_partitions": True,
        "allgather_bucket_size": 123,
        "round_robin_gradients": False,
        "ignore_unused_parameters": True,
        "offload_optimizer": on_cpu,
    }
    if stage == 3:
        expected |= {
            "sub_group_size": 10**9,
            "stage3_prefetch_bucket_size": 123,
            "stage3_param_persistence_threshold": 10**5,
            "stage3_max_live_parameters": 10**9,
            "stage3_max_reuse_distance": 10**9,
            "stage3_gather_16bit_weights_on_model_save": False,
        }
    if parameters == "cpu":
        expected["offload_param"] = on_cpu
    assert made == expected


def test_blocks_are_gathered_ahead_as_a_whole() -> None:
    """Stage 3 of a model with blocks of 400M parameters, and of one with small blocks."""
    config = PretrainConfig(run_dir="unused", engine=EngineConfig(zero_stage=3))
    large = deepspeed_config(config, world_size=1, largest_block=400_000_000)["zero_optimization"]
    small = deepspeed_config(config, world_size=1, largest_block=7_000_000)["zero_optimization"]
    names = ("stage3_prefetch_bucket_size", "stage3_max_live_parameters")
    assert [large[name] for name in names] == [800_000_000, 1_200_000_000]
    assert [small[name] for name in names] == [50_000_000, 1_000_000_000]
    raw = {"zero_optimization": {"stage3_prefetch_bucket_size": 5}}
    config.deepspeed = raw
    assert deepspeed_config(config, world_size=1)["zero_optimization"]["stage3_prefetch_bucket_size"] == 5
