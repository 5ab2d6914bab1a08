"""AdamW, and Muon with AdamW, as the base optimizer under every ZeRO stage; the reduction of gradients at stage 1; and
the schedule of the learning rate.

DeepSpeed gives the optimizer flat fp32 tensors with this rank's share of the master weights, and the reduced, unscaled
gradient in `.grad`. It is already clipped, except at stage 1 in bf16, where `Reduction` reduces it and `grad_scale`
clips it. `MatrixExchange` assembles Muon's matrices, so the update is the same at every stage and number of ranks.

The states are fp32. Their kinds are `exp_avg` and `exp_avg_sq` (AdamW), `momentum` (Muon), and `ema` where the config
asks for it.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.adamw import adamw

from bigtx.config.schema import EngineConfig, OptimizerConfig, RunConfig, ScheduleConfig
from bigtx.engine.fragments import Fragment
from bigtx.utils.errors import ConfigError
from bigtx.utils.hardware import gpu_mark
from bigtx.utils.heartbeat import wait_for_ranks
from bigtx.utils.units import parse_duration

if TYPE_CHECKING:
    from bigtx.engine.muon import MatrixExchange


class Optimizer(torch.optim.Optimizer):
    """AdamW and Muon over flat shares of the parameters.

    `bind` must be called once DeepSpeed has made its flat tensors, before the first step.
    """

    # torch excludes these methods from compiled programs. For that it imports its compiler at the first call, which
    # takes more than a second at the start of every run. bigtx does not compile an optimizer.
    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.Optimizer.zero_grad)

    def __init__(
        self, groups: list[dict[str, Any]], config: OptimizerConfig, arithmetic_dtype: torch.dtype, device: torch.device
    ) -> None:
        """Make the optimizer without states; see `bind`.

        Args:
            groups: from `parameter_groups`.
            config: the config of the optimizer.
            arithmetic_dtype: the dtype of Muon's Newton-Schulz iteration: bf16, or fp32 in an fp32 run.
            device: where Muon's matrices are assembled and orthogonalised, also when the states are offloaded.
        """
        super().__init__(groups, {"lr": config.learning_rate})
        self.config = config
        self.arithmetic_dtype = arithmetic_dtype
        self.device = device
        self.exchanges: dict[Tensor, MatrixExchange] = {}
        """By the first of the flat tensors whose matrices are exchanged together."""
        self.grad_scale: Tensor | None = None
        """What the gradients are divided by: fp32 scalar on the device. None if they are already clipped."""
        self.found_inf: Tensor | None = None
        """1 where a gradient is not finite, so that the update is left out, otherwise 0: fp32 scalar on the device."""
        self.copied: torch.cuda.Event | None = None
        """The end of a copy of weights and states that is in progress on a GPU."""
        self.refuses: Callable[[], bool] | None = None
        """Called before an update, on every rank with the same result: whether to leave it out."""

    def state_kinds(self, group: int) -> list[str]:
        """Return the names of the states that each element of a group has."""
        kinds = {"muon": ["momentum"], "adamw": ["exp_avg", "exp_avg_sq"]}[self.param_groups[group]["method"]]
        return kinds + (["ema"] if self.config.ema_decay is not None else [])

    def bind(
        self, fragments: list[Fragment], flats: list[tuple[int, Tensor]], *, replicated: bool, together: bool = False
    ) -> None:
        """Create the states, and plan Muon's exchange.

        Args:
            fragments: the fragments of this rank.
            flats: (group, flat tensor) in the same order on every rank.
            replicated: whether every rank holds everything (ZeRO 0), so that no exchange is needed.
            together: whether each `step` updates all flat tensors; then their matrices are exchanged together, so that
                no rank waits for another rank's work on every single tensor.
        """
        for group, flat in flats:
            state = self.state[flat]
            state |= {kind: torch.zeros_like(flat, requires_grad=False) for kind in self.state_kinds(group)}
            state["updates"] = torch.zeros((), dtype=torch.float32, device=flat.device)
        self._together = together
        by_muon = [flat for group, flat in flats if self.param_groups[group]["method"] == "muon"]
        for members in self._exchanged(by_muon):
            from bigtx.engine.muon import MatrixExchange

            own = set(members)
            held = [fragment for fragment in fragments if fragment.flat in own]
            self.exchanges[members[0]] = MatrixExchange(members, held, None if replicated else dist.group.WORLD)

    def _exchanged(self, flats: list[Tensor]) -> list[list[Tensor]]:
        """Return the flat tensors of Muon in lists that are exchanged together."""
        return [flats] if flats and self._together else [[flat] for flat in flats]

    def learning_rates(self) -> dict[str, float]:
        """Return the learning rate of each kind of parameter; with a layer_decay, that of the uppermost layer."""
        # Of groups with the same name, the first has the highest rate.
        return {group["name"]: group["lr"] for group in reversed(self.param_groups)}

    def set_learning_rate_factor(self, factor: float) -> None:
        """Scale every group's peak rate."""
        for group in self.param_groups:
            group["lr"] = factor * group["peak_learning_rate"]

    @property
    def num_updates(self) -> int:
        """Return the number of updates applied so far."""
        return int(next(iter(self.state.values()))["updates"])

    @num_updates.setter
    def num_updates(self, value: int) -> None:
        for state in self.state.values():
            state["updates"].fill_(value)

    def wait_for_copy(self) -> None:
        """Have the GPU change weights and states only after they were copied."""
        if self.copied is not None:
            torch.cuda.current_stream().wait_event(self.copied)
            self.copied = None

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every tensor that has a gradient, unless the update is refused or a gradient is not finite."""
        assert closure is None
        if self.refuses is not None and self.refuses():
            return
        # torch's fused AdamW leaves out its update on the device. For the rest the host has to know.
        must_know = self.found_inf is not None and (self.exchanges or self.config.ema_decay is not None)
        if must_know and read_number(self.found_inf):
            return
        self.wait_for_copy()
        group_of = {flat: group for group in self.param_groups for flat in group["params"] if flat.grad is not None}
        adamw: dict[tuple[float, float], list[Tensor]] = defaultdict(list)
        for flat, group in group_of.items():
            if group["method"] == "adamw":
                adamw[group["lr"], group["weight_decay"]].append(flat)
        for (rate, decay), flats in adamw.items():
            self._adamw(flats, rate, decay)
        for flats in self._exchanged([flat for flat, group in group_of.items() if group["method"] == "muon"]):
            self._muon(flats, [group_of[flat] for flat in flats])
        if self.config.ema_decay is not None:
            for flat in group_of:
                self.state[flat]["ema"].lerp_(flat, 1 - self.config.ema_decay)

    def _adamw(self, flats: list[Tensor], rate: float, decay: float) -> None:
        states = [self.state[flat] for flat in flats]
        adamw(
            flats,
            [flat.grad for flat in flats if flat.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["updates"] for state in states],
            fused=True,
            grad_scale=self.grad_scale,
            found_inf=self.found_inf,
            amsgrad=False,
            maximize=False,
            lr=rate,
            weight_decay=decay,
            beta1=self.config.beta1,
            beta2=self.config.beta2,
            eps=self.config.eps,
        )

    def _muon(self, flats: list[Tensor], groups: list[dict[str, Any]]) -> None:
        momentum, updates = self.config.muon_momentum, []
        for flat in flats:
            assert flat.grad is not None
            if self.grad_scale is not None:
                flat.grad.div_(self.grad_scale)
            state = self.state[flat]
            state["momentum"].lerp_(flat.grad, 1 - momentum)
            # The gradient is not used again, so the update takes its memory.
            updates.append(flat.grad.lerp_(state["momentum"], momentum).view(-1))
        self.exchanges[flats[0]].orthogonalize_(
            updates, self.config.muon_num_iterations, self.arithmetic_dtype, self.device
        )
        for flat, group, update in zip(flats, groups, updates, strict=True):
            flat.mul_(1 - group["lr"] * group["weight_decay"])
            flat.add_(update.view_as(flat), alpha=-group["lr"])
            self.state[flat]["updates"] += 1


def reduces(config: EngineConfig) -> bool:
    """Return whether `Reduction` reduces the gradients: under the settings for which DeepSpeed has a BF16_Optimizer."""
    return (config.zero_stage, config.precision, config.offload_optimizer) == (1, "bf16", "none")


class HostNumber:
    """A number on its way from the device. `float` waits for the number, and not for what was queued after it."""

    def __init__(self, number: Tensor) -> None:
        self._number = torch.empty(number.shape, dtype=number.dtype, pin_memory=number.is_cuda)
        self._number.copy_(number, non_blocking=True)
        self._copied = gpu_mark() if number.is_cuda else None

    def __float__(self) -> float:
        if self._copied is not None:
            self._copied.synchronize()
        return float(self._number)


def read_number(number: Any) -> float:
    """Return a number that may be on the device. Where it waits for a GPU, stacks show this."""
    return float(HostNumber(number) if torch.is_tensor(number) else number)


@dataclass
class _Bucket:
    """The gradients of a parameter group, which one collective reduces.

    Attributes:
        gradient: fp32 [ranks * part], the sum over this rank's micro batches; padded with zeros.
        part: fp32 [part], a view of it: what this rank updates.
        num_parameters: the number of parameters.
        missing: parameters whose gradient is not complete yet.
        reduced: [part], what the collective writes, in the dtype of the communication.
        work: the collective in progress.
    """

    gradient: Tensor
    part: Tensor
    num_parameters: int
    missing: int
    reduced: Tensor | None = None
    work: Any = None


class Reduction:
    """The reduction of gradients and the step of ZeRO-1 in bf16, in place of DeepSpeed's and in its buffers.

    DeepSpeed would all-reduce the whole fp32 gradient after the backward pass. Here each parameter group is a bucket
    (`in_buckets`), and each rank receives only its part of the sum. A bucket's collective begins when its gradients are
    complete in the last micro batch, and runs while the backward pass continues: NCCL has its own stream, gloo its own
    threads. All ranks begin them in the same order, even if their gradients become complete in different orders.

    The gradients of the ranks are added, not averaged. Clipping, and leaving out a step that is not finite, are done on
    the device by the optimizer.
    """

    def __init__(self, engine: Any, optimizer: Optimizer, config: RunConfig) -> None:
        """Replace the reduction and the step of DeepSpeed.

        Args:
            engine: a `DeepSpeedEngine` with a `BF16_Optimizer`; each of its parameter groups is a bucket.
            optimizer: the optimizer under it.
            config: the config of the run.
        """
        wrapper = engine.optimizer
        assert type(wrapper).__name__ == "BF16_Optimizer", type(wrapper)
        # So its hooks, which are called before those below, add each gradient to the fp32 buffer and release it.
        assert wrapper.immediate_grad_update and wrapper.grad_acc_dtype == torch.float32
        engine.allreduce_gradients, wrapper.step = self._finish, self._step
        self._engine, self._wrapper, self._optimizer = engine, wrapper, optimizer
        self._clipping = config.train.gradient_clipping
        self._group, self._dtype = wrapper.dp_process_group, engine.communication_data_type
        self._norm: Tensor | None = None
        place = {id(parameter): number for number, parameter in enumerate(engine.module.parameters())}
        buckets: list[tuple[int, _Bucket]] = []
        for number, parameters in enumerate(wrapper.bf16_groups):
            part = wrapper.fp32_groups_gradient_flat_partition[number]
            bucket = _Bucket(wrapper.fp32_groups_gradients_flat[number], part, len(parameters), len(parameters))
            buckets.append((min(place[id(parameter)] for parameter in parameters), bucket))
            wrapper.fp32_groups_flat_partition[number].grad = part
            for parameter in parameters if config.engine.overlap_communication else ():
                parameter.register_post_accumulate_grad_hook(functools.partial(self._complete, bucket))
        # The gradient of a model's first parameter is complete last.
        self._buckets = [bucket for _, bucket in sorted(buckets, key=lambda each: -each[0])]
        self._waiting = deque(self._buckets)

    def _complete(self, bucket: _Bucket, parameter: Tensor) -> None:
        """Note that a parameter's gradient is in its bucket, and reduce the buckets that are complete."""
        if not self._engine.is_gradient_accumulation_boundary():
            return
        bucket.missing -= 1
        assert parameter.grad is None and bucket.missing >= 0
        while self._waiting and not self._waiting[0].missing:
            self._reduce(self._waiting.popleft())

    def _reduce(self, bucket: _Bucket) -> None:
        if dist.get_world_size(self._group) == 1:
            return
        bucket.reduced, sent = bucket.part, bucket.gradient
        if self._dtype != sent.dtype:
            bucket.reduced, sent = torch.empty_like(bucket.part, dtype=self._dtype), sent.to(self._dtype)
        bucket.work = _reduce_scatter(bucket.reduced, sent, group=self._group, async_op=True)

    @torch.no_grad()
    def _finish(self) -> None:
        """Wait for the sums, and compute the norm of the gradient. DeepSpeed calls it after each backward pass, before
        any other collective.
        """
        if not self._engine.is_gradient_accumulation_boundary():
            return
        while self._waiting:  # Also buckets of which a parameter has no gradient.
            self._reduce(self._waiting.popleft())
        for bucket in self._buckets:
            if bucket.work is not None:
                wait_for_ranks(bucket.work)
            if bucket.reduced is not None and bucket.reduced is not bucket.part:
                bucket.part.copy_(bucket.reduced)
            bucket.work, bucket.reduced, bucket.missing = None, None, bucket.num_parameters
        self._waiting.extend(self._buckets)
        squares = torch.stack(torch._foreach_norm([bucket.part for bucket in self._buckets])).square().sum()
        dist.all_reduce(squares, group=self._group)
        self._norm = squares.sqrt()

    @torch.no_grad()
    def _step(self) -> None:
        """Update this rank's part of the weights, and gather those of the others. DeepSpeed calls it."""
        norm, self._norm = self._norm, None
        assert norm is not None
        self._wrapper.overflow, self._wrapper._global_grad_norm = False, HostNumber(norm)
        self._optimizer.found_inf = (~norm.isfinite()).float()
        if self._clipping > 0:
            self._optimizer.grad_scale = ((norm + 1e-6) / self._clipping).clamp(min=1.0)
        self._optimizer.step()
        self._wrapper.update_lp_params()


