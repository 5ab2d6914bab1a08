"""Compute Muon's update of a matrix, also where matrices are spread over ranks.

Each matrix is assigned to one rank. Every rank sends its parts of the matrix's momentum to that rank, which
orthogonalises the whole matrix and sends the parts back. So a rank sends only its own share of the parameters twice a
step, the work is divided over the ranks, and the update does not depend on how ZeRO partitions the parameters.

The parts are exchanged in the dtype of the arithmetic, in one buffer for what a rank holds and one for what it works
on. Matrices are orthogonalised in batches of a limited size, so that no other copy grows with the model.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from bigtx.engine.fragments import Fragment

QUINTIC_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Coefficients of Keller Jordan's Newton-Schulz iteration: the polynomial is steep at zero, and singular values end
between about 0.7 and 1.2 (https://kellerjordan.github.io/posts/muon)."""

BATCH_ELEMENTS = 2**26
"""The most elements of the matrices that are orthogonalised together, unless one has more: in bf16 128 MiB, and the
iteration needs about five times that."""


def orthogonalize(matrices: Tensor, num_iterations: int) -> Tensor:
    """Approximately replace each matrix U S V^T by U V^T, with the quintic Newton-Schulz iteration.

    Args:
        matrices: [N, rows, columns], in the dtype of the arithmetic.
        num_iterations: the number of iterations; 5 is usual.

    Returns:
        [N, rows, columns], in the same dtype.
    """
    a, b, c = QUINTIC_COEFFICIENTS
    tall = matrices.size(-2) > matrices.size(-1)
    x = matrices.mT if tall else matrices
    norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
    x = x / (norm.to(x.dtype) + 1e-7)
    for _ in range(num_iterations):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


def update_scale(shape: tuple[int, ...]) -> float:
    """Return sqrt(max(1, rows / columns)), which makes an update's root mean square 1 / sqrt(columns)."""
    return max(1.0, shape[0] / shape[1]) ** 0.5


@dataclass(frozen=True)
class _Part:
    """Elements [start, start + numel) of matrix `matrix`, at `offset` of rank `rank`'s flat tensor number `flat`."""

    matrix: int
    rank: int
    start: int
    numel: int
    flat: int
    offset: int


_MatrixPart = tuple[tuple[str, int], tuple[int, int], int, int, int]
"""((parameter, number of the matrix in it), shape, start, numel, offset), the last three as in `_Part`."""


