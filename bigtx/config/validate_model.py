"""Checks that the fields of a model and of an objective fit each other."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from bigtx.config.lora import useless_targets
from bigtx.config.nodes import Problem, idle
from bigtx.config.schema import (
    AudioConfig,
    ExpertsConfig,
    LoraConfig,
    ModelConfig,
    ObjectiveConfig,
    PretrainConfig,
    RunConfig,
)
from bigtx.utils.shell import setting

OBJECTIVES_OF_FIELDS = {
    "fill_in_middle_rate": "fill_in_middle",
    "suffix_first_rate": "fill_in_middle",
    "mask_rate": "masked",
    "whole_words": "masked",
    "noise_density": "span_corruption",
    "mean_span_length": "span_corruption",
}
"""The settings of the section `objective` that only one objective reads."""


def model_problems(model: ModelConfig) -> Iterator[Problem]:
    """Yield a problem for fields of a model that do not fit each other, or that would have no effect."""
    width, heads = model.hidden_size, model.num_heads
    if model.head_width is None and width % heads:
        yield Problem(
            "model.num_heads",
            str(heads),
            f"does not divide model.hidden_size={width}; {_nearby_divisors(width, heads)} do, or set model.head_width",
        )
    elif model.positions == "rope" and (head_width := model.head_width or width // heads) % 2:
        yield Problem(
            "model.num_heads" if model.head_width is None else "model.head_width",
            str(model.head_width or heads),
            f"gives heads {head_width} wide, and rotary positions need an even width",
        )
    if model.num_kv_heads is not None and heads % model.num_kv_heads:
        yield Problem(
            "model.num_kv_heads",
            str(model.num_kv_heads),
            f"does not divide model.num_heads={heads}; {_nearby_divisors(heads, model.num_kv_heads)} do",
        )
    if model.norm == "rms" and model.norm_bias:
        yield Problem("model.norm_bias", "true", "an RMSNorm has no bias; write false, or model.norm=layer")
    if model.positions == "relative" and model.relative_max_distance <= model.relative_num_buckets // 2:
        yield Problem(
            "model.relative_max_distance",
            str(model.relative_max_distance),
            f"half of model.relative_num_buckets={model.relative_num_buckets} are exact distances; write a larger one",
        )
    if model.positions != "rope" and model.rope_scaling.method != "none":
        yield Problem(
            "model.rope_scaling.method",
            model.rope_scaling.method,
            f"stretches rotary positions, but model.positions={model.positions}; write none",
        )
    scaling = model.rope_scaling
    for method, low, high in (
        ("llama3", "low_frequency_factor", "high_frequency_factor"),
        ("yarn", "beta_slow", "beta_fast"),
    ):
        if scaling.method == method and getattr(scaling, low) >= getattr(scaling, high):
            yield Problem(
                f"model.rope_scaling.{low}",
                str(getattr(scaling, low)),
                f"is not below model.rope_scaling.{high}={getattr(scaling, high)}; write a smaller number",
                related=(f"model.rope_scaling.{high}",),
            )
    yield from _experts(model)
    yield from _lora(model)
    yield from _audio(model)
    yield from _idle_model_fields(model)


def _experts(model: ModelConfig) -> Iterator[Problem]:
    """Check that a mixture of experts fits the model, and that no setting of experts is given without one."""
    experts = model.experts
    if not experts.num_experts:
        for field in dataclasses.fields(experts):
            value, default = getattr(experts, field.name), getattr(ExpertsConfig(), field.name)
            if value != default:
                yield idle(f"model.experts.{field.name}", value, default, "without model.experts.num_experts=N")
        return
    count = str(experts.num_experts)
    if model.shape != "decoder":
        yield Problem(
            "model.experts.num_experts",
            count,
            f"only a decoder has experts, but model.shape={model.shape}; write 0, or model.shape=decoder",
            related=("model.shape",),
        )
    if experts.num_active > experts.num_experts:
        yield Problem(
            "model.experts.num_active",
            str(experts.num_active),
            f"is more than model.experts.num_experts={count}; write at most {count}",
            related=("model.experts.num_experts",),
        )
    if model.mlp_bias:
        yield Problem("model.mlp_bias", "true", "experts have no biases; write false, or model.experts.num_experts=0")
    if experts.shared_gate and not experts.shared_size:
        yield idle("model.experts.shared_gate", "true", False, "without model.experts.shared_size=N")


def _lora(model: ModelConfig) -> Iterator[Problem]:
    """Check that adapters find their matrices, and that no setting of adapters is given where there are none."""
    lora = model.lora
    if not lora.rank:
        for field in dataclasses.fields(lora):
            value, default = getattr(lora, field.name), getattr(LoraConfig(), field.name)
            if value != default:
                yield idle(f"model.lora.{field.name}", value, default, "without model.lora.rank=N")
        return
    for glob, near in useless_targets(model).items():
        what = f"matches no matrix of a block; the names are {', '.join(near)}"
        if model.experts.num_experts and "mlp".startswith(glob.rpartition(".")[0]):
            what += " (the matrices of a mixture's experts, and its router, have no adapters)"
        yield Problem("model.lora.targets", glob, what)


def training_problems(config: RunConfig) -> Iterator[Problem]:
    """Check that the selection of trained parameters is possible."""
    lora, optimizer, begins_with = config.model.lora, config.optimizer, config.begins_with
    if lora.rank and getattr(config, begins_with) is None:
        yield Problem(
            "model.lora.rank",
            str(lora.rank),
            f"adapters need trained weights; name a run that has them, e.g. {begins_with}=runs/mine",
            related=(begins_with,),
        )
    if optimizer.train_also and not lora.rank:
        yield Problem(
            "optimizer.train_also",
            str(optimizer.train_also),
            "has no effect without model.lora.rank=N, because all parameters are trained; write "
            f"{setting('optimizer.train_also', [])}, and see optimizer.freeze",
        )


def _audio(model: ModelConfig) -> Iterator[Problem]:
    """Check that an audio encoder has convolutions, and that no setting of audio is given without one."""
    audio = model.audio
    bins = str(audio.num_mel_bins)
    if not audio.num_mel_bins:
        for field in dataclasses.fields(audio):
            value, default = getattr(audio, field.name), getattr(AudioConfig(), field.name)
            if value != default:
                yield idle(f"model.audio.{field.name}", value, default, "without model.audio.num_mel_bins=N")
        return
    if model.shape == "decoder":
        yield Problem(
            "model.audio.num_mel_bins",
            bins,
            "audio needs an encoder, but model.shape=decoder; write 0, or model.shape=encoder_decoder or encoder",
            related=("model.shape",),
        )
    if not audio.strides:
        yield Problem("model.audio.strides", "[]", "at least one convolution is needed; write its stride, e.g. [2]")
    if model.shape == "encoder" and model.tie_embeddings:
        yield Problem("model.tie_embeddings", "true", "an audio encoder has no table of tokens; write false")
    if model.shape == "encoder" and model.bigram_rows:
        yield Problem("model.bigram_rows", str(model.bigram_rows), "an audio encoder reads no tokens; write 0")


def _idle_model_fields(model: ModelConfig) -> Iterator[Problem]:
    """Yield a problem for each field that would have no effect."""
    window = model.attention_window is not None
    conditions: tuple[tuple[str, Any, bool, str], ...] = (
        ("num_decoder_layers", model.num_decoder_layers, model.shape == "encoder_decoder", "shape=encoder_decoder"),
        ("prefix_attention", model.prefix_attention, model.shape == "decoder", "shape=decoder"),
        ("global_attention_every", model.global_attention_every, window, "attention_window=N"),
        ("local_rope_theta", model.local_rope_theta, window and model.positions == "rope", "attention_window=N"),
        ("bigram_size", model.bigram_size, model.bigram_rows > 0, "bigram_rows=N"),
        ("position_offset", model.position_offset, model.positions == "learned", "positions=learned"),
    )
    for name, value, matters, needed in conditions:
        if value and not matters:
            yield idle(f"model.{name}", value, getattr(ModelConfig(), name), f"without model.{needed}")


def objective_problems(config: PretrainConfig) -> Iterator[Problem]:
    """Yield a problem for an objective that the model's shape does not allow, and for settings of another one."""
    name, shape = config.objective.name, config.model.shape
    if bins := config.model.audio.num_mel_bins:
        yield Problem(
            "model.audio.num_mel_bins", str(bins), "only `bigtx finetune` with task=transcribe reads audio; write 0"
        )
    fitting = {
        "decoder": ("prefix",) if config.model.prefix_attention else ("causal", "fill_in_middle"),
        "encoder": ("masked",),
        "encoder_decoder": ("span_corruption", "prefix"),
    }[shape]
    if name not in fitting:
        what = "a decoder with model.prefix_attention" if config.model.prefix_attention else f"model.shape={shape}"
        yield Problem("objective.name", name, f"is not possible for {what}; write {' or '.join(fitting)}")
    defaults = ObjectiveConfig()
    for field, owner in OBJECTIVES_OF_FIELDS.items():
        value, default = getattr(config.objective, field), getattr(defaults, field)
        if owner != name and value != default:
            yield idle(f"objective.{field}", value, default, f"without objective.name={owner}")
    if shape == "encoder" and config.validation.sample_prompts:
        yield Problem(
            "validation.sample_prompts",
            str(config.validation.sample_prompts),
            f"an encoder (model.shape) generates no text; write {setting('validation.sample_prompts', [])}",
        )


def _nearby_divisors(number: int, wanted: int) -> str:
    divisors = sorted(
        (size for size in range(1, number + 1) if number % size == 0), key=lambda size: abs(size - wanted)
    )
    return " and ".join(str(size) for size in sorted(divisors[:2]))
