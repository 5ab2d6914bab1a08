"""A model under DeepSpeed, ready to train: the one place where steps happen."""

from __future__ import annotations

import copy
import gc
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.config import DeepSpeedConfig
from torch import Tensor, nn

from bigtx.config.schema import FinetuneConfig, RunConfig
from bigtx.engine.deepspeed_config import deepspeed_config
from bigtx.engine.fragments import (
    Fragment,
    fill_unheld,
    held_fragments,
    owned_fragments,
    refresh_model_weights,
)
from bigtx.engine.optimizers import Optimizer, parameter_groups
from bigtx.engine.task import Task as Task
from bigtx.engine.task import TaskLoss as TaskLoss
from bigtx.engine.trainable import frozen_parameters
from bigtx.model.experts import Routing, routing_loss, shares_of
from bigtx.utils.errors import ConfigError
from bigtx.utils.seeds import derive_seed

ReadRange = Callable[[str, str, int, int], Tensor]
"""(parameter name, kind, start, stop) -> fp32 [stop - start]: elements of a flattened parameter or of its state."""

LOSS_SCALE_NUMBERS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
"""What DeepSpeed's dynamic loss scaler changes as it goes; its other attributes are settings."""


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did.

    Attributes:
        loss_sum: fp32 scalar on the device: reported loss summed over the labels of all ranks.
        grad_norm: global norm before clipping; infinite or NaN if the step was skipped.
        skipped: a rank met a non-finite value, so no rank changed its weights.
        routing: if there are experts, on the device: of the tokens of all ranks.
    """

    loss_sum: Tensor
    grad_norm: float
    skipped: bool
    routing: Routing | None = None


class Engine:
    """A Transformer, its optimizer and its ranks.

    Attributes:
        module: the model; its weights may be partitioned (ZeRO-3).
        device: where batches go.
        optimizer: the base optimizer under DeepSpeed's wrapper.
        frozen: parameters that are not trained: no fragment holds them.
        fragments: what this rank holds.
        owned: what this rank writes to a checkpoint.
        expert_counts: fp32 [layers, E], tokens that each expert had in the last step that was not skipped, over all
            ranks: the balance loss of the next step goes by their shares. None before the first step.
    """

    def __init__(self, config: RunConfig, make_model: Callable[[], nn.Module]) -> None:
        """Build the model, sharded from the start under ZeRO-3; its weights are not set (see `fill`).

        Args:
            make_model: makes the module with unset weights.

        Raises:
            ConfigError: settings that contradict each other, or that this device or DeepSpeed cannot do.
        """
        refuse_unsupported_precision(config.engine.precision)
        if config.engine.deterministic:
            use_deterministic_kernels()
        self.config = config
        self.expert_counts: Tensor | None = None
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.deepspeed_config = deepspeed_config(config, world_size=self.world_size)
        refuse_unknown_keys(self.deepspeed_config)
        self.stage = config.engine.zero_stage
        self.replicated = self.stage == 0
        self.device = torch.device(deepspeed.get_accelerator().current_device_name())
        arithmetic = torch.float32 if config.engine.precision == "fp32" else torch.bfloat16

        # ZeRO-3 cuts each parameter up as soon as it exists, so no rank ever holds the whole model.
        with deepspeed.zero.Init(config_dict_or_path=self.deepspeed_config) if self.stage == 3 else self.device:
            model = make_model()
        self.frozen = _freeze(model, config)
        model.activation_checkpointing = config.engine.activation_checkpointing  # type: ignore[assignment]
        model.dropout_seed = derive_seed("dropout", config.seed)  # type: ignore[assignment]
        if self.stage == 3:
            _gather_whole_blocks(model)
        if config.engine.compile:
            _compile(model, config, self.device)
        groups = parameter_groups(config.optimizer, model.named_parameters())
        self.optimizer = Optimizer(groups, config.optimizer, arithmetic, self.device)
        # What lives until the end of the run is taken out of garbage collection: DeepSpeed collects many times while it
        # starts, and the loop should not stop for a walk over a million objects of imported modules.
        gc.collect()
        gc.freeze()
        self.deepspeed, *_ = deepspeed.initialize(model=model, optimizer=self.optimizer, config=self.deepspeed_config)
        self.module: nn.Module = self.deepspeed.module
        if config.engine.precision == "fp16":
            # A run that never becomes finite ends by train.max_skipped_steps, with an error that says so.
            self.deepspeed.optimizer.loss_scaler.raise_error_at_min_scale = False

        self.fragments: list[Fragment] = held_fragments(self.deepspeed)
        self.owned = owned_fragments(
            self.fragments, replicated=self.replicated, rank=self.rank, world_size=self.world_size
        )
        self.optimizer.bind(self.fragments, self._flats(), replicated=self.replicated)

    def _flats(self) -> list[tuple[int, Tensor]]:
        """(group, tensor) that the base optimizer updates, in the same order on every rank."""
        wrapper = self.deepspeed.optimizer
        if self.stage == 3:
            return [
                (wrapper.sub_group_to_group_id[index], flat)
                for index, flat in enumerate(wrapper.fp32_partitioned_groups_flat)
            ]
        return [(index, flat) for index, group in enumerate(self.optimizer.param_groups) for flat in group["params"]]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each parameter of the module, whole also where it is partitioned."""
        return {
            name: tuple(getattr(parameter, "ds_shape", parameter.shape))
            for name, parameter in self.module.named_parameters()
        }

    def fill(self, read: ReadRange, *, states: bool) -> None:
        """Set the master weights, and the optimizer states if asked, then the model's weights from them.

        Args:
            read: the source: initial values, or a checkpoint. Every rank reads what it holds.
            states: whether to read the states too; otherwise they are as at the start of a run.
        """
        with torch.no_grad():
            for _, flat in self._flats():
                flat.zero_()  # Padding is never read, but must not hold a NaN.
            for fragment in self.fragments:
                fragment.view(fragment.flat).copy_(read(fragment.name, "master", fragment.start, fragment.stop))
                for kind in self.optimizer.state_kinds(fragment.group):
                    state = fragment.view(self.optimizer.state[fragment.flat][kind])
                    if states:
                        state.copy_(read(fragment.name, kind, fragment.start, fragment.stop))
                    elif kind == "ema":
                        state.copy_(fragment.view(fragment.flat))
            for name, parameter in self.module.named_parameters():
                if not parameter.requires_grad:
                    fill_unheld(parameter, name, read)
            refresh_model_weights(self.deepspeed)

    def train_step(
        self,
        micro_batches: Sequence[Any],
        task: Task,
        *,
        num_labels: int,
        num_tokens: int,
        learning_rate_factor: float,
    ) -> StepResult:
        """Forward, backward and update over one global batch.

        Args:
            micro_batches: this rank's; as many as the accumulation.
            num_labels: labels of the global batch, over all ranks: the loss is their mean.
            num_tokens: tokens of the global batch, over all ranks: the losses of experts are their mean.
            learning_rate_factor: factor on every group's peak rate.

        Returns:
            The result; the gradient is that of loss sums over all ranks divided by `num_labels`.
        """
        self.deepspeed.train()
        self.optimizer.set_learning_rate_factor(learning_rate_factor)
        # DeepSpeed averages gradients over ranks; the factor turns that mean into a sum.
        scale = self.world_size / max(1, num_labels)
        routing: Routing | None = None
        totals, norm = torch.zeros((), device=self.device), 0.0
        shares = None if self.expert_counts is None else shares_of(self.expert_counts)
        if self.config.engine.precision == "fp16":
            # Held for the step: left alone, DeepSpeed 0.19 doubles the scale before it divides the gradient by it.
            self.deepspeed.optimizer.override_loss_scale(self.deepspeed.optimizer.loss_scaler.cur_scale)
        for index, batch in enumerate(micro_batches):
            loss = task.loss(self.deepspeed, batch)
            totals, scaled = totals + loss.reported_sum.detach(), loss.loss_sum * scale
            if loss.routing is not None:
                own, experts = loss.routing.detach(), self.config.model.experts
                routing = own if routing is None else routing + own
                added = routing_loss(loss.routing, shares, experts)
                scaled = scaled + added * (self.world_size / max(1, num_tokens))
            self.deepspeed.backward(scaled, scale_wrt_gas=False)
            if self.replicated and index == len(micro_batches) - 1:
                norm = self._clip_at_stage_0()
            self.deepspeed.step()
        loss_sum, routing = _over_ranks(totals, routing)
        if self.replicated:
            skipped = not math.isfinite(norm)
        else:
            norm, skipped = float(self.deepspeed.get_global_grad_norm()), self.deepspeed.optimizer.overflow
        if routing is not None and not skipped:
            self.expert_counts = routing.counts
        return StepResult(loss_sum, norm, skipped, routing)

    def _clip_at_stage_0(self) -> float:
        """Clip the reduced gradients, or drop them if their norm is not finite. Returns the norm before that."""
        parameters = [parameter for parameter in self.module.parameters() if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters])  # type: ignore[misc]
        limit = self.config.train.gradient_clipping
        if not torch.isfinite(norm):
            for parameter in parameters:
                parameter.grad = None
        elif limit > 0:
            torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)
        return float(norm)

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Any], task: Task) -> tuple[float, int]:
        """Reported loss summed over all ranks' labels, and their number. Every rank brings as many batches, on the CPU:
        labels are counted there, so that nothing waits for the device before the end."""
        self.deepspeed.eval()
        loss_sum, num_labels = torch.zeros((), dtype=torch.float64, device=self.device), 0
        for batch in batches:
            num_labels += batch.num_labels
            loss_sum += task.loss(self.deepspeed, batch.to(self.device)).reported_sum
        totals = torch.stack([loss_sum, torch.full_like(loss_sum, num_labels)])
        dist.all_reduce(totals)
        return float(totals[0]), int(totals[1])

    def loss_scale(self) -> dict[str, float]:
        """What the dynamic loss scaler has learned (fp16), else nothing."""
        if self.config.engine.precision != "fp16":
            return {}
        scaler = self.deepspeed.optimizer.loss_scaler
        return {name: getattr(scaler, name) for name in LOSS_SCALE_NUMBERS if hasattr(scaler, name)}

    def set_loss_scale(self, numbers: dict[str, Any]) -> None:
        """Restore what `loss_scale` gave; nothing where this run or that one is not fp16."""
        if self.config.engine.precision == "fp16" and self.deepspeed.optimizer.loss_scaler.dynamic:
            vars(self.deepspeed.optimizer.loss_scaler).update(numbers)

    def set_expert_counts(self, counts: list[list[float]] | None) -> None:
        """Restore `expert_counts` from a manifest; JSON keeps the numbers exactly."""
        self.expert_counts = None if counts is None else torch.tensor(counts, device=self.device)


