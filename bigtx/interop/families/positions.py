"""Rotary positions and sliding windows as rows of a family's table.

`rope_parameters` is of transformers 5, `rope_theta` and `rope_scaling` of the releases before it. A window of w there
includes the token itself and w - 1 before it, in bigtx only the w - 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from bigtx.config import shape
from bigtx.config.schema.model import ModelConfig, RopeScalingConfig
from bigtx.interop.table import Entry, Fields, Row

_METHODS = {"default": "none", "linear": "linear", "llama3": "llama3", "yarn": "yarn"}
_FACTOR = Entry("factor", "factor", kind=float)
_LENGTH = Entry("original_max_position_embeddings", "original_length")
_SCALING: dict[str, tuple[Entry, ...]] = {
    "none": (),
    "linear": (_FACTOR,),
    "llama3": (
        _FACTOR,
        _LENGTH,
        Entry("low_freq_factor", "low_frequency_factor", kind=float),
        Entry("high_freq_factor", "high_frequency_factor", kind=float),
    ),
    "yarn": (_FACTOR, _LENGTH, Entry("beta_fast", "beta_fast", 32.0), Entry("beta_slow", "beta_slow", 1.0)),
}
"""The fields of each method of scaling."""

SLIDING, FULL = "sliding_attention", "full_attention"
"""The names of blocks with and without a window in `layer_types`."""


@dataclass(frozen=True)
class Rope(Row):
    """The base of the frequencies and their scaling, if all blocks have the same.

    Attributes:
        theta: the base if config.json has none.
    """

    theta: float = 10_000.0

    def read(self, fields: Fields, config: ModelConfig) -> None:
        """Set rope_theta and rope_scaling."""
        written = "rope_scaling" if fields.values.get("rope_scaling") else "rope_parameters"
        values = fields.values.get(written) or {}
        if not isinstance(values, dict) or any(isinstance(value, dict) for value in values.values()):
            fields.problem(written, "does not have the same rotary frequencies for all blocks")
            return
        theta = {"rope_theta": fields.number("rope_theta", self.theta)}
        rope = Fields(theta | {key: value for key, value in values.items() if value is not None}, f"{written}.")
        if "rope_type" not in values and "type" in values:
            rope.values = {**rope.values, "rope_type": values["type"]}
        for where in (rope, fields):
            where.expect("partial_rotary_factor", 1.0, "rotates a part of each head, but bigtx rotates all of it")
        method = rope.choice("rope_type", _METHODS, "default")
        config.rope_scaling = _read_scaling(rope, method, fields)
        config.rope_theta = rope.number("rope_theta")
        fields.problems += rope.problems

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """Return the keys in both spellings: transformers 4 does not know `rope_parameters`, and would silently use its
        default base."""
        scaling, theta = config.rope_scaling, {"rope_theta": config.rope_theta}
        how = {"rope_type": "default" if scaling.method == "none" else scaling.method}
        for entry in _SCALING[scaling.method]:
            how |= entry.write(scaling)
        return theta | {"rope_parameters": theta | how} | ({} if scaling.method == "none" else {"rope_scaling": how})


def _read_scaling(rope: Fields, method: Any, fields: Fields) -> RopeScalingConfig:
    scaling = RopeScalingConfig(method=method)
    if method in ("llama3", "yarn"):
        longest = fields.size("max_position_embeddings")
        # A value next to the rotary fields has precedence, as in transformers.
        where = fields if _LENGTH.key in fields.values else rope
        length = where.size(_LENGTH.key, longest)
        derived = {"factor": longest / length} if method == "yarn" else {}
        rope.values = {**derived, **rope.values, _LENGTH.key: length}
    for entry in _SCALING[method]:
        entry.read(rope, scaling)
    if scaling.factor < 1.0:
        rope.problem("factor", "is below 1")
        scaling.factor = 1.0
    if method == "yarn":
        rope.expect("truncate", True, "does not round the range of YaRN, but bigtx does")
        magnitude = _yarn_magnitude(rope, scaling.factor)
        if not math.isclose(magnitude, 0.1 * math.log(scaling.factor) + 1.0, rel_tol=1e-6):
            rope.problem("attention_factor", f"(or mscale) is {magnitude:.4f}, but bigtx has only the paper's rule")
    return scaling


def _yarn_magnitude(rope: Fields, factor: float) -> float:
    """Return the factor by which transformers multiplies cos and sin (DeepSeek's mscale included)."""
    if "attention_factor" in rope.values:
        return rope.number("attention_factor")
    if rope.values.get("mscale") and rope.values.get("mscale_all_dim"):
        above, below = (0.1 * rope.number(key) * math.log(factor) + 1.0 for key in ("mscale", "mscale_all_dim"))
        return above / below
    return 0.1 * math.log(factor) + 1.0


@dataclass(frozen=True)
class Window(Row):
    """A `sliding_window` of all blocks; null means no window.

    Attributes:
        default: the value if config.json has none.
    """

    default: int | None = 4096

    by_layer: ClassVar[bool] = False
    """Whether some blocks may have no window."""

    def read(self, fields: Fields, config: ModelConfig) -> None:
        """Set attention_window."""
        if fields.values.get("sliding_window", self.default) is not None:
            config.attention_window = fields.size("sliding_window", self.default, minimum=2) - 1

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """Return the window, or null."""
        window = config.attention_window
        return {"sliding_window": None if window is None else window + 1}

    def problems(self, config: ModelConfig) -> list[str]:
        """Return the fields that differ between blocks."""
        if config.attention_window is None:
            return []
        found = []
        every, theta = config.global_attention_every, config.local_rope_theta
        if every is not None and not self.by_layer:
            found.append(f"model.global_attention_every={every}: the family has none, or one in all blocks")
        if theta not in (None, config.rope_theta):
            found.append(f"model.local_rope_theta={theta}: the family has one rope_theta for all blocks")
        return found


class SwitchedWindow(Window):
    """A window of all blocks where `use_sliding_window` switches it on."""

    def read(self, fields: Fields, config: ModelConfig) -> None:
        """Set attention_window."""
        if fields.flag("use_sliding_window", False):
            super().read(fields, config)

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """Return the window and the switch."""
        return super().write(config) | {"use_sliding_window": config.attention_window is not None}


@dataclass(frozen=True)
class LayerWindows(Window):
    """A window of the blocks that `layer_types` names, where `use_sliding_window` allows it.

    Attributes:
        alternates: which blocks have a window if `layer_types` is missing: every second one before
            `max_window_layers`, instead of those from `max_window_layers` on.
    """

    alternates: bool = False

    by_layer: ClassVar[bool] = True

    def read(self, fields: Fields, config: ModelConfig) -> None:
        """Set attention_window and global_attention_every."""
        types = fields.values.get("layer_types") or self._default_types(fields, config.num_layers)
        if not isinstance(types, list) or not set(types) <= {SLIDING, FULL}:
            fields.problem("layer_types", f"has other values than {SLIDING} and {FULL}")
        elif SLIDING in types and not fields.flag("use_sliding_window", False):
            fields.problem("use_sliding_window", "but layer_types has sliding_attention")
        elif SLIDING in types:
            super().read(fields, config)
            config.global_attention_every = read_interval(fields, types)

    def _default_types(self, fields: Fields, num_layers: int) -> list[str]:
        if not fields.flag("use_sliding_window", False):
            return [FULL] * num_layers
        border = fields.size("max_window_layers", 28, minimum=0)
        if self.alternates:
            return [SLIDING if layer % 2 == 0 and layer < border else FULL for layer in range(num_layers)]
        return [SLIDING if layer >= border else FULL for layer in range(num_layers)]

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """Return the window and the blocks that have it."""
        types = layer_types(config)
        has_window = SLIDING in types
        return {
            "use_sliding_window": has_window,
            **(super().write(config) if has_window else {"sliding_window": None}),
            # Releases of transformers before `layer_types` have windows from a certain block on.
            "max_window_layers": types.index(SLIDING) if has_window else config.num_layers,
            "layer_types": types,
        }


def layer_types(config: ModelConfig) -> list[str]:
    """Return which blocks have a window."""
    return [SLIDING if shape.has_window(config, layer) else FULL for layer in range(config.num_layers)]


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
