"""The sizes that follow from a config, for the rules, the model and the plan: the meaning of a model's empty fields,
its matrices with adapters, and the batches of a run.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Literal

from bigtx.config.nodes import Problem
from bigtx.utils.shell import setting

if TYPE_CHECKING:
    from bigtx.config.schema import (
        AudioConfig,
        EngineConfig,
        ModelConfig,
        ObjectiveConfig,
        PretrainConfig,
        RhythmConfig,
    )

VOCABULARY_MULTIPLE = 128
"""Rows of the embedding and of the head are a multiple of this, so that their matrix products fill whole tiles."""

CONVOLUTION_WIDTH = 3
"""The width in frames of each convolution of an audio encoder."""

RATE_BY_WIDTH = 0.15
"""Learning rate times width: 2e-4 for 768, 3.7e-5 for 4,096, about the rates of fine-tunings of models of those widths.
"""

GATED = ("swiglu", "geglu", "geglu_tanh")
"""The feed-forwards with a gate: three matrices instead of two."""


def head_width(config: ModelConfig) -> int:
    """Return the width C of one attention head."""
    if config.head_width is not None:
        return config.head_width
    assert config.hidden_size % config.num_heads == 0, "num_heads does not divide hidden_size"
    return config.hidden_size // config.num_heads


def num_kv_heads(config: ModelConfig) -> int:
    """Return the number K of key and value heads."""
    heads = config.num_heads if config.num_kv_heads is None else config.num_kv_heads
    assert config.num_heads % heads == 0, "num_kv_heads does not divide num_heads"
    return heads


def outside_estimates(config: PretrainConfig) -> list[str]:
    """Return the settings for which bigtx.model.plan does not estimate the memory of a run."""
    model, engine = config.model, config.engine
    found = {
        f"model.shape={model.shape}": model.shape != "decoder",
        "model.experts": model.experts.num_experts > 0,
        "model.lora": model.lora.rank > 0,
        f"engine.precision={engine.precision}": engine.precision == "fp32",
        "engine.offload_optimizer": engine.offload_optimizer != "none",
        "optimizer.ema_decay": config.optimizer.ema_decay is not None,
    }
    return [setting for setting, present in found.items() if present]


def estimate_problems(engine: EngineConfig, uncovered: Sequence[str]) -> Iterator[Problem]:
    """Yield a problem for an automatic choice that the estimate of the memory does not cover.

    Args:
        uncovered: what the estimate does not cover.
    """
    if engine.activation_checkpointing == "auto" and uncovered:
        advice = setting("engine.activation_checkpointing", "full")
        what = f"needs an estimate of the memory, which does not cover {', '.join(uncovered)}; write {advice}"
        yield Problem("engine.activation_checkpointing", "auto", what, related=("model.shape",))


def mlp_size(config: ModelConfig) -> int:
    """Return the inner width of the feed-forward; a gated one has 8/3 D, because of its third matrix
    (arXiv:2002.05202).
    """
    if config.mlp_size is not None:
        return config.mlp_size
    return -(-8 * config.hidden_size // (3 * 64)) * 64 if config.mlp in GATED else 4 * config.hidden_size


def expert_size(config: ModelConfig) -> int:
    """Return the inner width of one expert."""
    return config.experts.expert_size or mlp_size(config)


def num_decoder_layers(config: ModelConfig) -> int:
    """Return the number of blocks of the decoder; 0 in an encoder."""
    if config.shape == "encoder_decoder":
        return config.num_decoder_layers or config.num_layers
    return config.num_layers if config.shape == "decoder" else 0


def num_encoder_layers(config: ModelConfig) -> int:
    """Return the number of blocks of the encoder; 0 in a decoder."""
    return 0 if config.shape == "decoder" else config.num_layers


def class_head(config: ModelConfig) -> Literal["transform", "pooler", "score"]:
    """Return the form of the head of classes."""
    return config.class_head or "transform"


def has_transform(config: ModelConfig) -> bool:
    """Return whether the head, of tokens or of classes, has a transform before its matrix."""
    return config.head_transform and (config.num_classes is None or class_head(config) == "transform")


def attention_dropout(config: ModelConfig) -> float:
    """Return the probability of dropping an attention weight."""
    return config.dropout if config.attention_dropout is None else config.attention_dropout


def has_window(config: ModelConfig, layer: int) -> bool:
    """Return whether block `layer` of a stack attends within attention_window only."""
    every = config.global_attention_every
    return config.attention_window is not None and not (every is not None and layer % every == 0)


def frames_per_column(config: ModelConfig) -> int:
    """Return the number of frames of the spectrogram for each column of an audio encoder."""
    return math.prod(config.audio.strides)


def num_columns(config: ModelConfig, num_samples: int) -> int:
    """Return the number of columns that an audio encoder reads for a number of samples."""
    return -(-num_frames(config.audio, num_samples) // frames_per_column(config))


def num_frames(audio: AudioConfig, num_samples: int) -> int:
    """Return the number of frames of the spectrogram of so many samples: one starts with every hop."""
    return -(-num_samples // hop_length(audio))


def hop_length(audio: AudioConfig) -> int:
    """Return the number of samples from one frame to the next."""
    return max(1, round(audio.sample_rate * audio.hop_ms / 1000))


def has_embedding(config: ModelConfig) -> bool:
    """Return whether there is a table of tokens: an audio encoder without a decoder has none."""
    return not (config.shape == "encoder" and config.audio.num_mel_bins)


def bigram_size(config: ModelConfig) -> int:
    """Return the width of the table of token pairs."""
    return config.bigram_size or config.hidden_size


def padded_vocab_size(config: ModelConfig) -> int:
    """Return the number of rows of the embedding table and of the head: vocab_size rounded up to a multiple of 128."""
    assert config.vocab_size is not None, "vocab_size comes from the tokenizer before a model is built"
    return -(-config.vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


def learning_rate_for(config: ModelConfig) -> float:
    """Return the default peak rate of AdamW: it decreases with the width, as is usual for larger models."""
    return float(f"{RATE_BY_WIDTH / config.hidden_size:.2g}")


def adapted_matrices(config: ModelConfig) -> list[str]:
    """Return the modules with an adapter, e.g. decoder.blocks.3.attention.query; none without a rank."""
    if not config.lora.rank:
        return []
    globs = config.lora.targets or ["*"]
    return [name for name in _matrices(config) if any(_matches(name, glob) for glob in globs)]


def useless_targets(config: ModelConfig) -> dict[str, list[str]]:
    """Return the globs that match no matrix, each with matrices of a block that have similar names."""
    names = list(_matrices(config))
    of_block = list(dict.fromkeys(map(in_block, names)))
    return {
        glob: difflib.get_close_matches(glob, of_block, 3, 0.5) or of_block
        for glob in config.lora.targets
        if not any(_matches(name, glob) for name in names)
    }


def _matrices(config: ModelConfig) -> Iterator[str]:
    """Yield all matrices that can be adapted, by module.

    The matrices of a mixture's experts cannot: all experts of a block are one parameter with a product of its own.
    The router and the gate of the shared expert cannot either: their few rows are scores.
    """
    stacks = {"encoder": num_encoder_layers(config), "decoder": num_decoder_layers(config)}
    for stack, num_layers in stacks.items():
        across = stack == "decoder" and config.shape == "encoder_decoder"
        attentions = ("attention", "cross_attention") if across else ("attention",)
        modules = [f"{name}.{part}" for name in attentions for part in ("query", "key", "value", "output")]
        experts = config.experts
        mlp = "mlp" if not experts.num_experts else "mlp.shared" if experts.shared_size else None
        if mlp is not None:
            parts = ("gate", "up", "down") if config.mlp in GATED else ("up", "down")
            modules += [f"{mlp}.{part}" for part in parts]
        yield from (f"{stack}.blocks.{layer}.{name}" for layer in range(num_layers) for name in modules)


def _matches(name: str, glob: str) -> bool:
    """Return whether a glob matches a module, by its name in the model or in its block."""
    return fnmatchcase(name, glob) or fnmatchcase(in_block(name), glob)


def in_block(name: str) -> str:
    """Return a module's name within its block, given its name in the model."""
    return name.split(".", 3)[3]


