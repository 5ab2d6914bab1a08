"""Distillation for every task: a teacher next to the student (Hinton et al., arXiv:1503.02531).

    batch ──▶ task.loss(model, batch) ──▶ model(tokens, labels, ...)
                                            ├──▶ teacher, without gradients ──▶ soft targets ─┐
                                            └──▶ student ◀────────────────────────────────────┘

The task gets a model that calls the teacher first. For tokens with labels, the student's fused loss includes the soft
targets; for classes, the divergence is added afterwards. So no task contains code for distillation.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from bigtx.config.schema import DistillConfig, FinetuneConfig, RunConfig
from bigtx.engine.checkpoint import Checkpoint, MergedCheckpoint
from bigtx.engine.trained import find_with_tokenizer, read_model
from bigtx.model.logits import SoftTargets, divergence
from bigtx.model.loss import IGNORED, Loss, Task
from bigtx.model.size import count_parameters, flops_per_row, stacks
from bigtx.utils.errors import ConfigError
from bigtx.utils.units import format_count

if TYPE_CHECKING:
    from bigtx.engine.engine import ReadRange
    from bigtx.model.transformer import Transformer
    from bigtx.tokenizer.tokenizer import Tokenizer

Config = TypeVar("Config", bound=RunConfig)
Shape = tuple[int, ...]

LOSS_ONLY = ("z_loss", "label_smoothing")
"""Arguments of a model that have no effect on its logits."""


class Teacher:
    """A trained run that a student learns from.

    Attributes:
        checkpoint: the folder of its weights.
        config: the config of its run.
        manifest_sha256: the hash that identifies its weights.
        tokenizer: the tokenizer of its run.
    """

    def __init__(self, checkpoint: Path) -> None:
        """Args: checkpoint: its folder, inside its run.

        Raises:
            BigtxError: the folder is not a checkpoint of a run that this bigtx can read.
        """
        self.checkpoint, self.config, self.tokenizer = find_with_tokenizer(checkpoint)
        self.model = self.config.model
        self.manifest_sha256 = Checkpoint(checkpoint).manifest_sha256

    def complete(self, config: Config) -> Config:
        """Return the student's config with the vocabulary size, the classes and the pooling of the teacher where the
        config does not set them."""
        if config.model.vocab_size is None:
            model = dataclasses.replace(config.model, vocab_size=self.model.vocab_size)
            config = dataclasses.replace(config, model=model)
        if isinstance(config, FinetuneConfig) and isinstance(self.config, FinetuneConfig):
            own, theirs = config.classify, self.config.classify
            if config.task == self.config.task == "classify":
                own = dataclasses.replace(
                    own,
                    classes=own.classes or theirs.classes,
                    pooling=theirs.pooling if own.pooling == "auto" else own.pooling,
                )
                config = dataclasses.replace(config, classify=own)
        return config

    def check(self, config: RunConfig, tokenizer: Tokenizer, longest: int) -> None:
        """Refuse a teacher whose outputs do not match the student's.

        Args:
            config: the student's complete config.
            longest: columns of the longest row that both will read.

        Raises:
            ConfigError: the teacher does not fit; the message names every mismatch.
        """
        problems = list(self._problems(config, tokenizer, longest))
        if problems:
            raise ConfigError(f"distill.teacher={config.distill.teacher}: {'; '.join(problems)}")

    def _problems(self, config: RunConfig, tokenizer: Tokenizer, longest: int) -> Iterator[str]:
        own, theirs = config.model, self.model
        if self.tokenizer.fingerprint != tokenizer.fingerprint:
            yield (
                "its tokenizer is not the student's, so the same ids mean different texts; use data or a base with the "
                "teacher's tokenizer"
            )
        elif theirs.num_classes is None and theirs.vocab_size != own.vocab_size:
            yield f"it has {theirs.vocab_size:,} ids; write model.vocab_size={theirs.vocab_size}"
        for field in ("shape", "prefix_attention", "audio"):
            if getattr(own, field) != getattr(theirs, field):
                yield f"its model.{field} is {getattr(theirs, field)}, and the student's {getattr(own, field)}"
        if theirs.positions == "learned" and longest > theirs.max_sequence_length:
            yield f"it has {theirs.max_sequence_length:,} learned positions, and rows are up to {longest:,} long"
        if own.num_classes is None and theirs.num_classes is None:
            return
        if own.num_classes is None or theirs.num_classes is None:
            output = "classes" if theirs.num_classes else "tokens"
            yield f"it predicts {output}, which the student does not; name a run with the same kind of output"
            return
        assert isinstance(config, FinetuneConfig) and isinstance(self.config, FinetuneConfig)
        for field in ("classes", "pooling"):
            mine, other = getattr(config.classify, field), getattr(self.config.classify, field)
            if mine != other:
                yield f"its classify.{field} is {_text(other)}, and the student's {_text(mine)}"

    def describe(self) -> str:
        """Return a description for the log."""
        return f"{self.checkpoint}, {format_count(count_parameters(self.model).total)} parameters"

    def flops_per_row(self, **lengths: int) -> float:
        """Return the floating-point operations of the forward pass."""
        return flops_per_row(self.model, **lengths) / 3

    def teach(self, task: Task, settings: DistillConfig, device: torch.device, precision: str) -> Distilled:
        """Read the teacher's weights, and return the task with this teacher.

        Raises:
            CheckpointError: the weights are damaged.
        """
        dtype = torch.float32 if precision == "fp32" else torch.bfloat16
        model = read_model(self.checkpoint, self.model, device=device, dtype=dtype)
        return Distilled(task, model.requires_grad_(False), settings)

    def layers(self, shapes: Mapping[str, Shape], initial: ReadRange) -> ReadRange:
        """Return the student's initial weights: those of evenly spaced blocks of the teacher, as in DistilBERT
        (arXiv:1910.01108).

        Args:
            shapes: the shapes of the student's parameters.
            initial: reads the parameters that the teacher lacks.

        Raises:
            ConfigError: a parameter has another shape in the teacher.
        """
        source = MergedCheckpoint(self.checkpoint)
        origins = {name: self._origin(name, shapes) for name in shapes}
        known = {name: origin for name, origin in origins.items() if origin in source.shapes}
        different = [name for name, origin in known.items() if source.shapes[origin] != shapes[name]]
        if different:
            name = different[0]
            raise ConfigError(
                f"distill.copy_layers=true: {name} is {list(shapes[name])}, and the teacher's "
                f"{list(source.shapes[known[name]])} ({len(different)} such parameters); only the numbers of layers "
                "may differ"
            )

        def read(name: str, kind: str, start: int, stop: int) -> Tensor:
            return source.read(known[name], kind, start, stop) if name in known else initial(name, kind, start, stop)

        return read

    def _origin(self, name: str, shapes: Mapping[str, Shape]) -> str:
        """Return the name of the teacher's parameter that initializes a student's."""
        stack, dot, rest = name.partition(".blocks.")
        if not dot:
            return name
        number, _, part = rest.partition(".")
        own = 1 + max(int(other.split(".")[2]) for other in shapes if other.startswith(f"{stack}.blocks."))
        return f"{stack}.blocks.{int(number) * stacks(self.model)[stack] // own}.{part}"


class Distilled:
    """A task whose loss includes the divergence from a teacher."""

    def __init__(self, task: Task, teacher: Transformer, settings: DistillConfig) -> None:
        """Args:
        task: computes the loss of the labels.
        teacher: the teacher's model, on the device of the batches.
        """
        self.task, self.teacher, self.settings = task, teacher, settings

    def loss(self, model: Callable[..., Any], batch: Any) -> Loss:
        """Return (1 - w) times the task's loss plus w T^2 times the divergence of the student from the teacher. The
        reported loss is the task's."""
        taught = TaughtModel(model, self.teacher, self.settings)
        loss = self.task.loss(taught, batch)
        if taught.divergence is None:
            return loss
        weight = self.settings.weight
        distance = (taught.divergence * (batch.labels != IGNORED)).sum()
        return loss._replace(loss_sum=(1.0 - weight) * loss.loss_sum + weight * distance)


class TaughtModel:
    """A student that calls the teacher with the same input.

    Attributes:
        divergence: fp32 [...], of each row of logits, after a call without labels; None where the student's loss
            includes the divergence already.
    """

    def __init__(self, student: Callable[..., Any], teacher: Transformer, settings: DistillConfig) -> None:
        self.student, self.teacher, self.settings = student, teacher, settings
        self.divergence: Tensor | None = None

    def __call__(self, *, labels: Tensor | None = None, **inputs: Any) -> Any:
        """Call the student's `forward` with keyword arguments."""
        settings = self.settings
        shared = {name: value for name, value in inputs.items() if name not in LOSS_ONLY}
        with torch.no_grad():
            expected = self.teacher(**shared, on_demand=labels is not None)
        if labels is not None:
            targets = SoftTargets(expected, settings.weight, settings.temperature)
            return self.student(labels=labels, **inputs, soft_targets=targets)
        logits = self.student(**inputs)
        self.divergence = divergence(logits, expected, settings.temperature)
        return logits


def _text(value: Any) -> str:
    return f"[{', '.join(value)}]" if isinstance(value, list) else str(value)
