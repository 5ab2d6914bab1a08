"""Generate the DeepSpeed JSON from the typed config.

Every key that matters is written out, because DeepSpeed's own defaults change between releases. Raw keys of the
`deepspeed:` section are added at the end; one that contradicts a generated key is a problem of the config.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from bigtx.config.nodes import Problem, raise_problems
from bigtx.utils.shell import written

if TYPE_CHECKING:
    from bigtx.config.schema import RunConfig

DECIDED_BY = {
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.global_batch_size and train.micro_batch_size",
    "gradient_clipping": "train.gradient_clipping",
    "bf16.enabled": "engine.precision",
    "fp16.enabled": "engine.precision",
    "torch_autocast": "engine.precision",
    "amp": "engine.precision",
    "zero_optimization.stage": "engine.zero_stage",
    "zero_optimization.offload_optimizer": "engine.offload_optimizer",
    "zero_optimization.offload_param": "engine.offload_parameters",
    "zero_optimization.overlap_comm": "engine.overlap_communication",
    "zero_optimization.reduce_bucket_size": "engine.bucket_size",
    "zero_optimization.allgather_bucket_size": "engine.bucket_size",
    "activation_checkpointing": "engine.activation_checkpointing",
    "compile": "engine.compile",
    "optimizer": "optimizer",
    "scheduler": "schedule",
    "wandb": "track",
}
"""The typed field that decides a DeepSpeed key."""
RELIED_ON = (
    "data_types",
    "bf16.check_grad_overflow",
    "bf16.immediate_grad_update",
    "gradient_predivide_factor",
    "prescale_gradients",
    "timers.throughput.enabled",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
    "zero_optimization.mics_shard_size",
    "zero_optimization.zenflow",
    "zero_optimization.zero_hpz_partition_size",
    "zero_optimization.zero_quantized_gradients",
    "zero_optimization.zero_quantized_nontrainable_weights",
    "zero_optimization.zero_quantized_weights",
)
"""Keys that must keep the value that bigtx's steps, their speed and the checkpoints need."""
PASSED_ON = ("aio", "comms_logger", "csv_monitor", "flops_profiler", "sparse_gradients", "tensorboard")
"""Sections that are not generated and may be given raw. DeepSpeed silently ignores a misspelled section."""

OF_RANKS = ("deepspeed.train_micro_batch_size_per_gpu", "deepspeed.gradient_accumulation_steps")
"""Settings whose generated value depends on the number of ranks, so that only a run can compare them with it."""


LEAST_LIVE = 1_000_000_000
"""Parameters that a rank may hold gathered at stage 3 for a model of any size."""


def live_parameters(largest_block: int) -> int:
    """Return how many parameters a rank may hold gathered at stage 3: at least three blocks, so that two are gathered
    while another one is in use.
    """
    return max(LEAST_LIVE, 3 * largest_block)


def deepspeed_config(config: RunConfig, *, world_size: int, largest_block: int = 0) -> dict[str, Any]:
    """Return the JSON for `deepspeed.initialize`.

    Args:
        config: the config of the run.
        world_size: the number of ranks.
        largest_block: the parameters of the model's largest block, by which stage 3 gathers ahead.

    Raises:
        ConfigError: a raw key contradicts the typed fields or is unknown.
    """
    generated = _generated(config, world_size, largest_block)
    raise_problems(_merge_raw(generated, config.deepspeed, ""))
    return generated


def raw_problems(config: RunConfig) -> Iterator[Problem]:
    """Yield a problem for each raw key that contradicts a typed field or is unknown, for any number of ranks."""
    for problem in _merge_raw(_generated(config, world_size=1), config.deepspeed, ""):
        if problem.key not in OF_RANKS:
            yield problem


