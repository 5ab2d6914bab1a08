"""Train a model with DeepSpeed: the only module that makes optimizer steps."""

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

from bigtx.config.deepspeed import deepspeed_config
from bigtx.config.schema import FinetuneConfig, RunConfig
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
from bigtx.utils.hashing import derive_seed

ReadRange = Callable[[str, str, int, int], Tensor]
"""(parameter name, kind, start, stop) -> fp32 [stop - start]: elements of a flattened parameter or of its state."""

LOSS_SCALE_NUMBERS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
"""The state of DeepSpeed's dynamic loss scaler; its other attributes are settings."""


@dataclass(frozen=True)
class StepResult:
    """The result of one optimizer step.

    Attributes:
        loss_sum: fp32 scalar on the device: the reported loss summed over the labels of all ranks.
        grad_norm: the global norm before clipping; infinite or NaN if the step was skipped.
        skipped: whether a rank met a non-finite value, so that no rank changed its weights.
        routing: the routing of the tokens of all ranks, on the device; None without experts.
    """

    loss_sum: Tensor
    grad_norm: float
    skipped: bool
    routing: Routing | None = None


class Engine:
    """A Transformer, its optimizer and its ranks.

    Attributes:
        module: the model; its weights may be partitioned (ZeRO-3).
        device: the device of the batches.
        optimizer: the base optimizer under DeepSpeed's wrapper.
        frozen: the parameters that are not trained; they are in no fragment.
        fragments: the fragments that this rank holds.
        owned: the fragments that this rank writes to a checkpoint.
        expert_counts: fp32 [layers, E], the tokens of each expert in the last step that was not skipped, over all
            ranks. The balance loss of the next step uses their shares. None before the first step.
    """

    def __init__(self, config: RunConfig, make_model: Callable[[], nn.Module]) -> None:
        """Build the model, sharded from the start under ZeRO-3; its weights are not set (see `fill`).

        Args:
            config: the config of the run.
            make_model: makes the module with unset weights.

        Raises:
            ConfigError: settings contradict each other, or this device or DeepSpeed does not support one.
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
        # Objects that are kept until the end of the run are excluded from garbage collection: DeepSpeed collects many
        # times while it starts, and the loop should not pause to scan a million objects of imported modules.
        gc.collect()
        gc.freeze()
        self.deepspeed, *_ = deepspeed.initialize(model=model, optimizer=self.optimizer, config=self.deepspeed_config)
        self.module: nn.Module = self.deepspeed.module
        if config.engine.precision == "fp16":
            # A run whose gradients stay non-finite ends by train.max_skipped_steps, with an error that says so.
            self.deepspeed.optimizer.loss_scaler.raise_error_at_min_scale = False

        self.fragments: list[Fragment] = held_fragments(self.deepspeed)
        self.owned = owned_fragments(
            self.fragments, replicated=self.replicated, rank=self.rank, world_size=self.world_size
        )
        self.optimizer.bind(self.fragments, self._flats(), replicated=self.replicated)

    def _flats(self) -> list[tuple[int, Tensor]]:
        """Return (group, tensor) for each tensor that the base optimizer updates, in the same order on every rank."""
        wrapper = self.deepspeed.optimizer
        if self.stage == 3:
            return [
                (wrapper.sub_group_to_group_id[index], flat)
                for index, flat in enumerate(wrapper.fp32_partitioned_groups_flat)
            ]
        return [(index, flat) for index, group in enumerate(self.optimizer.param_groups) for flat in group["params"]]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of each parameter of the module; of a partitioned one, the whole shape."""
        return {
            name: tuple(getattr(parameter, "ds_shape", parameter.shape))
            for name, parameter in self.module.named_parameters()
        }

    def fill(self, read: ReadRange, *, states: bool) -> None:
        """Set the master weights, and the optimizer states if asked, then the model's weights from them.

        Args:
            read: reads from the source, which is initial values or a checkpoint. Every rank reads what it holds.
            states: whether to read the states too; otherwise they stay as at the start of a run.
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
        """Do forward, backward and update for one global batch.

        Args:
            micro_batches: this rank's micro batches, one for each step of the accumulation.
            task: turns a micro batch into a loss.
            num_labels: the number of labels of the global batch, over all ranks: the loss is a mean over them.
            num_tokens: the number of tokens of the global batch, over all ranks: the losses of experts are a mean over
                them.
            learning_rate_factor: factor on every group's peak rate.

        Returns:
            The result. The gradient is that of the loss sums over all ranks divided by `num_labels`.
        """
        self.deepspeed.train()
        self.optimizer.set_learning_rate_factor(learning_rate_factor)
        # DeepSpeed averages gradients over ranks; the factor turns that mean into a sum.
        scale = self.world_size / max(1, num_labels)
        routing: Routing | None = None
        totals, norm = torch.zeros((), device=self.device), 0.0
        shares = None if self.expert_counts is None else shares_of(self.expert_counts)
        if self.config.engine.precision == "fp16":
            # Fixed for the step: DeepSpeed 0.19 would double the scale before it divides the gradient by it.
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
        """Clip the reduced gradients, or drop them if their norm is not finite. Returns the norm before clipping."""
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
        """Return the reported loss summed over all ranks' labels, and the number of labels.

        Every rank must give the same number of batches. They are on the CPU, where their labels are counted, so nothing
        waits for the device before the end.
        """
        self.deepspeed.eval()
        loss_sum, num_labels = torch.zeros((), dtype=torch.float64, device=self.device), 0
        for batch in batches:
            num_labels += batch.num_labels
            loss_sum += task.loss(self.deepspeed, batch.to(self.device)).reported_sum
        totals = torch.stack([loss_sum, torch.full_like(loss_sum, num_labels)])
        dist.all_reduce(totals)
        return float(totals[0]), int(totals[1])

    def loss_scale(self) -> dict[str, float]:
        """Return the state of the dynamic loss scaler (fp16); an empty dictionary without one."""
        if self.config.engine.precision != "fp16":
            return {}
        scaler = self.deepspeed.optimizer.loss_scaler
        return {name: getattr(scaler, name) for name in LOSS_SCALE_NUMBERS if hasattr(scaler, name)}

    def set_loss_scale(self, numbers: dict[str, Any]) -> None:
        """Restore the state that `loss_scale` returned. Has no effect unless both runs are fp16."""
        if self.config.engine.precision == "fp16" and self.deepspeed.optimizer.loss_scaler.dynamic:
            vars(self.deepspeed.optimizer.loss_scaler).update(numbers)

    def set_expert_counts(self, counts: list[list[float]] | None) -> None:
        """Restore `expert_counts` from a manifest; JSON keeps the numbers exactly."""
        self.expert_counts = None if counts is None else torch.tensor(counts, device=self.device)


def _freeze(model: nn.Module, config: RunConfig) -> list[str]:
    """Turn off the gradients of the parameters that are not trained. Returns their names."""
    parameters = dict(model.named_parameters())
    frozen = frozen_parameters(config, parameters)
    for name in frozen:
        parameters[name].requires_grad_(False)
    return frozen


def _gather_whole_blocks(model: nn.Module) -> None:
    """Have ZeRO-3 gather each block as a whole before its forward.

    Then the forward that torch.compile traces, or that is recomputed, contains no communication.
    """
    deepspeed.utils.set_z3_leaf_modules(model, [type(model.blocks[0])])  # type: ignore[index]
    for block in model.blocks:  # type: ignore[union-attr]
        if any(parameter.requires_grad for parameter in block.parameters()):
            block.register_forward_pre_hook(_ask_for_gradient)


def _compile(model: nn.Module, config: RunConfig, device: torch.device) -> None:
    """Compile the blocks, and on a GPU the loss."""
    # Rows of a corpus have one length. Rows of records have many; at the second length torch compiles for any length.
    dynamic = None if isinstance(config, FinetuneConfig) else False
    for block in model.blocks:  # type: ignore[union-attr]
        # Only the forward: DeepSpeed's hooks would be traced too, and compiled again for each block.
        block.forward = torch.compile(block.forward, dynamic=dynamic)
    if device.type == "cuda" and hasattr(model.head, "compile_loss"):
        model.head.compile_loss()  # type: ignore[operator]


def _ask_for_gradient(block: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Request the gradient of a block's input even where everything below the block is frozen.

    DeepSpeed reduces a block's gradients and releases its weights when the gradient of its input is there. Without such
    a gradient it would do so too early.
    """
    x, *others = inputs
    if not torch.is_grad_enabled() or x.requires_grad:
        return None
    return (x.detach().requires_grad_(), *others)


