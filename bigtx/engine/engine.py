"""Train a model with DeepSpeed: the only module that makes optimizer steps."""

from __future__ import annotations

import copy
import functools
import gc
import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.config import DeepSpeedConfig
from torch import Tensor, nn

from bigtx.config.deepspeed import deepspeed_config
from bigtx.config.schema import PretrainConfig, RunConfig
from bigtx.engine.fragments import (
    Fragment,
    fill_unheld,
    held_fragments,
    owned_fragments,
    refresh_model_weights,
)
from bigtx.engine.optimizers import HostNumber, Optimizer, Reduction, read_number, reduces
from bigtx.engine.trainable import align_parts, freeze, in_buckets, parameter_groups
from bigtx.model.experts import Routing, routing_loss, shares_of
from bigtx.model.loss import Task
from bigtx.model.size import largest_block
from bigtx.utils.errors import ConfigError
from bigtx.utils.hardware import gpu_mark, gpu_memory_bytes, use_deterministic_kernels
from bigtx.utils.hashing import derive_seed
from bigtx.utils.heartbeat import Phase, beat

ReadRange = Callable[[str, str, int, int], Tensor]
"""(parameter name, kind, start, stop) -> fp32 [stop - start]: elements of a flattened parameter or of its state."""

Refusal = Callable[[float, float], bool]
"""(mean loss over all ranks, gradient norm) -> whether to leave out the update of a step."""

LOSS_SCALE_NUMBERS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
"""The state of DeepSpeed's dynamic loss scaler; its other attributes are settings."""


@dataclass(frozen=True)
class StepResult:
    """The result of one optimizer step.

    Attributes:
        loss_sum: fp32 scalar on the device: the reported loss summed over the labels of all ranks.
        grad_norm: the global norm before clipping; infinite or NaN if the step was skipped.
        skipped: whether no rank changed its weights, because one met a non-finite value or the update was refused.
        routing: the routing of the tokens of all ranks, on the device; None without experts.
        refused: whether the update was refused, although everything was finite.
    """

    loss_sum: Tensor
    grad_norm: float
    skipped: bool
    routing: Routing | None = None
    refused: bool = False