# `reduce_scatter_tensor` is deprecated since torch 2.13; 2.11 knows only this name.
_reduce_scatter: Callable[..., Any] = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def resolve_steps(text: str, *, total_steps: int, tokens_per_step: int, key: str) -> int:
    """Return a duration of the config in optimizer steps, rounded to the nearest.

    Args:
        text: the duration: "500 steps", "2B tokens" or "5 %".
        total_steps: the steps of the run.
        tokens_per_step: the tokens of a step, for a duration in tokens.
        key: the config key, for the error.

    Raises:
        ConfigError: the duration is a time, which has no fixed number of steps.
    """
    duration = parse_duration(text)
    if duration.unit == "steps":
        return round(duration.value)
    if duration.unit == "tokens":
        return round(duration.value / tokens_per_step)
    if duration.unit == "fraction":
        return round(duration.value * total_steps)
    raise ConfigError(f"{key}={text!r} is a time; write steps, tokens or a share of the run, e.g. {key}='5 %'")


class Schedule:
    """The learning rate as a factor on its peak, a pure function of the step: a linear warm-up, followed by the chosen
    shape.

    cosine: from 1 to `minimum_factor` along half a cosine. warmup_stable_decay: 1, then a linear decrease to
    `minimum_factor` over the last `decay` (arXiv:2404.06395). constant: 1.
    """

    def __init__(self, config: ScheduleConfig, *, total_steps: int, tokens_per_step: int) -> None:
        sizes = {"total_steps": total_steps, "tokens_per_step": tokens_per_step}
        self.name = config.name
        self.minimum = config.minimum_factor
        self.total_steps = total_steps
        self.warmup_steps = resolve_steps(config.warmup, key="schedule.warmup", **sizes)
        self.decay_steps = resolve_steps(config.decay, key="schedule.decay", **sizes)

    def factor(self, step: int) -> float:
        """Return the factor for the update that ends step `step` (the first is 1)."""
        if step <= self.warmup_steps:
            return step / self.warmup_steps
        if self.name == "constant":
            return 1.0
        if self.name == "warmup_stable_decay":
            remaining = max(0, self.total_steps - step)
            share = 1.0 if remaining >= self.decay_steps else remaining / self.decay_steps
            return self.minimum + (1 - self.minimum) * share
        progress = min(1.0, (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps))
        return self.minimum + (1 - self.minimum) * 0.5 * (1 + math.cos(math.pi * progress))