def _matrix_parts(fragment: Fragment) -> Iterator[_MatrixPart]:
    """Yield the parts of matrices in a fragment. A parameter [E, rows, columns] of experts is E matrices in a row."""
    assert len(fragment.shape) in (2, 3), f"Muon takes matrices only, not {fragment.name} of shape {fragment.shape}"
    rows, columns = fragment.shape[-2:]
    size = rows * columns
    for number in range(fragment.start // size, -(-fragment.stop // size)):
        start, stop = max(fragment.start, number * size), min(fragment.stop, (number + 1) * size)
        offset = fragment.offset + start - fragment.start
        yield (fragment.name, number), (rows, columns), start - number * size, stop - start, offset


class MatrixExchange:
    """The exchange of the matrices of some flat tensors that are spread over the ranks of a group.

    Every rank builds it from the same global list of parts, in the same order, so no sizes are sent.
    """

    def __init__(self, flats: Sequence[Tensor], fragments: list[Fragment], group: dist.ProcessGroup | None) -> None:
        """Exchange the list of parts with the other ranks.

        Args:
            flats: this rank's flat tensors of matrices.
            fragments: this rank's fragments in them.
            group: the ranks that hold the other parts; None where this rank holds everything.
        """
        self.group = group
        self.rank = dist.get_rank(group) if group else 0
        self.world_size = dist.get_world_size(group) if group else 1
        number_of = {flat: number for number, flat in enumerate(flats)}
        local = [(number_of[each.flat], part) for each in fragments for part in _matrix_parts(each)]
        gathered = [local]
        if self.world_size > 1:
            gathered = [[] for _ in range(self.world_size)]
            dist.all_gather_object(gathered, local, group=group)
        keys = sorted({part[0] for entries in gathered for _, part in entries})
        index = {key: number for number, key in enumerate(keys)}
        self.shapes: dict[int, tuple[int, int]] = {}
        parts: list[_Part] = []
        for rank, entries in enumerate(gathered):
            for flat, (key, shape, start, numel, offset) in entries:
                self.shapes[index[key]] = shape
                parts.append(_Part(index[key], rank, start, numel, flat, offset))
        parts.sort(key=lambda part: (part.matrix, part.start))
        holders: dict[int, list[int]] = defaultdict(list)
        for part in parts:
            holders[part.matrix].append(part.rank)
        worker = assign(self.shapes, holders, self.world_size)
        self.outgoing = sorted((each for each in parts if each.rank == self.rank), key=lambda each: worker[each.matrix])
        self.incoming = sorted((each for each in parts if worker[each.matrix] == self.rank), key=lambda each: each.rank)
        self.sent, self.received = [0] * self.world_size, [0] * self.world_size
        for part in self.outgoing:
            self.sent[worker[part.matrix]] += part.numel
        for part in self.incoming:
            self.received[part.rank] += part.numel

    def orthogonalize_(
        self, updates: Sequence[Tensor], num_iterations: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        """Replace each matrix by its orthogonalised update, in place.

        Args:
            updates: fp32, of one dimension: this rank's parts, at the places of the flat tensors.
            num_iterations: the number of Newton-Schulz iterations.
            dtype: the dtype of the exchange and of the arithmetic.
            device: the device of the exchange and of the arithmetic.
        """
        held = [updates[part.flat].narrow(0, part.offset, part.numel) for part in self.outgoing]
        if self.world_size == 1:
            self._orthogonalize_batches(held, num_iterations, dtype, device)
            return
        sent = torch.empty(sum(self.sent), dtype=dtype, device=device)
        received = torch.empty(sum(self.received), dtype=dtype, device=device)
        for piece, part in zip(_pieces(sent, self.outgoing), held, strict=True):
            piece.copy_(part)
        dist.all_to_all_single(received, sent, self.received, self.sent, group=self.group)
        self._orthogonalize_batches(_pieces(received, self.incoming), num_iterations, dtype, device)
        dist.all_to_all_single(sent, received, self.sent, self.received, group=self.group)
        for piece, part in zip(_pieces(sent, self.outgoing), held, strict=True):
            part.copy_(piece)

    def _orthogonalize_batches(
        self, pieces: Sequence[Tensor], num_iterations: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        """Orthogonalise this rank's matrices, those of one shape in batches. The pieces are its `incoming` parts."""
        parts_of: dict[int, list[tuple[slice, Tensor]]] = defaultdict(list)
        for part, piece in zip(self.incoming, pieces, strict=True):
            parts_of[part.matrix].append((slice(part.start, part.start + part.numel), piece))
        by_shape = defaultdict(list)
        for matrix in parts_of:
            by_shape[self.shapes[matrix]].append(matrix)
        for (rows, columns), members in by_shape.items():
            size = max(1, BATCH_ELEMENTS // (rows * columns))
            for batch in (members[start : start + size] for start in range(0, len(members), size)):
                matrices = torch.empty(len(batch), rows, columns, dtype=dtype, device=device)
                for matrix, target in zip(batch, matrices.flatten(1), strict=True):
                    for place, piece in parts_of[matrix]:
                        target[place].copy_(piece)
                matrices = orthogonalize(matrices, num_iterations).contiguous().mul_(update_scale((rows, columns)))
                for matrix, source in zip(batch, matrices.flatten(1), strict=True):
                    for place, piece in parts_of[matrix]:
                        piece.copy_(source[place])


def assign(
    shapes: Mapping[int, tuple[int, int]], holders: Mapping[int, Sequence[int]], num_ranks: int
) -> dict[int, int]:
    """Assign each matrix to a rank: the largest first, each to a rank with the least work, if possible to one that
    holds a part of it: that part is not sent.

    Args:
        shapes: the rows and columns of each matrix.
        holders: the ranks that hold its parts.
        num_ranks: the number of ranks.
    """
    load = [0] * num_ranks
    worker = {}
    cost = {matrix: rows * columns * min(rows, columns) for matrix, (rows, columns) in shapes.items()}
    for matrix in sorted(cost, key=lambda matrix: (-cost[matrix], matrix)):
        least = min(load)
        worker[matrix] = next((rank for rank in holders[matrix] if load[rank] == least), load.index(least))
        load[worker[matrix]] += cost[matrix]
    return worker


def _pieces(buffer: Tensor, parts: Sequence[_Part]) -> Sequence[Tensor]:
    """Return the parts in a buffer in which they follow each other."""
    return buffer.split([part.numel for part in parts]) if parts else ()