def _generated(config: RunConfig, world_size: int, largest_block: int = 0) -> dict[str, Any]:
    train, engine = config.train, config.engine
    stage, precision = engine.zero_stage, engine.precision
    return {
        "train_batch_size": train.global_batch_size,
        "train_micro_batch_size_per_gpu": train.micro_batch_size,
        "gradient_accumulation_steps": train.global_batch_size // (world_size * train.micro_batch_size),
        # At stage 0 the engine clips by itself: DeepSpeed reports no norm there.
        "gradient_clipping": train.gradient_clipping if stage > 0 else 0.0,
        "bf16": {
            "enabled": precision == "bf16" and stage > 0,
            "check_grad_overflow": True,
            # Each gradient is added to the fp32 sum, and freed, as soon as it is ready.
            "immediate_grad_update": True,
        },
        "fp16": {
            "enabled": precision == "fp16",
            "loss_scale": 0,
            "initial_scale_power": 16,
            "loss_scale_window": 1000,
            "hysteresis": 2,
            "consecutive_hysteresis": False,
            "min_loss_scale": 1,
        },
        # DeepSpeed accumulates in 16 bits without ZeRO, so there the weights stay fp32 and the arithmetic is cast.
        "torch_autocast": {"enabled": precision == "bf16" and stage == 0, "dtype": "bfloat16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "prescale_gradients": False,
        "gradient_predivide_factor": 1.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": _zero(config, largest_block),
        # DeepSpeed's own timer waits for the device before and after every micro batch.
        "timers": {"throughput": {"enabled": False}},
        "steps_per_print": None,
        "wall_clock_breakdown": False,
        "memory_breakdown": False,
        "dump_state": False,
    }


def _zero(config: RunConfig, largest_block: int) -> dict[str, Any]:
    engine = config.engine
    zero: dict[str, Any] = {
        "stage": engine.zero_stage,
        "overlap_comm": engine.overlap_communication,
        "contiguous_gradients": True,
        "reduce_scatter": True,
        "reduce_bucket_size": engine.bucket_size,
        "allgather_partitions": True,
        "allgather_bucket_size": engine.bucket_size,
        "round_robin_gradients": False,
        "ignore_unused_parameters": True,
    }
    if engine.offload_optimizer == "cpu":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    if engine.zero_stage == 3:
        zero |= {
            "sub_group_size": 1_000_000_000,
            # Blocks are gathered as a whole: with less than a block, a part of each would be gathered too late.
            "stage3_prefetch_bucket_size": max(engine.bucket_size, 2 * largest_block),
            "stage3_param_persistence_threshold": 100_000,
            "stage3_max_live_parameters": live_parameters(largest_block),
            "stage3_max_reuse_distance": 1_000_000_000,
            "stage3_gather_16bit_weights_on_model_save": False,
        }
        if engine.offload_parameters == "cpu":
            zero["offload_param"] = {"device": "cpu", "pin_memory": True}
    return zero


def _merge_raw(generated: dict[str, Any], raw: dict[str, Any], prefix: str) -> Iterator[Problem]:
    """Add raw keys to the generated ones, and yield a problem for each key that cannot be added."""
    for key, value in raw.items():
        if value is None:
            continue  # null cancels a line of a file.
        path, ours = prefix + str(key), generated.get(key)
        what = ""
        if path in DECIDED_BY or path in RELIED_ON:
            if ours != value:
                what = _contradiction(path, ours)
        elif isinstance(ours, dict):
            if isinstance(value, dict):
                yield from _merge_raw(ours, value, path + ".")
            else:
                what = f"must be a section; its keys are {', '.join(ours)}"
        elif prefix or key in generated or key in PASSED_ON:
            generated[key] = value
        else:
            known = sorted({*generated, *PASSED_ON})
            what = f"is not a key that bigtx passes to DeepSpeed; the known keys are {', '.join(known)}"
        if what:
            yield Problem(f"deepspeed.{path}", written(value), what)


def _contradiction(path: str, ours: Any) -> str:
    if path in RELIED_ON:
        needed = "without this key" if ours is None else f"with {ours}"
        return f"bigtx works only {needed}; leave it out, or write deepspeed.{path}=null"
    field = DECIDED_BY[path]
    sets = "decides about this key" if ours is None else f"sets it to {written(ours)}"
    return f"contradicts {field}, which {sets}; leave it out (deepspeed.{path}=null) and set {field} instead"
