"""What stands against writing a config as one of a family, because the family leaves a field no choice."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from operator import attrgetter
from typing import Any

from bigtx.config import shape
from bigtx.config.schema.model import ModelConfig


def unlike(config: ModelConfig, fixed: Mapping[str, Any], family: str) -> list[str]:
    """The fields of a config that are not as a family always has them, each as "model.FIELD=VALUE: why".

    Args:
        fixed: the family's value of each field; `experts.num_experts` is a field of a section.
        family: its name, for the reason.
    """
    found = {name: attrgetter(name)(config) for name in fixed}
    return [
        f"model.{name}={_plain(found[name])}: {family} has {_plain(value)}"
        for name, value in fixed.items()
        if found[name] != value
    ]


def heads_problems(config: ModelConfig, family: str, *, free_width: bool = False) -> list[str]:
    """What stands against a family with one key for each query, and heads that share the hidden size evenly.

    Args:
        free_width: the family has a field for the width of a head.
    """
    problems = []
    if shape.num_kv_heads(config) != config.num_heads:
        problems.append(f"model.num_kv_heads={config.num_kv_heads}: {family} has as many as model.num_heads")
    if not free_width and shape.head_width(config) * config.num_heads != config.hidden_size:
        problems.append(f"model.head_width={config.head_width}: {family} has hidden_size / num_heads")
    return problems


def scale_problems(config: ModelConfig, family: str) -> list[str]:
    """What stands against a family that divides the products of queries and keys by the root of the head's width."""
    scale = config.attention_scale
    if scale is None or math.isclose(scale, shape.head_width(config) ** -0.5, rel_tol=1e-6):
        return []
    return [f"model.attention_scale={scale}: {family} has 1 / sqrt(head_width)"]


def mlp_problems(config: ModelConfig, family: str, known: Collection[str]) -> list[str]:
    """What stands against a family that knows only these feed-forwards."""
    if config.mlp in known:
        return []
    return [f"model.mlp={config.mlp}: {family} has {' or '.join(known)}"]


def _plain(value: Any) -> str:
    """A value as it is written in a config."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)