def _freeze(model: nn.Module, config: RunConfig) -> list[str]:
    """Take the gradients off the parameters that are not trained; returns their names."""
    parameters = dict(model.named_parameters())
    frozen = frozen_parameters(config, parameters)
    for name in frozen:
        parameters[name].requires_grad_(False)
    return frozen


def _gather_whole_blocks(model: nn.Module) -> None:
    """Have ZeRO-3 gather a block as a whole, around its forward and outside of it: what its forward records, for
    torch.compile or to recompute it, then holds no communication."""
    deepspeed.utils.set_z3_leaf_modules(model, [type(model.blocks[0])])  # type: ignore[index]
    for block in model.blocks:  # type: ignore[union-attr]
        if any(parameter.requires_grad for parameter in block.parameters()):
            block.register_forward_pre_hook(_ask_for_gradient)


def _compile(model: nn.Module, config: RunConfig, device: torch.device) -> None:
    """Compile the blocks, and on a GPU the loss."""
    # Rows of a corpus have one length. Those of records have many: after the second torch compiles for any.
    dynamic = None if isinstance(config, FinetuneConfig) else False
    for block in model.blocks:  # type: ignore[union-attr]
        # The forward alone: DeepSpeed's hooks would be traced, and compiled anew for each block.
        block.forward = torch.compile(block.forward, dynamic=dynamic)
    if device.type == "cuda" and hasattr(model.head, "compile_loss"):
        model.head.compile_loss()  # type: ignore[operator]