def _over_ranks(loss_sum: Tensor, routing: Routing | None) -> tuple[Tensor, Routing | None]:
    """Return the reported loss and the routing, summed over all ranks by one collective."""
    parts = [loss_sum, *(routing or ())]
    together = torch.cat([part.flatten() for part in parts])
    dist.all_reduce(together)
    pieces = together.split([part.numel() for part in parts])
    summed = [piece.view_as(part) for piece, part in zip(pieces, parts, strict=True)]
    return summed[0], None if routing is None else Routing(*summed[1:])


def use_deterministic_kernels() -> None:
    """Have torch choose, for the rest of this process, kernels that give the same bits each time."""
    # cuBLAS reads it when it is first used, and torch requires it.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    # It would fill all new memory with NaN, which finds code that reads uninitialized memory.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def refuse_unsupported_precision(precision: str) -> None:
    """Refuse a precision that this device does not support.

    Raises:
        ConfigError: the device does not support it; the message says what to choose instead.
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
    """Have DeepSpeed parse its settings before anything is built, so that unknown raw keys are refused early.

    Raises:
        ConfigError: DeepSpeed refuses a key; the message contains its own.
    """
    try:
        DeepSpeedConfig(copy.deepcopy(settings))
    except ValueError as error:
        raise ConfigError(f"DeepSpeed refuses a raw key of the deepspeed section: {error}") from error
