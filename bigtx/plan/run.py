"""Estimates of a run before it starts: steps, memory, time and communication, computed only from its config.

Communication is what DeepSpeed 0.19 sends under bigtx's settings, at the bandwidths below, without overlap with
arithmetic. In practice they overlap in part, so a step takes between the longer of the two and their sum. None of these
estimates was measured on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bigtx.config.schema import ModelConfig, PretrainConfig
from bigtx.config.shape import micro_batch_size_of, total_steps
from bigtx.plan.memory import RESERVE, activation_bytes, buffer_bytes, loss_bytes, state_bytes, training_seconds
from bigtx.plan.parameters import count_parameters, flops_per_token, stacks
from bigtx.utils.errors import ConfigError

MFU = 0.4
"""The share of the peak FLOP/s that training reaches: an assumption."""

GPUS_OF_NODE = 8

BUS_IN_NODE, BUS_BETWEEN_NODES = 450e9, 350e9
"""Bytes per second of each GPU in a collective of all GPUs, with NVLink of H100s and eight 400 Gbit/s ports:
assumptions."""

HOP_SECONDS = 5e-6
"""The latency from one GPU to the next in a ring: an assumption."""


@dataclass(frozen=True)
class Plan:
    """A run on a number of GPUs. Bytes are those of each GPU.

    Attributes:
        micro_batch_size: rows of a micro batch: the most that divide the batch evenly and that the config allows.
        micro_batches: the number of micro batches of each GPU in a step.
        memory: states, buffers, activations, head and loss, and the reserve.
        arithmetic: seconds of arithmetic in a step.
        communication: seconds of communication in a step.
        run: seconds of arithmetic in all steps.
    """

    num_gpus: int
    micro_batch_size: int
    micro_batches: int
    states: int
    activations: int
    memory: int
    arithmetic: float
    communication: float
    run: float


def plan_run(config: PretrainConfig, num_gpus: int, peak: float) -> Plan:
    """Estimate a run.

    Args:
        config: the config of a decoder, with model.vocab_size.
        num_gpus: the number of GPUs of all machines.
        peak: peak FLOP/s of a GPU.

    Raises:
        ConfigError: the estimate does not cover the config, or the batch cannot be divided over the GPUs.
    """
    train, engine, model = config.train, config.engine, config.model
    _refuse_others(config)
    for problem in train.division_problems(num_gpus):
        raise ConfigError(f"gpus={num_gpus}: {problem.key}={problem.value} {problem.what}")
    micro_batch_size = micro_batch_size_of(train, num_gpus)
    micro_batches = train.global_batch_size // (num_gpus * micro_batch_size)
    num_tokens = micro_batch_size * train.sequence_length
    stage, recompute = engine.zero_stage, engine.activation_checkpointing
    states = state_bytes(model, stage=stage, num_ranks=num_gpus, optimizer=config.optimizer.name)
    activations = activation_bytes(model, num_tokens=num_tokens, recompute=recompute, stage=stage)
    other = buffer_bytes(model, stage=stage, bucket=engine.bucket_size) + loss_bytes(model, num_tokens=num_tokens)
    arithmetic = training_seconds(
        model,
        num_tokens=train.global_batch_size * train.sequence_length,
        sequence_length=train.sequence_length,
        flops_per_second=MFU * peak * num_gpus,
    )
    communication = communication_seconds(
        model, stage=stage, num_gpus=num_gpus, micro_batches=micro_batches, bucket=engine.bucket_size
    )
    return Plan(
        num_gpus=num_gpus,
        micro_batch_size=micro_batch_size,
        micro_batches=micro_batches,
        states=states,
        activations=activations,
        memory=states + activations + other + RESERVE,
        arithmetic=arithmetic,
        communication=communication,
        run=arithmetic * total_steps(config),
    )


def _refuse_others(config: PretrainConfig) -> None:
    model, engine = config.model, config.engine
    uncounted = {
        f"model.shape={model.shape}": model.shape != "decoder",
        "model.experts": model.experts.num_experts > 0,
        "model.lora": model.lora.rank > 0,
        f"engine.precision={engine.precision}": engine.precision == "fp32",
        "engine.offload_optimizer": engine.offload_optimizer != "none",
        "optimizer.ema_decay": config.optimizer.ema_decay is not None,
    }
    if found := [setting for setting, present in uncounted.items() if present]:
        raise ConfigError(
            f"{', '.join(found)}: the plan covers only decoders in 16 bits without experts, adapters, offloading and "
            "ema; `bigtx pretrain ... --dry-run` measures a step of any config"
        )


def communication_seconds(config: ModelConfig, *, stage: int, num_gpus: int, micro_batches: int, bucket: int) -> float:
    """Compute the seconds of communication in a step.

    A gradient has 4 bytes, a weight 2. An all-reduce consists of a reduce-scatter and an all-gather.

    Args:
        config: the model, with its vocab_size.
        stage: engine.zero_stage.
        micro_batches: the number of micro batches of each GPU in a step.
        bucket: engine.bucket_size.
    """
    total = count_parameters(config).total
    buckets, blocks = -(-total // bucket), sum(stacks(config).values()) + 1
    # Bytes per parameter and passes around the ring, for each micro batch and once per step.
    in_micro_batch, in_step = {
        0: ((0, 0), (4 + 4, 2 * buckets)),
        1: ((0, 0), (4 + 4 + 2, 3)),
        2: ((4 + 4, 2 * buckets), (2, buckets)),
        3: ((2 + 2 + 4, 2 * blocks + buckets), (0, 0)),
    }[stage]
    num_bytes, passes = (micro_batches * many + once for many, once in zip(in_micro_batch, in_step, strict=True))
    bandwidth = BUS_IN_NODE if num_gpus <= GPUS_OF_NODE else BUS_BETWEEN_NODES
    return (num_gpus - 1) * (num_bytes * total / num_gpus / bandwidth + passes * HOP_SECONDS)


def plan_lines(config: PretrainConfig, plans: Sequence[Plan], gpu: str) -> list[str]:
    """Format a table of plans, one column for each number of GPUs; `gpu` is their name."""
    train = config.train
    tokens, steps = train.global_batch_size * train.sequence_length, total_steps(config)
    rows = {
        f"{gpu} GPUs": [f"{plan.num_gpus}" for plan in plans],
        "GB of model states": [_gigabytes(plan.states) for plan in plans],
        "GB of activations": [_gigabytes(plan.activations) for plan in plans],
        "GB of memory in all": [_gigabytes(plan.memory) for plan in plans],
        "micro batches a step": [f"{plan.micro_batches} of {plan.micro_batch_size}" for plan in plans],
        "arithmetic of a step": [_duration(plan.arithmetic) for plan in plans],
        "communication of a step": [_duration(plan.communication) for plan in plans],
        "arithmetic of the run": [_duration(plan.run) for plan in plans],
    }
    flops = steps * tokens * flops_per_token(config.model, train.sequence_length)
    return [
        f"{count_parameters(config.model).total:,} parameters, {steps:,} steps of {tokens:,} tokens, {flops:.1e} FLOPs",
        *(f"{name:<24}" + "".join(f"{cell:>14}" for cell in cells) for name, cells in rows.items()),
    ]


def _gigabytes(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.1f}"


def _duration(seconds: float) -> str:
    for unit, name in ((365 * 86400, "years"), (86400, "days"), (3600, "hours"), (60, "min"), (1, "s")):
        if seconds >= unit:
            return f"{seconds / unit:.3g} {name}"
    return f"{seconds * 1e3:.3g} ms"