def micro_batch_size_of(train: RhythmConfig, num_ranks: int) -> int:
    """Return the number of sequences of a micro batch: the largest that divides a rank's share and is not above what
    the config allows.
    """
    share = train.global_batch_size // num_ranks
    return next(size for size in range(min(train.micro_batch_size, share), 0, -1) if share % size == 0)


def total_steps(config: PretrainConfig) -> int:
    """Return the number of optimizer steps of a pretraining."""
    train = config.train
    if train.max_steps is not None:
        return train.max_steps
    assert train.max_tokens is not None
    return -(-train.max_tokens // (train.global_batch_size * train.sequence_length))


def noise_counts(objective: ObjectiveConfig, length: int) -> tuple[int, int]:
    """Return how many of a text's tokens span corruption removes, and in how many spans.

    There is at least one token between two spans, and before the first.
    """
    num_noise = min(max(round(length * objective.noise_density), 1), length - 1)
    num_spans = min(max(round(num_noise / objective.mean_span_length), 1), num_noise, length - num_noise)
    return num_noise, num_spans


def side_lengths(objective: ObjectiveConfig, length: int) -> tuple[int, int]:
    """Return the numbers of tokens of the source and of the target that an encoder-decoder reads of a row.

    span_corruption: the kept tokens, sentinels and an end id; the spans, sentinels and an end id. prefix: the first
    half and an end id, as in `bigtx generate`; the second half.
    """
    if objective.name == "span_corruption":
        num_noise, num_spans = noise_counts(objective, length)
        return length - num_noise + num_spans + 1, num_noise + num_spans + 1
    return length // 2 + 1, length - length // 2
