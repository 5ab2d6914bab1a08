"""Sliding windows in a config.json. There a window of w includes the token itself and w - 1 before it, in bigtx only
the w - 1.
"""

from __future__ import annotations

from typing import Any

from bigtx.config import shape
from bigtx.config.schema.model import ModelConfig
from bigtx.interop.fields import Fields

Window = tuple[int | None, int | None]
"""The values of attention_window and global_attention_every."""

SLIDING, FULL = "sliding_attention", "full_attention"
"""The names of blocks with and without a window in `layer_types`."""


def read_window(fields: Fields, default: int | None) -> Window:
    """Return `sliding_window` if it applies to all blocks; null means no window.

    Args:
        default: the value if the key is missing.
    """
    if fields.values.get("sliding_window", default) is None:
        return None, None
    return fields.size("sliding_window", default, minimum=2) - 1, None


def read_layer_windows(fields: Fields, layer_types: list[str]) -> Window:
    """Return `sliding_window` if `use_sliding_window` allows it, with the blocks that `layer_types` names.

    Args:
        layer_types: the default of the family, if the file has none.
    """
    types = fields.values.get("layer_types") or layer_types
    if not isinstance(types, list) or not set(types) <= {SLIDING, FULL}:
        fields.problem("layer_types", f"has other values than {SLIDING} and {FULL}")
        return None, None
    if SLIDING not in types:
        return None, None
    if not fields.flag("use_sliding_window", False):
        fields.problem("use_sliding_window", "but layer_types has sliding_attention")
        return None, None
    window, _ = read_window(fields, 4096)
    return window, read_interval(fields, types)


def read_interval(fields: Fields, types: list[str]) -> int | None:
    """Return global_attention_every: every n-th block attends to all tokens, from the first block on. None: no block
    does.
    """
    full = [layer for layer, kind in enumerate(types) if kind == FULL]
    if not full:
        return None
    # Without a second block that attends to all tokens, the next one would be after the last.
    every = full[1] if len(full) > 1 else len(types)
    if full != list(range(0, len(types), every)):
        fields.problem("layer_types", f"has full_attention in blocks {full}; bigtx has it in none, or in 0, n, 2 n ...")
    return every


def layer_types(config: ModelConfig) -> list[str]:
    """Return which blocks have a window."""
    return [SLIDING if shape.has_window(config, layer) else FULL for layer in range(config.num_layers)]


def write_window(config: ModelConfig) -> dict[str, Any]:
    """Return `sliding_window` for all blocks, or null."""
    window = config.attention_window
    return {"sliding_window": None if window is None else window + 1}


def write_layer_windows(config: ModelConfig) -> dict[str, Any]:
    """Return `sliding_window` and the blocks that have it."""
    types = layer_types(config)
    has_window = SLIDING in types
    return {
        "use_sliding_window": has_window,
        **(write_window(config) if has_window else {"sliding_window": None}),
        # Releases of transformers before `layer_types` have windows from a certain block on.
        "max_window_layers": types.index(SLIDING) if has_window else config.num_layers,
        "layer_types": types,
    }


def window_problems(config: ModelConfig, *, allowed: bool, by_layer: bool = False) -> list[str]:
    """Return the problems of a config's windows for a family.

    Args:
        allowed: whether the family has windows.
        by_layer: whether some blocks may have none.
    """
    if config.attention_window is None:
        return []
    if not allowed:
        return [f"model.attention_window={config.attention_window}: the family has none"]
    problems = []
    if config.global_attention_every is not None and not by_layer:
        problems.append(
            f"model.global_attention_every={config.global_attention_every}: the family has none, or one in all blocks"
        )
    if config.local_rope_theta not in (None, config.rope_theta):
        problems.append(
            f"model.local_rope_theta={config.local_rope_theta}: the family has one rope_theta for all blocks"
        )
    return problems