class Engine:
    """A Transformer, its optimizer and its ranks.

    Attributes:
        module: the model; its weights may be partitioned (ZeRO-3).
        device: the device of the batches.
        optimizer: the base optimizer under DeepSpeed's wrapper.
        frozen: the parameters that are not trained; they are in no fragment.
        fragments: the fragments that this rank holds.
        owned: the fragments that this rank writes to a checkpoint.
        reduction: the reduction of gradients where it is not DeepSpeed's: at stage 1 in bf16.
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
        self._forwards: deque[tuple[Any, Any]] = deque(maxlen=64)
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.deepspeed_config = deepspeed_config(
            config, world_size=self.world_size, largest_block=largest_block(config.model)
        )
        refuse_unknown_keys(self.deepspeed_config)
        self.stage = config.engine.zero_stage
        self.replicated = self.stage == 0
        self.device = torch.device(deepspeed.get_accelerator().current_device_name())
        arithmetic = torch.float32 if config.engine.precision == "fp32" else torch.bfloat16

        # ZeRO-3 cuts each parameter up as soon as it exists, so no rank ever holds the whole model.
        with deepspeed.zero.Init(config_dict_or_path=self.deepspeed_config) if self.stage == 3 else self.device:
            model = make_model()
        self.frozen = freeze(model, config)
        if self.stage == 3:
            _gather_whole_blocks(model)
        _prepare(model, config, self.device, self.world_size)
        groups = parameter_groups(config.optimizer, model.named_parameters())
        if reduces(config.engine):
            groups = in_buckets(groups, config.engine.bucket_size)
            align_parts()
        self.optimizer = Optimizer(groups, config.optimizer, arithmetic, self.device)
        # DeepSpeed collects garbage many times while it starts, and would scan a million objects of imported modules.
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
        self.reduction = Reduction(self.deepspeed, self.optimizer, config) if reduces(config.engine) else None
        together = self.reduction is not None and self.world_size > 1
        self.optimizer.bind(self.fragments, self._flats(), replicated=self.replicated, together=together)

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
        self.optimizer.wait_for_copy()
        with torch.no_grad():
            for _, flat in self._flats():
                flat.zero_()  # Padding is never read, but must not hold a NaN.
            for fragment in self.fragments:
                beat()
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
        refuses: Refusal | None = None,
        may_refuse: bool = True,
    ) -> StepResult:
        """Do forward, backward and update for one global batch.

        Args:
            micro_batches: this rank's micro batches, one for each step of the accumulation.
            task: turns a micro batch into a loss.
            num_labels: the number of labels of the global batch, over all ranks: the loss is a mean over them.
            num_tokens: the number of tokens of the global batch, over all ranks: the losses of experts are a mean over
                them.
            learning_rate_factor: factor on every group's peak rate.
            refuses: called once in a step without non-finite values, with the same numbers on all ranks, which must
                give the same answer.
            may_refuse: whether the answer may be yes, so that the update has to wait for it.

        Returns:
            The result. The gradient is that of the loss sums over all ranks divided by `num_labels`.
        """
        self.deepspeed.train()
        self.optimizer.set_learning_rate_factor(learning_rate_factor)
        # DeepSpeed averages gradients over ranks; the factor turns that mean into a sum. Our reduction adds them.
        factor = 1 if self.reduction else self.world_size
        routing: Routing | None = None
        totals = torch.zeros((), device=self.device)
        shares = None if self.expert_counts is None else shares_of(self.expert_counts)
        if self.config.engine.precision == "fp16":
            # Fixed for the step: DeepSpeed 0.19 would double the scale before it divides the gradient by it.
            self.deepspeed.optimizer.override_loss_scale(self.deepspeed.optimizer.loss_scaler.cur_scale)
        for index, batch in enumerate(micro_batches):
            if index > 0:
                self.deepspeed.step()  # Counts the micro batch before; only the last one makes an update.
            beat(Phase.FORWARD)
            begun = gpu_mark() if self.device.type == "cuda" else None
            loss = task.loss(self.deepspeed, batch)
            if begun:
                self._forwards.append((begun, gpu_mark()))
            totals, scaled = totals + loss.reported_sum.detach(), loss.loss_sum * (factor / max(1, num_labels))
            if loss.routing is not None:
                own, experts = loss.routing.detach(), self.config.model.experts
                routing = own if routing is None else routing + own
                added = routing_loss(loss.routing, shares, experts)
                scaled = scaled + added * (factor / max(1, num_tokens))
            beat(Phase.BACKWARD)
            self.deepspeed.backward(scaled, scale_wrt_gas=False)
            beat(Phase.UPDATE)
        loss_sum, routing = _over_ranks(totals, routing)
        norm, is_finite, is_refused = self._update(refuses, may_refuse, loss_sum, num_labels)
        skipped = is_refused or not is_finite
        if routing is not None and not skipped:
            self.expert_counts = routing.counts
        return StepResult(loss_sum, norm, skipped, routing, is_refused)

    def _update(
        self, refuses: Refusal | None, may_refuse: bool, loss_sum: Tensor, num_labels: int
    ) -> tuple[float, bool, bool]:
        """Update the weights, unless that is refused or something is not finite. Return the norm of the gradient before
        clipping, whether everything was finite, and whether the update was refused.
        """
        norm, loss = self._clip_at_stage_0() if self.replicated else math.nan, HostNumber(loss_sum)

        @functools.cache  # The optimizer may ask several times.
        def is_refused() -> bool:
            # At the other stages the norm is known when the optimizer asks.
            found = norm if self.replicated else read_number(self.deepspeed.optimizer._global_grad_norm)
            if refuses is None or not math.isfinite(found):
                return False
            return refuses(float(loss) / max(1, num_labels), found)

        self.optimizer.refuses = is_refused if refuses is not None and may_refuse else None
        self.deepspeed.step()
        if not self.replicated:
            norm = read_number(self.deepspeed.get_global_grad_norm())
        by_norm = self.replicated or self.reduction is not None
        is_finite = math.isfinite(norm) if by_norm else not self.deepspeed.optimizer.overflow
        return norm, is_finite, is_finite and is_refused()

    def forward_seconds(self) -> float | None:
        """Return the GPU's time per step for forward passes, by the last of them; None on a CPU."""
        if not self._forwards:
            return None
        torch.cuda.synchronize()
        seconds = sum(begun.elapsed_time(ended) for begun, ended in self._forwards) / 1000 / len(self._forwards)
        return seconds * self.deepspeed.gradient_accumulation_steps()

    def _clip_at_stage_0(self) -> float:
        """Clip the reduced gradients, or drop them if their norm is not finite. Returns the norm before clipping."""
        parameters = [parameter for parameter in self.module.parameters() if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters])  # type: ignore[misc]
        limit, found = self.config.train.gradient_clipping, read_number(norm)
        if not math.isfinite(found):
            for parameter in parameters:
                parameter.grad = None
        elif limit > 0:
            torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)
        return found

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Any], task: Task) -> tuple[float, int]:
        """Return the reported loss summed over all ranks' labels, and the number of labels.

        Every rank must give the same number of batches. They are on the CPU, where their labels are counted, so nothing
        waits for the device before the end.
        """
        self.deepspeed.eval()
        loss_sum, num_labels = torch.zeros((), dtype=torch.float64, device=self.device), 0
        for batch in batches:
            beat()
            num_labels += batch.num_labels
            loss_sum += task.loss(self.deepspeed, batch.to(self.device)).reported_sum
        totals = torch.stack([loss_sum, torch.full_like(loss_sum, num_labels)])
        dist.all_reduce(totals)
        return read_number(totals[0]), int(read_number(totals[1]))

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


def _prepare(model: nn.Module, config: RunConfig, device: torch.device, world_size: int) -> None:
    """Set what the backward pass recomputes, the seed of dropout, and whether blocks are compiled."""
    recompute: str = config.engine.activation_checkpointing
    if recompute == "auto" and isinstance(config, PretrainConfig):
        from bigtx.model.plan import cheapest_recompute

        recompute = cheapest_recompute(config, world_size, gpu_memory_bytes())
    model.activation_checkpointing = recompute  # type: ignore[assignment]
    model.dropout_seed = derive_seed("dropout", config.seed)  # type: ignore[assignment]
    if compiles(config, device):
        from bigtx.model.compiled import compile_model

        # Rows of a corpus have one length, and rows of records have many.
        compile_model(model, device, dynamic=False if isinstance(config, PretrainConfig) else None)


def _gather_whole_blocks(model: nn.Module) -> None:
    """Have ZeRO-3 gather each block as a whole before its forward.

    Then the forward that torch.compile traces, or that is recomputed, contains no communication.
    """
    deepspeed.utils.set_z3_leaf_modules(model, [type(model.blocks[0])])  # type: ignore[index]
    for block in model.blocks:  # type: ignore[union-attr]
        if any(parameter.requires_grad for parameter in block.parameters()):
            block.register_forward_pre_hook(_ask_for_gradient)


def compiles(config: RunConfig, device: torch.device) -> bool:
    """Return whether engine.compile says so; auto is true for pretraining on a GPU."""
    pays = device.type == "cuda" and isinstance(config, PretrainConfig)
    return config.engine.compile == "true" or (config.engine.compile == "auto" and pays)


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
