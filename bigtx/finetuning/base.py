"""The base, a run that fine-tuning starts from: base.json, and the weights that a task loads from it, those that
start from the seed, and those that are dropped.

A parameter is loaded if the base has one of its name and shape. An encoder may be made of a decoder, whose blocks then
attend in both directions (LLM2Vec, arXiv:2404.05961), and a decoder of an encoder. A table with a row for each token
or position may have another size: the common rows are loaded, and the others start from the seed. The head of a
classifier is loaded only for the same classes in the same order. Other differences are refused.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bigtx.config.load import load_run_config
from bigtx.config.schema import FinetuneConfig, LoraConfig
from bigtx.model.initial import initial_value
from bigtx.train.run_folder import BASE_FACTS
from bigtx.utils.errors import ConfigError
from bigtx.utils.files import read_object
from bigtx.utils.units import format_names

if TYPE_CHECKING:
    from bigtx.engine.checkpoint import Checkpoint
    from bigtx.engine.engine import ReadRange
    from bigtx.model.transformer import Transformer

Shape = tuple[int, ...]

BASE = "base.json"
"""The file in the run folder that records the base and the origin of each parameter."""
ROWS_MAY_DIFFER = ("embedding.weight", "position_embedding.weight", "head.weight", "head.bias")
"""Tables with a row for each token or position."""
MAX_LISTED = 6


@dataclass(frozen=True)
class Transfer:
    """The origin of each parameter.

    Attributes:
        loaded: parameters that are loaded unchanged.
        resized: the number of loaded rows, and the number of rows of the new table, by parameter.
        new: parameters that start from the seed.
        dropped: parameters of the base that the model does not have.
        stack: the names of the base's stack and of the model's, if the names of their only stacks differ.
    """

    loaded: list[str]
    resized: dict[str, tuple[int, int]]
    new: list[str]
    dropped: list[str]
    shapes: Mapping[str, Shape] = field(repr=False)
    stack: tuple[str, str] | None = None

    @property
    def initialized(self) -> list[str]:
        """Return the parameters that start from the seed, completely or in some rows."""
        return self.new + [name for name, (kept, total) in self.resized.items() if kept < total]

    def describe(self) -> str:
        """Return a description for the log."""
        parts = [f"{len(self.loaded)} parameters loaded"]
        if self.stack is not None:
            parts.append("the {} is made of the {}'s blocks".format(*reversed(self.stack)))
        if self.resized:
            rows = (f"{name} ({kept:,} of {total:,} rows)" for name, (kept, total) in self.resized.items())
            parts.append(f"resized: {', '.join(rows)}")
        parts.append(f"new: {format_names(self.new, MAX_LISTED) or 'none'}")
        parts.append(f"dropped: {format_names(self.dropped, MAX_LISTED) or 'none'}")
        return "; ".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """Return the facts for base.json."""
        return {
            "loaded": self.loaded,
            "stack": self.stack and dict(zip(("from", "to"), self.stack, strict=True)),
            "resized": {name: {"rows_loaded": kept, "rows": total} for name, (kept, total) in self.resized.items()},
            "new": self.new,
            "dropped": self.dropped,
        }

    def read(self, source: Checkpoint, initial: ReadRange) -> ReadRange:
        """Return a reader of the model's weights: from the base where it has a value, else the initial weights."""

        def read(name: str, kind: str, start: int, stop: int) -> Tensor:
            if name in self.resized:
                rows, total = self.resized[name]
                border = rows * (torch.Size(self.shapes[name]).numel() // total)
                parts = []
                if start < border:
                    parts.append(source.read(_origin(name, self.stack), kind, start, min(stop, border)))
                if stop > border:
                    parts.append(initial(name, kind, max(start, border), stop))
                return torch.cat(parts)
            if name in new:
                return initial(name, kind, start, stop)
            return source.read(_origin(name, self.stack), kind, start, stop)

        new = set(self.new)
        return read


def plan_transfer(
    shapes: Mapping[str, Shape], base: Mapping[str, Shape], *, name: str, fresh: Iterable[str] = ()
) -> Transfer:
    """Determine the origin of each parameter.

    Args:
        shapes: the shapes of the model's parameters.
        base: the shapes of the base's parameters.
        name: the base as the user wrote it, for the error.
        fresh: parameters that start from the seed even if the base has them.

    Raises:
        ConfigError: a parameter has different shapes in the model and the base.
    """
    loaded, resized, different, new = [], {}, [], []
    stack = _other_stack(shapes, base)
    fresh = set(fresh)
    origins = {parameter: _origin(parameter, stack) for parameter in shapes if parameter not in fresh}
    for parameter, shape in shapes.items():
        before = None if parameter in fresh else base.get(origins[parameter])
        if before == shape:
            loaded.append(parameter)
        elif before is not None and parameter in ROWS_MAY_DIFFER and before[1:] == shape[1:]:
            resized[parameter] = (min(before[0], shape[0]), shape[0])
        elif before is None:
            new.append(parameter)
        else:
            different.append(f"{parameter} {list(before)} there, {list(shape)} here")
    if different:
        raise ConfigError(
            f"base={name} does not fit the section model: {'; '.join(different[:5])} ({len(different)} in all); leave "
            "out the settings of model that change its shape"
        )
    used = set(origins.values())
    dropped = [parameter for parameter in base if parameter not in used]
    return Transfer(loaded, resized, new, dropped, shapes, stack)


def other_classes(config: FinetuneConfig, base: str, names: Iterable[str]) -> list[str]:
    """Return the parameters of the classification head, unless the base has the same classes.

    Args:
        names: parameters that both the base and the run have.
    """
    head = [name for name in names if name.startswith("head.classes.")]
    if head:
        theirs = load_run_config(base)
        if isinstance(theirs, FinetuneConfig) and theirs.classify.classes == config.classify.classes:
            return []
    return head


def read_base_facts(folder: Path) -> dict[str, Any]:
    """Return the content of base.json; empty if it is missing or damaged."""
    facts = read_object(folder / BASE)
    return facts if facts.keys() >= set(BASE_FACTS) else {}


def untrained(config: FinetuneConfig, model: Transformer, base: Checkpoint | None) -> Transformer:
    """Return the model of a run as it was before the first step, in evaluation mode; not for classifiers.

    Args:
        config: the config of the run.
        model: the model of the run; the result has its device and dtype.
        base: the checkpoint that the run started from; None if it started from the seed.
    """
    from bigtx.engine.trained import empty_model

    own = next(model.parameters())
    # New adapters change nothing.
    plain = dataclasses.replace(model.config, lora=LoraConfig())
    made = empty_model(plain, own.device, own.dtype)
    shapes = {name: tuple(parameter.shape) for name, parameter in made.named_parameters()}

    def of_seed(name: str, kind: str, start: int, stop: int) -> Tensor:
        return initial_value(name, shapes[name], plain, config.seed, start, stop)

    read: ReadRange = of_seed
    if base is not None:
        read = plan_transfer(shapes, base.shapes, name=str(base.path)).read(base, of_seed)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            parameter.copy_(read(name, "master", 0, parameter.numel()).view(parameter.shape))
    return made.eval()


def _origin(name: str, stack: tuple[str, str] | None) -> str:
    """Return the base's name of a parameter, for a `Transfer.stack`."""
    # Tables of relative positions have different buckets in encoders and decoders.
    if stack is None or not name.startswith(f"{stack[1]}.") or ".relative_bias." in name:
        return name
    return stack[0] + name.removeprefix(stack[1])


def _other_stack(shapes: Mapping[str, Shape], base: Mapping[str, Shape]) -> tuple[str, str] | None:
    theirs, ours = ({name.split(".")[0] for name in names if ".blocks." in name} for names in (base, shapes))
    return (theirs.pop(), ours.pop()) if len(theirs) == len(ours) == 1 and theirs != ours else None
