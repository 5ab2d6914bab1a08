"""Find the place of each parameter's fp32 master weights.

DeepSpeed keeps the fp32 masters and optimizer states of a rank in a few flat tensors. Each of its optimizer wrappers
has another layout. A `Fragment` says that elements [start, start + numel) of a flattened parameter are elements
[offset, offset + numel) of a flat tensor. Optimizer states have the flat tensor's shape, so the same numbers apply to
them. All code that needs the layout uses only fragments: checkpoints, the initial weights, Muon's exchange of matrix
parts, and the parity tests.

There is one small adaptor for each wrapper. It reads DeepSpeed's internals, and asserts what it relies on.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bigtx.engine.manifest import Range

if TYPE_CHECKING:
    from bigtx.engine.optimizers import Optimizer

StateKinds = Callable[[int], Collection[str]]
"""`Optimizer.state_kinds`: the kinds of the states of a parameter group."""


@dataclass(frozen=True)
class Fragment:
    """A contiguous part of one parameter, held by this rank.

    Attributes:
        name: the parameter's name in the module.
        shape: the whole parameter's shape.
        start: the first element held, in the flattened parameter.
        numel: the number of elements held.
        group: index of the optimizer's parameter group.
        flat: fp32 tensor that the base optimizer updates; the key of its state.
        offset: where the fragment begins in `flat` (flattened).
    """

    name: str
    shape: tuple[int, ...]
    start: int
    numel: int
    group: int
    flat: Tensor
    offset: int

    @property
    def stop(self) -> int:
        """Return the end of the range: one past the last element held."""
        return self.start + self.numel

    def view(self, tensor: Tensor) -> Tensor:
        """Return the fragment's elements of `tensor`, which has the shape of `flat` (master weights or a state)."""
        return tensor.detach().view(-1).narrow(0, self.offset, self.numel)


def held_fragments(deepspeed_engine: Any) -> list[Fragment]:
    """Return all fragments of this rank, in the order of the module's parameters within each flat tensor."""
    wrapper = deepspeed_engine.optimizer
    adaptor = {
        "DeepSpeedZeroOptimizer": _stages_1_and_2,
        "BF16_Optimizer": _stage_1_bf16,
        "DeepSpeedZeroOptimizer_Stage3": _stage_3,
    }.get(type(wrapper).__name__, _stage_0)
    names = {id(parameter): name for name, parameter in deepspeed_engine.module.named_parameters()}
    fragments = list(adaptor(wrapper, names))
    assert {fragment.name for fragment in fragments} <= set(names.values())  # A rank may hold no part of some.
    return fragments


