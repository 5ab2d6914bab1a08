"""Estimates of a run before it starts: steps, memory, time and communication, computed only from its config.

This module imports no torch.

    memory  =  states  +  buffers  +  activations  +  loss  +  a reserve for CUDA, NCCL and fragmentation

States are exact: they are what ZeRO stores per parameter (arXiv:1910.02054, section 5), adapted to what DeepSpeed 0.19
stores under bigtx's settings. Activations are what torch stores of a block for its backward pass, counted tensor by
tensor with the method of arXiv:2205.05198, section 4.1, for bigtx's block; a test compares them with what torch stores
on a CPU. Buffers and the loss are upper bounds from the code.

Communication is what bigtx (stage 1 in bf16) and DeepSpeed 0.19 send, at the bandwidths below, without overlap with
arithmetic. In practice they overlap in part, so a step takes between the longer of the two and their sum. None of these
estimates was measured on a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from bigtx.config import shape
from bigtx.config.deepspeed import live_parameters
from bigtx.config.schema import ModelConfig, PretrainConfig
from bigtx.config.shape import micro_batch_size_of, outside_estimates, total_steps
from bigtx.model.size import count_parameters, flops_per_token, largest_block, parameter_shapes, stacks
from bigtx.utils import log
from bigtx.utils.errors import ConfigError

Recompute = Literal["none", "selective", "full"]
"""The values of engine.activation_checkpointing."""

RESERVE = 2_000_000_000
"""Bytes of each GPU for the CUDA context, NCCL and fragmentation: an assumption."""

BUCKET = 50_000_000
"""Elements of a reduction: the default of engine.bucket_size."""

CHUNK_LOGITS = 2**27
"""Logits that the loss makes at once on a GPU (model/loss.py)."""


def bytes_per_parameter(stage: int, num_ranks: int, num_states: int = 2) -> float:
    """Compute the bytes per parameter on each rank, in bf16 or fp16 with fp32 master weights and gradients.

    Args:
        stage: engine.zero_stage.
        num_ranks: the number of GPUs of all machines.
        num_states: fp32 states of the optimizer: 2 with AdamW, 1 for Muon's matrices, one more with an ema.
    """
    states = 4 * num_states
    if stage == 0:  # Weights and gradient in fp32, and the 16-bit copy of the weights that autocast makes for a step.
        return 4 + 4 + 2 + states
    # Master weights and states are partitioned at stages 1 to 3.
    shared = 4 + states
    if stage == 1:  # Not partitioned: weights in 16 bits, gradient in fp32. Gradients in 16 bits are freed one by one.
        return 2 + 4 + shared / num_ranks
    if stage == 2:  # Not partitioned: weights. Gradients in 16 bits are freed bucket by bucket.
        return 2 + (4 + shared) / num_ranks
    return (2 + 4 + shared) / num_ranks


def state_bytes(config: ModelConfig, *, stage: int, num_ranks: int, optimizer: Literal["adamw", "muon"]) -> int:
    """Compute the bytes of weights, gradients, master weights and optimizer states on each rank.

    Args:
        config: the model, with its vocab_size.
        stage: engine.zero_stage.
        num_ranks: the number of GPUs of all machines.
        optimizer: optimizer.name; Muon has one state for the matrices of the blocks, and two for all other parameters.
    """
    total = count_parameters(config).total
    by_muon = _matrices(config) if optimizer == "muon" else 0
    two, one = (bytes_per_parameter(stage, num_ranks, num_states) for num_states in (2, 1))
    return round(two * (total - by_muon) + one * by_muon)


def _matrices(config: ModelConfig) -> int:
    """Count the parameters that Muon updates: matrices of the blocks, without routers (engine/optimizers.py)."""
    return sum(
        math.prod(size)
        for name, size in parameter_shapes(config).items()
        if ".blocks." in name and len(size) > 1 and not name.endswith((".router.weight", ".shared_gate.weight"))
    )


def buffer_bytes(config: ModelConfig, *, stage: int, bucket: int = BUCKET) -> int:
    """Compute the maximum bytes that DeepSpeed holds in addition to the states: two buckets of gradients in 16 and 32
    bits at stages 2 and 3, and the gathered weights at stage 3."""
    total = count_parameters(config).total
    buckets = 2 * (2 + 4) * min(bucket, total) if stage >= 2 else 0
    return buckets + (2 * min(live_parameters(largest_block(config)), total) if stage == 3 else 0)


def activation_bytes(config: ModelConfig, *, num_tokens: int, recompute: Recompute, stage: int = 1) -> int:
    """Compute the bytes that the blocks of a decoder store for the backward pass, at the maximum of that pass.

    The formula is for pre-norm decoders with rotary positions, without dropout and experts, in 16 bits, not compiled,
    whose attention runs in a fused kernel of torch (no document mask, more than a few hundred tokens). It is an upper
    bound: fused norms of a GPU store less (4 bytes per token and channel of each norm), and so does engine.compile.

    Args:
        config: the model, a decoder.
        num_tokens: train.micro_batch_size times train.sequence_length.
        recompute: engine.activation_checkpointing.
        stage: engine.zero_stage; at 0 the residual stream is fp32.
    """
    hidden, inner = config.hidden_size, shape.mlp_size(config)
    queries, keys = (heads * shape.head_width(config) for heads in (config.num_heads, shape.num_kv_heads(config)))
    gated = config.mlp in shape.GATED
    stream = 2 if stage else 4
    # Each norm stores its input in fp32 and, for rms, the normalized input; two statistics for LayerNorm, one for rms.
    scaled = 4 * config.norm_scale
    norm, statistics = (4 + scaled, 4) if config.norm == "rms" else (4, 8)
    attention = 4 * queries + 4 * keys + 4 * config.num_heads  # q, k, v, result; logsumexp in fp32.
    products = 2 * queries + 2 * 2 * keys + 2 * hidden + 2 * (1 + gated) * inner + 2 * hidden
    whole = (
        2 * (norm * hidden + statistics) + attention + 2 * 2 * hidden + 2 * queries + 2 * (4 if gated else 2) * inner
    )
    if config.qk_norm:
        whole += (4 + scaled) * (queries + keys) + 4 * (config.num_heads + shape.num_kv_heads(config))
    if stage == 0:  # Autocast casts the input of each product by itself.
        whole += 2 * (2 + gated) * hidden
    kept = {
        "none": whole,
        "selective": stream * hidden + products + 2 * queries + 4 * config.num_heads,
        "full": stream * hidden,
    }[recompute]
    # One block at a time is recomputed.
    again = 0 if recompute == "none" else whole - kept
    return num_tokens * (config.num_layers * kept + again)


def loss_bytes(config: ModelConfig, *, num_tokens: int) -> int:
    """Compute the maximum bytes of the last norm, the head and the loss: a chunk of logits once in 16 bits and twice in
    fp32, and the gradient of the head, which is scaled in fp32 and then cast."""
    rows, hidden = shape.padded_vocab_size(config), config.hidden_size
    logits = min(CHUNK_LOGITS, max(128, CHUNK_LOGITS // rows) * rows, num_tokens * rows)
    head = rows * hidden
    return num_tokens * 12 * hidden + 4 * head + max(8 * logits, 6 * head)


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
    stage, recompute = engine.zero_stage, engine.activation_checkpointing
    if recompute == "auto":
        raise ConfigError(
            "engine.activation_checkpointing=auto depends on the memory of a GPU, which the plan does not know; write "
            "engine.activation_checkpointing=full"
        )
    micro_batch_size = micro_batch_size_of(train, num_gpus)
    micro_batches = train.global_batch_size // (num_gpus * micro_batch_size)
    num_tokens = micro_batch_size * train.sequence_length
    memory = memory_of(config, num_gpus, num_tokens, recompute)
    flops = train.global_batch_size * train.sequence_length * flops_per_token(model, train.sequence_length)
    arithmetic = flops / (MFU * peak * num_gpus)
    communication = communication_seconds(
        model, stage=stage, num_gpus=num_gpus, micro_batches=micro_batches, bucket=engine.bucket_size
    )
    bytes_of = memory.states, memory.activations, memory.total
    seconds = arithmetic, communication, arithmetic * total_steps(config)
    return Plan(num_gpus, micro_batch_size, micro_batches, *bytes_of, *seconds)


class Memory(NamedTuple):
    """Bytes of each GPU; the total includes buffers, the loss and the reserve."""

    states: int
    activations: int
    total: int


def memory_of(config: PretrainConfig, num_gpus: int, num_tokens: int, recompute: Recompute) -> Memory:
    """Estimate the memory of a run whose micro batches have `num_tokens` tokens."""
    model, engine = config.model, config.engine
    stage = engine.zero_stage
    states = state_bytes(model, stage=stage, num_ranks=num_gpus, optimizer=config.optimizer.name)
    activations = activation_bytes(model, num_tokens=num_tokens, recompute=recompute, stage=stage)
    other = buffer_bytes(model, stage=stage, bucket=engine.bucket_size) + loss_bytes(model, num_tokens=num_tokens)
    return Memory(states, activations, states + activations + other + RESERVE)


def cheapest_recompute(config: PretrainConfig, num_gpus: int, memory: int | None) -> Recompute:
    """Return what engine.activation_checkpointing=auto means: the first of none, selective and full that fits.

    Args:
        config: a config without `outside_estimates`, with its micro batch size.
        num_gpus: the number of GPUs of all machines.
        memory: bytes of a GPU; None without one.
    """
    num_tokens = micro_batch_size_of(config.train, num_gpus) * config.train.sequence_length
    choices: tuple[Recompute, ...] = ("none", "selective", "full")
    for choice in choices:
        needed = memory_of(config, num_gpus, num_tokens, choice).total
        if memory is None or needed <= memory:
            break
    if memory is not None:
        by = f"by estimate it needs {_gigabytes(needed)} of the GPU's {_gigabytes(memory)} GB"
        log.say(f"engine.activation_checkpointing=auto is {choice}: {by}")
    return choice


def _refuse_others(config: PretrainConfig) -> None:
    if found := outside_estimates(config):
        raise ConfigError(
            f"{', '.join(found)}: the plan covers only decoders in 16 bits without experts, adapters, offloading and "
            "ema; `bigtx pretrain ... --dry-run` measures a step of any config"
        )


def communication_seconds(config: ModelConfig, *, stage: int, num_gpus: int, micro_batches: int, bucket: int) -> float:
    """Compute the seconds of communication in a step.

    A gradient has 4 bytes, a weight 2. An all-reduce (stages 0 and 2) consists of a reduce-scatter and an all-gather.

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
        1: ((0, 0), (4 + 2, 2 * buckets)),
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
