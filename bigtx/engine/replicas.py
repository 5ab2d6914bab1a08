"""Compare what several ranks hold a copy of: a flipped bit in one copy changes the training without any error.

At ZeRO stage 0 these are all weights and the optimizer's states; at stages 1 and 2 the weights that the model computes
with, which the update of each step overwrites from the masters, and frozen weights. Stage 3 has no copies.

A checksum is a sum of the weights' bits as integers, each multiplied by an odd random number of its place, modulo 2^64.
It changes with every single element, and with the order of the elements. It is computed on the device.
"""

from __future__ import annotations

import functools
from collections import Counter
from typing import TYPE_CHECKING

import numpy as np
import torch
import xxhash
from torch import Tensor

from bigtx.engine.fragments import refresh_model_weights
from bigtx.utils.hardware import host_name

if TYPE_CHECKING:
    from bigtx.engine.engine import Engine
    from bigtx.engine.ranks import Ranks

ROW = 1 << 16
"""Elements that are summed together; each row of them has a factor too."""
CHUNK = 1 << 22
"""Elements that are converted to 64 bits at a time."""
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
SHOWN = 3


def describe_difference(engine: Engine, ranks: Ranks) -> str:
    """Compare the copies of all ranks. Every rank must call it.

    If they differ at stages 1 or 2, the weights are set from the masters again to find out which copies were wrong.

    Returns:
        A clause that names the ranks with other weights and the weights; "" if all copies are equal.
    """
    own = checksums(replicated(engine))
    if len(set(ranks.gather(xxhash.xxh3_64_intdigest(repr(own).encode())))) == 1:
        return ""
    found = ranks.gather((host_name(), own))
    right = _of_majority([copies for _, copies in found])
    if not engine.replicated:
        refresh_model_weights(engine.deepspeed)
        right |= checksums({name: copy for name, copy in replicated(engine).items() if name not in engine.frozen})
    return describe([host for host, _ in found], [copies for _, copies in found], right)


def describe(hosts: list[str], copies: list[dict[str, int]], right: dict[str, int]) -> str:
    """Return a clause about copies that differ.

    Args:
        hosts: the host of each rank.
        copies: the checksums of each rank, by name.
        right: the right checksums that are known.
    """
    names = [name for name in copies[0] if len({own[name] for own in copies}) > 1]
    wrong = [rank for rank, own in enumerate(copies) if any(own[name] != right.get(name) for name in names)]
    shown = ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} others" if len(names) > SHOWN else "")
    who = ", ".join(f"rank {rank} ({hosts[rank]})" for rank in wrong)
    if len(wrong) == len(copies):
        return f"the ranks have different copies of {shown}, and it is not known which one is right: {who}"
    return f"{who}: the copy of {shown} differs from the right one"


def replicated(engine: Engine) -> dict[str, Tensor]:
    """Return what every rank should hold with the same bits, by name."""
    if engine.stage == 3:
        return {}
    copies = {name: parameter.detach() for name, parameter in engine.module.named_parameters()}
    if engine.replicated:
        for fragment in engine.fragments:
            for kind in engine.optimizer.state_kinds(fragment.group):
                copies[f"{fragment.name} ({kind})"] = engine.optimizer.state[fragment.flat][kind]
    return copies


def checksums(tensors: dict[str, Tensor]) -> dict[str, int]:
    """Return the checksum of each tensor. The device is waited for once."""
    sums = [checksum(tensor) for tensor in tensors.values()]
    return dict(zip(tensors, torch.stack(sums).tolist(), strict=True)) if sums else {}


def checksum(tensor: Tensor) -> Tensor:
    """Return the checksum of a tensor's bits: int64 scalar on its device."""
    bits = tensor.detach().contiguous().view(-1).view(_INTEGERS[tensor.element_size()])
    factors = _factors(tensor.device)
    rows = []
    for chunk in bits.split(CHUNK):
        whole = chunk.numel() // ROW * ROW
        rows.append((chunk[:whole].view(-1, ROW).to(torch.int64) * factors).sum(1))
        rest = chunk[whole:].to(torch.int64)
        rows.append((rest * factors[: rest.numel()]).sum(0, keepdim=True))
    sums = torch.cat(rows)
    # The factor of a row is another number than those of its elements.
    total = sums.new_zeros(())
    for part in sums.split(ROW):
        total = total * 0x5851F42D4C957F2D + (part * factors.flip(0)[: part.numel()]).sum()
    return total


@functools.cache
def _factors(device: torch.device) -> Tensor:
    """Return an odd random number for each place of a row: int64 [ROW], the same in every process."""
    drawn = np.random.Generator(np.random.Philox(key=1)).integers(-(2**62), 2**62, ROW, dtype=np.int64)
    return torch.from_numpy(2 * drawn + 1).to(device)


def _of_majority(copies: list[dict[str, int]]) -> dict[str, int]:
    """Return the checksums that more than half of the ranks have."""
    common = {name: Counter(own[name] for own in copies).most_common(1)[0] for name in copies[0]}
    return {name: value for name, (value, count) in common.items() if 2 * count > len(copies)}