def _ask_for_gradient(block: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Have the gradient reach a block's input also where all below it is frozen: DeepSpeed reduces a block's gradients
    and lets its weights go once the gradient of its input is there, and without one it would do so before its turn."""
    x, *others = inputs
    if not torch.is_grad_enabled() or x.requires_grad:
        return None
    return (x.detach().requires_grad_(), *others)


def _over_ranks(loss_sum: Tensor, routing: Routing | None) -> tuple[Tensor, Routing | None]:
    """The reported loss and the routing, summed over all ranks by one collective."""
    parts = [loss_sum, *(routing or ())]
    together = torch.cat([part.flatten() for part in parts])
    dist.all_reduce(together)
    pieces = together.split([part.numel() for part in parts])
    summed = [piece.view_as(part) for piece, part in zip(pieces, parts, strict=True)]
    return summed[0], None if routing is None else Routing(*summed[1:])


def use_deterministic_kernels() -> None:
    """Have torch choose, for the rest of this process, kernels that give the same bits each time."""
    # cuBLAS reads it when it is first used, and torch refuses to go on without it.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    # It would fill all fresh memory with NaN, to show who reads it unwritten.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def refuse_unsupported_precision(precision: str) -> None:
    """Refuse arithmetic that this device does not have.

    Raises:
        ConfigError: naming it and what to choose instead.
    """
    accelerator = deepspeed.get_accelerator()
    supported = {"fp16": accelerator.is_fp16_supported, "bf16": accelerator.is_bf16_supported, "fp32": lambda: True}
    if not supported[precision]():
        others = " or ".join(name for name, is_supported in supported.items() if is_supported())
        raise ConfigError(
            f"engine.precision={precision} is not supported by this machine's {accelerator.device_name()}; "
            f"choose engine.precision={others}"
        )


def refuse_unknown_keys(settings: dict[str, Any]) -> None:
    """Let DeepSpeed read its settings before anything is built, to refuse raw keys that it does not know.

    Raises:
        ConfigError: with DeepSpeed's words.
    """
    try:
        DeepSpeedConfig(copy.deepcopy(settings))
    except ValueError as error:
        raise ConfigError(f"DeepSpeed refuses a raw key of the deepspeed section: {error}") from error
