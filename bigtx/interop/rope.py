"""Rotary positions in a config.json: `rope_parameters` of transformers 5, `rope_theta` and `rope_scaling` before it."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from bigtx.config.schema.model import ModelConfig, RopeScalingConfig
from bigtx.interop.fields import Fields

_METHODS = {"default": "none", "linear": "linear", "llama3": "llama3", "yarn": "yarn"}


def read_rope(fields: Fields, default_theta: float = 10_000.0) -> tuple[float, RopeScalingConfig]:
    """Return the base of the frequencies and their scaling, if all blocks have the same.

    Args:
        default_theta: the default of the family, if the file has none.
    """
    written = "rope_scaling" if fields.values.get("rope_scaling") else "rope_parameters"
    values = fields.values.get(written) or {}
    if not isinstance(values, dict) or any(isinstance(value, dict) for value in values.values()):
        fields.problem(written, "does not have the same rotary frequencies for all blocks")
        return default_theta, RopeScalingConfig()
    theta = {"rope_theta": fields.number("rope_theta", default_theta)}
    rope = Fields(theta | {key: value for key, value in values.items() if value is not None}, f"{written}.")
    if "rope_type" not in values and "type" in values:
        rope.values = {**rope.values, "rope_type": values["type"]}
    for where in (rope, fields):
        where.expect("partial_rotary_factor", 1.0, "rotates a part of each head, but bigtx rotates all of it")
    method = rope.choice("rope_type", _METHODS, "default")
    scaling = _read_scaling(rope, method, fields)
    fields.problems += rope.problems
    return rope.number("rope_theta"), scaling


def _read_scaling(rope: Fields, method: str, fields: Fields) -> RopeScalingConfig:
    if method == "none":
        return RopeScalingConfig()
    if method == "linear":
        return RopeScalingConfig(method="linear", factor=_factor(rope, None))
    longest = fields.size("max_position_embeddings")
    # A value next to the rotary fields has precedence, as in transformers.
    where = fields if "original_max_position_embeddings" in fields.values else rope
    length = where.size("original_max_position_embeddings", longest)
    if method == "llama3":
        return RopeScalingConfig(
            method="llama3",
            factor=_factor(rope, None),
            original_length=length,
            low_frequency_factor=rope.number("low_freq_factor"),
            high_frequency_factor=rope.number("high_freq_factor"),
        )
    factor = _factor(rope, longest / length)
    rope.expect("truncate", True, "does not round the range of YaRN, but bigtx does")
    magnitude = _yarn_magnitude(rope, factor)
    if not math.isclose(magnitude, 0.1 * math.log(factor) + 1.0, rel_tol=1e-6):
        rope.problem("attention_factor", f"(or mscale) is {magnitude:.4f}, but bigtx has only the paper's rule")
    return RopeScalingConfig(
        method="yarn",
        factor=factor,
        original_length=length,
        beta_fast=rope.number("beta_fast", 32.0),
        beta_slow=rope.number("beta_slow", 1.0),
    )


def _factor(rope: Fields, default: float | None) -> float:
    factor = rope.number("factor", default)
    if factor < 1.0:
        rope.problem("factor", "is below 1")
    return max(factor, 1.0)


def _yarn_magnitude(rope: Fields, factor: float) -> float:
    """Return the factor by which transformers multiplies cos and sin (DeepSeek's mscale included)."""
    if "attention_factor" in rope.values:
        return rope.number("attention_factor")
    if rope.values.get("mscale") and rope.values.get("mscale_all_dim"):
        above, below = (0.1 * rope.number(key) * math.log(factor) + 1.0 for key in ("mscale", "mscale_all_dim"))
        return above / below
    return 0.1 * math.log(factor) + 1.0


def write_rope(config: ModelConfig) -> dict[str, Any]:
    """Return the fields for `config.rope_theta` and `config.rope_scaling`, in both spellings.

    transformers 4 does not know `rope_parameters`, and would silently use its default base.
    """
    scaling = config.rope_scaling
    names = {
        "none": {},
        "linear": {"factor": "factor"},
        "llama3": {
            "factor": "factor",
            "original_length": "original_max_position_embeddings",
            "low_frequency_factor": "low_freq_factor",
            "high_frequency_factor": "high_freq_factor",
        },
        "yarn": {
            "factor": "factor",
            "original_length": "original_max_position_embeddings",
            "beta_fast": "beta_fast",
            "beta_slow": "beta_slow",
        },
    }[scaling.method]
    values = dataclasses.asdict(scaling)
    how = {"rope_type": "default" if scaling.method == "none" else scaling.method}
    how |= {foreign: values[name] for name, foreign in names.items()}
    written: dict[str, Any] = {
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_theta": config.rope_theta, **how},
    }
    if scaling.method != "none":
        written["rope_scaling"] = dict(how)
    return written
