"""Compute Muon's update of a matrix, also where matrices are spread over ranks.

Each matrix is assigned to one rank. Every rank sends its parts of the matrix's momentum to that rank, which
orthogonalises the whole matrix and sends the parts back. So a rank sends only its own share of the parameters twice a
step, the work is divided over the ranks, and the update does not depend on how ZeRO partitions the parameters.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from bigtx.engine.fragments import Fragment

QUINTIC_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Coefficients of Keller Jordan's Newton-Schulz iteration: the polynomial is steep at zero, and singular values end
between about 0.7 and 1.2 (https://kellerjordan.github.io/posts/muon)."""


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
    x = x / (torch.linalg.matrix_norm(x.float(), keepdim=True).to(x.dtype) + 1e-7)
    for _ in range(num_iterations):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


def update_scale(shape: tuple[int, ...]) -> float:
    """Return sqrt(max(1, rows / columns)), which makes an update's root mean square 1 / sqrt(columns)."""
    return max(1.0, shape[0] / shape[1]) ** 0.5


@dataclass(frozen=True)
class _Part:
    """Elements [start, start + numel) of matrix `matrix`, at `offset` of rank `rank`'s flat tensor."""

    matrix: int
    rank: int
    start: int
    numel: int
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
    """The exchange of the matrices of one flat tensor that is spread over the ranks of a group.

    Every rank builds it from the same global list of parts, in the same order, so no sizes are sent.
    """

    def __init__(self, fragments: list[Fragment], group: dist.ProcessGroup | None) -> None:
        """Exchange the list of parts with the other ranks.

        Args:
            fragments: this rank's fragments of the matrices in one flat tensor.
            group: the ranks that hold the other parts; None where this rank holds everything.
        """
        self.group = group
        self.rank = dist.get_rank(group) if group else 0
        self.world_size = dist.get_world_size(group) if group else 1
        local = [part for fragment in fragments for part in _matrix_parts(fragment)]
        gathered = [local]
        if self.world_size > 1:
            gathered = [[] for _ in range(self.world_size)]
            dist.all_gather_object(gathered, local, group=group)
        keys = sorted({entry[0] for entries in gathered for entry in entries})
        index = {key: number for number, key in enumerate(keys)}
        self.shapes: dict[int, tuple[int, int]] = {}
        parts = []
        for rank, entries in enumerate(gathered):
            for key, shape, start, numel, offset in entries:
                self.shapes[index[key]] = shape
                parts.append(_Part(index[key], rank, start, numel, offset))
        self.parts = sorted(parts, key=lambda part: (part.matrix, part.start))
        self.worker = self._assign()

    def _assign(self) -> dict[int, int]:
        """Assign each matrix to a rank: the largest first, each to the rank with the least work."""
        load = [0] * self.world_size
        worker = {}
        cost = {matrix: rows * columns * min(rows, columns) for matrix, (rows, columns) in self.shapes.items()}
        for matrix in sorted(cost, key=lambda matrix: (-cost[matrix], matrix)):
            worker[matrix] = load.index(min(load))
            load[worker[matrix]] += cost[matrix]
        return worker

    def orthogonalize_(self, flat: Tensor, num_iterations: int, dtype: torch.dtype) -> None:
        """Replace each matrix in `flat` (fp32, this rank's parts) by its orthogonalised update, in place.

        Args:
            flat: this rank's flat tensor.
            num_iterations: the number of Newton-Schulz iterations.
            dtype: the dtype of the exchange and of the arithmetic.
        """
        work = [part for part in self.parts if self.worker[part.matrix] == self.rank]
        held = [part for part in self.parts if part.rank == self.rank]
        outgoing = sorted(held, key=lambda part: self.worker[part.matrix])
        incoming = sorted(work, key=lambda part: part.rank)

        received = self._exchange(
            [flat.narrow(0, part.offset, part.numel).to(dtype) for part in outgoing],
            [self.worker[part.matrix] for part in outgoing],
            [part.numel for part in incoming],
            [part.rank for part in incoming],
            flat,
            dtype,
        )
        matrices = {
            matrix: flat.new_empty(shape, dtype=dtype)
            for matrix, shape in self.shapes.items()
            if self.worker[matrix] == self.rank
        }
        for part, piece in zip(incoming, received, strict=True):
            matrices[part.matrix].view(-1).narrow(0, part.start, part.numel).copy_(piece)
        self._orthogonalize_batches(matrices, num_iterations)

        returned = self._exchange(
            [matrices[part.matrix].view(-1).narrow(0, part.start, part.numel) for part in incoming],
            [part.rank for part in incoming],
            [part.numel for part in outgoing],
            [self.worker[part.matrix] for part in outgoing],
            flat,
            dtype,
        )
        for part, piece in zip(outgoing, returned, strict=True):
            flat.narrow(0, part.offset, part.numel).copy_(piece)

    def _orthogonalize_batches(self, matrices: dict[int, Tensor], num_iterations: int) -> None:
        """Orthogonalise the matrices in place, those of one shape as a batch."""
        by_shape = defaultdict(list)
        for matrix, tensor in matrices.items():
            by_shape[tensor.shape].append(matrix)
        for shape, members in by_shape.items():
            batch = orthogonalize(torch.stack([matrices[matrix] for matrix in members]), num_iterations)
            batch *= update_scale(tuple(shape))
            for matrix, update in zip(members, batch, strict=True):
                matrices[matrix] = update.contiguous()

    def _exchange(
        self,
        pieces: list[Tensor],
        to_ranks: list[int],
        sizes: list[int],
        from_ranks: list[int],
        like: Tensor,
        dtype: torch.dtype,
    ) -> list[Tensor]:
        """Send `pieces` (ordered by rank), and return the pieces of `sizes` that the other ranks sent."""
        if self.world_size == 1:
            return pieces
        send_sizes, receive_sizes = [0] * self.world_size, [0] * self.world_size
        for piece, rank in zip(pieces, to_ranks, strict=True):
            send_sizes[rank] += piece.numel()
        for size, rank in zip(sizes, from_ranks, strict=True):
            receive_sizes[rank] += size
        sent = torch.cat(pieces) if pieces else like.new_empty(0, dtype=dtype)
        received = like.new_empty(sum(sizes), dtype=dtype)
        dist.all_to_all_single(received, sent, receive_sizes, send_sizes, group=self.group)
        return list(received.split(sizes)) if sizes else []
