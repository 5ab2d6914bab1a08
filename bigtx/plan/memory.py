"""What training takes of a GPU's memory, and of its time, by arithmetic from the config alone. Imports no torch.

    memory  =  states  +  buffers  +  activations  +  loss  +  a reserve for CUDA, NCCL and fragmentation

States are exact: what ZeRO keeps of each parameter (arXiv:1910.02054, section 5), adapted to what DeepSpeed 0.19 really
keeps under bigtx's settings. Activations are what torch keeps of a block for its backward pass, counted tensor by
tensor in the manner of arXiv:2205.05198, section 4.1, but of bigtx's block; a test compares them with what torch does
keep on a CPU. Buffers and the loss are upper bounds from the code. No GPU has measured the sum.
"""

from __future__ import annotations

import math
from typing import Literal

from bigtx.config import shape
from bigtx.config.schema import ModelConfig
from bigtx.plan.parameters import count_parameters, flops_per_token, parameter_shapes

Recompute = Literal["none", "selective", "full"]
"""As engine.activation_checkpointing."""

RESERVE = 2_000_000_000
"""Bytes of each GPU for the CUDA context, NCCL and fragmentation: an assumption."""

BUCKET = 50_000_000
"""Elements of a reduction, the default of engine.bucket_size."""

MAX_LIVE = 1_000_000_000
"""Elements that ZeRO-3 may hold gathered at once (engine/deepspeed_config.py)."""

CHUNK_LOGITS = 2**27
"""Logits that the loss makes at once on a GPU (model/loss.py)."""

TOKENS_PER_PARAMETER = 20
"""Training tokens for each parameter at which a budget of arithmetic is spent best (Hoffmann et al. 2022,
arXiv:2203.15556, table 3)."""

BYTES_PER_TOKEN = 4
"""UTF-8 bytes of English text for each token of a vocabulary of 16k to 50k, roughly."""

USEFUL_EPOCHS = 4
"""Repetitions up to which text is worth nearly as much as new text (Muennighoff et al. 2023, arXiv:2305.16264)."""


def bytes_per_parameter(stage: int, num_ranks: int, num_states: int = 2) -> float:
    """Bytes of each parameter on each rank, in bf16 or fp16 with fp32 master weights and gradients.

    Args:
        stage: engine.zero_stage.
        num_ranks: GPUs of all machines together.
        num_states: fp32 states of the optimizer: 2 with AdamW, 1 for Muon's matrices, one more with an ema.
    """
    states = 4 * num_states
    if stage == 0:  # Weights and gradient in fp32, and the 16-bit copy of the weights that autocast makes for a step.
        return 4 + 4 + 2 + states
    # Shared out at every stage: master weights and states.
    shared = 4 + states
    if stage == 1:  # Whole: weights and gradient in 16 bits, accumulated gradient in fp32.
        return 2 + 2 + 4 + shared / num_ranks
    if stage == 2:  # Whole: weights. Gradients in 16 bits are given up bucket by bucket.
        return 2 + (4 + shared) / num_ranks
    return (2 + 4 + shared) / num_ranks


def state_bytes(config: ModelConfig, *, stage: int, num_ranks: int, optimizer: Literal["adamw", "muon"]) -> int:
    """Bytes on each rank of weights, gradients, master weights and optimizer states.

    Args:
        config: with its vocab_size.
        stage: engine.zero_stage.
        num_ranks: GPUs of all machines together.
        optimizer: optimizer.name; Muon has one state for the matrices of the blocks, AdamW's two for all else.
    """
    total = count_parameters(config).total
    by_muon = _matrices(config) if optimizer == "muon" else 0
    two, one = (bytes_per_parameter(stage, num_ranks, num_states) for num_states in (2, 1))
    return round(two * (total - by_muon) + one * by_muon)


def _matrices(config: ModelConfig) -> int:
    """Parameters that Muon updates: matrices of the blocks, without routers (engine/optimizers.py)."""
    return sum(
        math.prod(size)
        for name, size in parameter_shapes(config).items()
        if ".blocks." in name and len(size) > 1 and not name.endswith((".router.weight", ".shared_gate.weight"))
    )


def buffer_bytes(config: ModelConfig, *, stage: int, bucket: int = BUCKET) -> int:
    """Bytes that DeepSpeed holds beside the states, at most: two buckets of gradients in 16 and 32 bits at stages 2 and
    3, and at stage 3 the weights that are gathered."""
    total = count_parameters(config).total
    buckets = 2 * (2 + 4) * min(bucket, total) if stage >= 2 else 0
    return buckets + (2 * min(MAX_LIVE, total) if stage == 3 else 0)


def activation_bytes(config: ModelConfig, *, num_tokens: int, recompute: Recompute, stage: int = 1) -> int:
    """Bytes that the blocks of a decoder keep for the backward pass, and at the widest place of it.

    Counted for pre-norm decoders with rotary positions, without dropout and experts, in 16 bits, whose attention runs
    in a fused kernel of torch (no document mask, more than a few hundred tokens), not compiled. Fused norms of a GPU
    keep less (4 bytes a token and channel of each norm), and so does engine.compile: an upper bound.

    Args:
        config: a decoder.
        num_tokens: train.micro_batch_size times train.sequence_length.
        recompute: engine.activation_checkpointing.
        stage: engine.zero_stage; at 0 the residual stream is fp32.
    """
    hidden, inner = config.hidden_size, shape.mlp_size(config)
    queries, keys = (heads * shape.head_width(config) for heads in (config.num_heads, shape.num_kv_heads(config)))
    gated = config.mlp in shape.GATED
    stream = 2 if stage else 4
    # Each norm: its input in fp32 and, of rms, the input normalized; two statistics for LayerNorm, one for rms.
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
    # One block is made again while the others wait.
    again = 0 if recompute == "none" else whole - kept
    return num_tokens * (config.num_layers * kept + again)


def loss_bytes(config: ModelConfig, *, num_tokens: int) -> int:
    """Bytes of the last norm, the head and the loss, at most: a chunk of logits in 16 bits and twice over in fp32, and
    the gradient of the head, which is scaled in fp32 and then cast."""
    rows, hidden = shape.padded_vocab_size(config), config.hidden_size
    logits = min(CHUNK_LOGITS, max(128, CHUNK_LOGITS // rows) * rows, num_tokens * rows)
    head = rows * hidden
    return num_tokens * 12 * hidden + 4 * head + max(8 * logits, 6 * head)


def training_bytes(config: ModelConfig, *, stage: int, num_ranks: int, num_tokens: int, recompute: Recompute) -> int:
    """Bytes of each GPU in a training step with AdamW in bf16, all together.

    Args:
        config: a decoder with its vocab_size.
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
    """Seconds of training.

    Args:
        config: with its vocab_size.
        num_tokens: tokens of the whole run.
        sequence_length: train.sequence_length.
        flops_per_second: that all devices together really do: their peak times the MFU.
    """
    return num_tokens * flops_per_token(config, sequence_length) / flops_per_second