def owned_fragments(fragments: list[Fragment], *, replicated: bool, rank: int, world_size: int) -> list[Fragment]:
    """Return the fragments that this rank writes to a checkpoint: all, or a slice where every rank holds everything."""
    if not replicated:
        return fragments
    owned = []
    for fragment in fragments:
        share = -(-fragment.numel // world_size)
        start, stop = min(rank * share, fragment.numel), min((rank + 1) * share, fragment.numel)
        if start < stop:
            owned.append(replace(fragment, start=start, numel=stop - start, offset=fragment.offset + start))
    return owned


def ranges_of(fragments: Iterable[Fragment], state_kinds: StateKinds) -> list[Range]:
    """Return the ranges that fragments cover, with the kinds that are saved of each.

    Args:
        fragments: the fragments.
        state_kinds: `Optimizer.state_kinds`.
    """
    return [
        (fragment.name, fragment.shape, ("master", *state_kinds(fragment.group)), fragment.start, fragment.stop)
        for fragment in fragments
    ]


def num_bytes(fragments: Iterable[Fragment], state_kinds: StateKinds) -> int:
    """Return the bytes of fragments with all their states, in fp32.

    Args:
        fragments: the fragments.
        state_kinds: `Optimizer.state_kinds`.
    """
    return sum(4 * fragment.numel * (1 + len(state_kinds(fragment.group))) for fragment in fragments)


def pieces_of(fragments: Iterable[Fragment], optimizer: Optimizer) -> dict[str, Tensor]:
    """Return the masters and states of fragments, in the order of a rank's file: name and fp32 tensor [elements]."""
    pieces: dict[str, Tensor] = {}
    for fragment in fragments:
        states, kinds = optimizer.state[fragment.flat], optimizer.state_kinds(fragment.group)
        for kind, source in {"master": fragment.flat, **{kind: states[kind] for kind in kinds}}.items():
            assert source.dtype == torch.float32 and source.numel() == fragment.flat.numel()
            pieces[f"{fragment.name}|{fragment.start}|{kind}"] = fragment.view(source)
    return pieces


def fill_unheld(parameter: nn.Parameter, name: str, read: Callable[[str, str, int, int], Tensor]) -> None:
    """Set this rank's part of a frozen parameter, which has no master.

    `refresh_model_weights` must be called afterwards.

    Args:
        parameter: the frozen parameter.
        name: its name in the module.
        read: reads from the source, as in `Engine.fill`.
    """
    part = getattr(parameter, "ds_tensor", None)
    if part is None:
        parameter.detach().view(-1).copy_(read(name, "master", 0, parameter.numel()))
        return
    # ZeRO-3: equal parts, the last one padded.
    start = torch.distributed.get_rank(parameter.ds_process_group) * part.ds_numel  # type: ignore[attr-defined]
    stop = min(start + part.ds_numel, parameter.ds_numel)  # type: ignore[attr-defined]
    part.zero_()
    if start < stop:
        part.view(-1).narrow(0, 0, stop - start).copy_(read(name, "master", start, stop))


def refresh_model_weights(deepspeed_engine: Any) -> None:
    """Copy the fp32 masters into the weights that the model computes with. Every rank must call it."""
    wrapper = deepspeed_engine.optimizer
    if type(wrapper).__name__ in ("DeepSpeedZeroOptimizer", "BF16_Optimizer"):
        wrapper.update_lp_params()
    elif type(wrapper).__name__ == "DeepSpeedZeroOptimizer_Stage3":
        # Parameters below the persistence threshold stay gathered: release them, or the old values survive.
        wrapper._partition_all_parameters()
        for sub_group in range(len(wrapper.fp16_groups)):
            wrapper._reassign_or_swap_out_partitioned_parameters(sub_group)
        if wrapper.persistent_parameters:
            wrapper.persistent_parameters[0].all_gather(wrapper.persistent_parameters)


def _stage_0(wrapper: Any, names: dict[int, str]) -> Iterator[Fragment]:
    """Yield each parameter as a whole: without a wrapper every rank holds it, and it is its own master."""
    assert isinstance(wrapper, torch.optim.Optimizer), type(wrapper)
    for group, parameter_group in enumerate(wrapper.param_groups):
        for parameter in parameter_group["params"]:
            assert parameter.dtype == torch.float32
            yield Fragment(names[id(parameter)], tuple(parameter.shape), 0, parameter.numel(), group, parameter, 0)


def _stages_1_and_2(wrapper: Any, names: dict[int, str]) -> Iterator[Fragment]:
    for group, parameters in enumerate(wrapper.round_robin_bit16_groups):
        flat = wrapper.single_partition_of_fp32_groups[group]
        offsets = wrapper.round_robin_bit16_offsets[group]
        first = torch.distributed.get_rank(wrapper.real_dp_process_group[group]) * wrapper.partition_size[group]
        yield from _of_partition(parameters, offsets, first, flat, group, names)


def _stage_1_bf16(wrapper: Any, names: dict[int, str]) -> Iterator[Fragment]:
    for group, parameters in enumerate(wrapper.bf16_groups):
        flat = wrapper.fp32_groups_flat_partition[group]
        offsets, offset = [], 0
        for parameter in parameters:
            offsets.append(offset)
            offset += parameter.numel()
        first = torch.distributed.get_rank(wrapper.real_dp_process_group[group]) * flat.numel()
        yield from _of_partition(parameters, offsets, first, flat, group, names)


def _of_partition(
    parameters: list[nn.Parameter], offsets: list[int], first: int, flat: Tensor, group: int, names: dict[int, str]
) -> Iterator[Fragment]:
    """Yield the fragments of one rank's slice of the group's flattened parameters; the slice begins at `first`."""
    last = first + flat.numel()
    for parameter, begin in zip(parameters, offsets, strict=True):
        start, stop = max(begin, first), min(begin + parameter.numel(), last)
        if start < stop:
            yield Fragment(
                names[id(parameter)], tuple(parameter.shape), start - begin, stop - start, group, flat, start - first
            )


def _stage_3(wrapper: Any, names: dict[int, str]) -> Iterator[Fragment]:
    """Yield this rank's part of each parameter.

    A parameter is cut into equal parts, the last one padded. The parts of a sub-group follow each other in its flat
    tensor.
    """
    for sub_group, parameters in enumerate(wrapper.fp16_groups):
        flat = wrapper.fp32_partitioned_groups_flat[sub_group]
        group = wrapper.sub_group_to_group_id[sub_group]
        for parameter in parameters:
            position, offset, part = wrapper.grad_position[wrapper.get_param_id(parameter)]
            assert position == sub_group
            start = torch.distributed.get_rank(parameter.ds_process_group) * part
            stop = min(start + part, parameter.ds_numel)
            if start < stop:
                yield Fragment(
                    names[id(parameter)], tuple(parameter.ds_shape), start, stop - start, group, flat, offset
                )
