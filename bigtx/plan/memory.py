"""The memory of a GPU and the time that training needs, computed from the config. This module imports no torch.

    memory  =  states  +  buffers  +  activations  +  loss  +  a reserve for CUDA, NCCL and fragmentation

States are exact: they are what ZeRO stores per parameter (arXiv:1910.02054, section 5), adapted to what DeepSpeed 0.19
stores under bigtx's settings. Activations are what torch stores of a block for its backward pass, counted tensor by
tensor with the method of arXiv:2205.05198, section 4.1, for bigtx's block; a test compares them with what torch stores
on a CPU. Buffers and the loss are upper bounds from the code. The sum has not been measured on a GPU.
"""

from __future__ import annotations

import math
from typing import Literal

from bigtx.config import shape
from bigtx.config.schema import ModelConfig
from bigtx.plan.parameters import count_parameters, flops_per_token, parameter_shapes

Recompute = Literal["none", "selective", "full"]
"""The values of engine.activation_checkpointing."""

RESERVE = 2_000_000_000
"""Bytes of each GPU for the CUDA context, NCCL and fragmentation: an assumption."""

BUCKET = 50_000_000
"""Elements of a reduction: the default of engine.bucket_size."""

MAX_LIVE = 1_000_000_000
"""Elements that ZeRO-3 may hold gathered at once (config/deepspeed.py)."""

CHUNK_LOGITS = 2**27
"""Logits that the loss makes at once on a GPU (model/loss.py)."""

TOKENS_PER_PARAMETER = 20
"""Training tokens per parameter at which a compute budget is spent best (Hoffmann et al. 2022, arXiv:2203.15556,
table 3)."""

BYTES_PER_TOKEN = 4
"""Approximate UTF-8 bytes of English text per token, with a vocabulary of 16k to 50k."""

USEFUL_EPOCHS = 4
"""Repetitions up to which text is worth nearly as much as new text (Muennighoff et al. 2023, arXiv:2305.16264)."""


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
    if stage == 1:  # Not partitioned: weights and gradient in 16 bits, accumulated gradient in fp32.
        return 2 + 2 + 4 + shared / num_ranks
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
    return buckets + (2 * min(MAX_LIVE, total) if stage == 3 else 0)


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


def training_bytes(config: ModelConfig, *, stage: int, num_ranks: int, num_tokens: int, recompute: Recompute) -> int:
    """Compute the total bytes on each GPU in a training step with AdamW in bf16.

    Args:
        config: the model, a decoder with its vocab_size.
        stage, num_ranks: as for `state_bytes`.
        num_tokens, recompute: as for `activation_bytes`.
    """
    return (
        state_bytes(config, stage=stage, num_ranks=num_ranks, optimizer="adamw")
        + buffer_bytes(config, stage=stage)
        + activation_bytes(config, num_tokens=num_tokens, recompute=recompute, stage=stage)
        + loss_bytes(config, num_tokens=num_tokens)
        + RESERVE
    )


def training_seconds(config: ModelConfig, *, num_tokens: float, sequence_length: int, flops_per_second: float) -> float:
    """Compute the seconds of training.

    Args:
        config: the model, with its vocab_size.
        num_tokens: the tokens of the whole run.
        sequence_length: train.sequence_length.
        flops_per_second: FLOP/s that all devices together reach: their peak times the MFU.
    """
    return num_tokens * flops_per_token(config, sequence_length) / flops_per_second
