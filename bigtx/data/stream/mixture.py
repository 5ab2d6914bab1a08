"""The source of the i-th sequence of a run: weights in phases, kept exactly, computed by arithmetic.

The sources are the leaves of a binary tree. A phase gives every node v a share of the sequences, the sum of its leaves'
shares, so that Q_v(t), the ideal number of the first t sequences that reach v, is a broken line with a bend at each
phase's start. A node's arrivals are its clock: of the first N sequences that reach it, it has sent

    L_v(N) = round(G(N)),    G = Q_left o Q_v^-1

to its left child and the others to its right one. G is a broken line too, and its slope, left's share of v, is from 0
to 1; so neither count ever decreases, and a place follows from i alone by one walk down the tree, in whole numbers.

The bound. A rounding is off by at most 1/2. A node that is off its ideal by e evaluates G at most e too early or late,
so

    e_left <= 1/2 + max over q of G(q + e_v) - G(q),    and the same for the right child; the root is off by 0.

Errors do not accumulate from phase to phase. With one phase, G(q + e) - G(q) is e times the share, and a leaf is off by
at most 1/2 (1 + w/w1 + w/w2 + ...), where w is its weight and w1, w2, ... its ancestors' weights below the root. In a
Huffman tree a node's uncle weighs at least as much as the node, hence the weights on the way up grow at least like
Fibonacci's numbers, and the sum is below 1/2 (1 + 1 + 1/2 + 1/3 + 1/5 + ...) = 1.68: at no prefix is any source off by
two sequences, for any weights. With several phases, one tree is used for all of them: the Huffman trees of each
phase's weights, of their means, of their maxima and of equal weights are tried, some of them also with the sources that
are read in the same phases kept together, and the one with the least bound is used. As G(q + e) - G(q) is never more
than e, a leaf of depth d is off by at most d/2: up to 16 sources stay within two in any phases. With more, phases for
which no tree is found that stays within two are refused.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from bigtx.utils.errors import DataError

MAX_SPAN = 1 << 17
"""Most sequences from the first to the last that one step of the arithmetic covers, to stay within 64 bits."""
MAX_ERROR = 2
"""The largest deviation of a source from its exact share, in sequences, at any prefix."""
SHARE_UNIT = 1 << 44
"""Weights are rounded to this part of their sum: off by a tenth of a sequence after 10^12 sequences."""


def runs(ascending: np.ndarray) -> Iterator[tuple[int, slice]]:
    """Yield the runs of equal values in an ascending array: (value, where)."""
    if len(ascending):
        bounds = np.flatnonzero(ascending[1:] != ascending[:-1]) + 1
        for begin, end in itertools.pairwise([0, *bounds.tolist(), len(ascending)]):
            yield int(ascending[begin]), slice(begin, end)


class Phase(NamedTuple):
    """A phase of a run: its first sequence, and each source's weight from that sequence on."""

    start: int
    weights: list[float]


class Mixture:
    """The distribution of the sequences of a run over weighted sources.

    A source may give one or two sequences after its weight has become 0 or before it is above 0: its deviation.

    Args:
        phases: by start, the first one at 0; each phase and each source has some weight above 0.

    Raises:
        DataError: no tree keeps this many sources within two sequences of their shares in these phases.
    """

    def __init__(self, phases: list[Phase]) -> None:
        starts = [phase.start for phase in phases]
        assert starts[0] == 0 and all(a < b for a, b in itertools.pairwise(starts))
        shares = [_integer_shares(phase.weights) for phase in phases]
        assert all(map(any, zip(*shares, strict=True))), "a mixture has no source that is never read"
        self._num_sources = len(shares[0])
        if len(phases) == 1:
            self._root = _split(_huffman(shares[0]), starts, shares)
            return
        sums, maxima = ([of(column) for column in zip(*shares, strict=True)] for of in (sum, max))
        # The trees and the order in which they are tried determine the order of every run with phases.
        patterns = [tuple(map(bool, column)) for column in zip(*shares, strict=True)]
        shapes = [_huffman(weights) for weights in (*shares, sums, maxima, [1] * self._num_sources)]
        shapes += [_huffman_in_groups(weights, patterns) for weights in (sums, maxima)]
        trees = [_split(shape, starts, shares) for shape in shapes]
        errors = [_largest_error(tree, Fraction(0)) for tree in trees]
        if min(errors) > MAX_ERROR:
            raise DataError(
                f"data.phases: {len(phases) - 1} phases of {self._num_sources} sources cannot be mixed exactly: a "
                f"source could be off its share by {float(min(errors)):.2f} sequences, but {MAX_ERROR} are allowed. "
                "Use fewer phases, or at most 16 sources, which always work."
            )
        self._root = trees[errors.index(min(errors))]

    def counts(self, num_sequences: int) -> list[int]:
        """Return how many of the first `num_sequences` sequences each source gives."""
        counts = [0] * self._num_sources

        def descend(node: _Split | int, arrived: int) -> None:
            if isinstance(node, int):
                counts[node] = arrived
                return
            left = int(node.sent_left(np.array([arrived]))[0])
            descend(node.left, left)
            descend(node.right, arrived - left)

        descend(self._root, num_sequences)
        return counts

    def assign(self, sequences: np.ndarray) -> list[tuple[int, np.ndarray, np.ndarray]]:
        """Return the sources of sequences.

        Args:
            sequences: int64, ascending, sequences of the run; the last minus the first is less than MAX_SPAN.

        Returns:
            (source, indices into `sequences`, their numbers within the source) for each source that gives any.
        """
        found = []

        def descend(node: _Split | int, slots: np.ndarray, arrivals: np.ndarray) -> None:
            if len(slots) == 0:
                return
            if isinstance(node, int):
                found.append((node, slots, arrivals))
                return
            before = node.sent_left(arrivals)
            goes_left = node.sent_left(arrivals + 1) > before
            descend(node.left, slots[goes_left], before[goes_left])
            descend(node.right, slots[~goes_left], (arrivals - before)[~goes_left])

        descend(self._root, np.arange(len(sequences)), sequences)
        return found


@dataclass(frozen=True)
class _Piece:
    """A linear piece of a node's G: of `total` arrivals, `left_share` go left.

    Attributes:
        begin: the node's ideal arrivals where the piece begins.
        offset: round(G(N)) is (offset + N * left_share) // total.
    """

    begin: Fraction
    left_share: int
    total: int
    offset: int


class _Split:
    """A node of the tree."""

    def __init__(self, left: _Split | int, right: _Split | int, pieces: list[_Piece]) -> None:
        self.left, self.right, self.pieces = left, right, pieces
        self._firsts = np.array([math.ceil(piece.begin) for piece in pieces], np.int64)

    def sent_left(self, arrivals: np.ndarray) -> np.ndarray:
        """Return how many of the first so many arrivals (int64, ascending) went left; int64."""
        sent = np.empty_like(arrivals)
        for number, part in runs(np.searchsorted(self._firsts, arrivals, side="right") - 1):
            piece, first, offsets = self.pieces[number], int(arrivals[part.start]), arrivals[part]
            whole, remainder = divmod(piece.offset + first * piece.left_share, piece.total)
            # A share times MAX_SPAN stays below 2^62, so 64 bits are exact from here.
            sent[part] = whole + (remainder + piece.left_share * (offsets - first)) // piece.total
        return sent


_Shape = int | tuple["_Shape", "_Shape"]
"""A tree of sources by index."""


def _integer_shares(weights: list[float]) -> list[int]:
    total = sum(map(Fraction, weights))
    return [max(1, round(Fraction(weight) / total * SHARE_UNIT)) if weight else 0 for weight in weights]


def _huffman(shares: list[int], shapes: list[_Shape] | None = None) -> _Shape:
    # The second entry makes ties fall the same way each time.
    entries = zip(shares, range(len(shares)), shapes or range(len(shares)), strict=True)
    heap: list[tuple[int, int, _Shape]] = list(entries)
    heapq.heapify(heap)
    for number in range(len(shares), 2 * len(shares) - 1):
        right_share, _, right = heapq.heappop(heap)
        left_share, _, left = heapq.heappop(heap)
        heapq.heappush(heap, (left_share + right_share, number, (left, right)))
    return heap[0][2]


def _huffman_in_groups(weights: list[int], patterns: list[tuple[bool, ...]]) -> _Shape:
    """Group the sources that are read in the same phases, so that rounding does not depend on the sources outside a
    phase.
    """
    groups: dict[tuple[bool, ...], list[int]] = {}
    for source, pattern in enumerate(patterns):
        groups.setdefault(pattern, []).append(source)
    shapes = [_huffman([weights[source] for source in group], list(group)) for group in groups.values()]
    return _huffman([sum(weights[source] for source in group) for group in groups.values()], shapes)


def _split(shape: _Shape, starts: list[int], shares: list[list[int]]) -> _Split | int:
    """Return the tree of a shape, with the pieces of its nodes."""
    if isinstance(shape, int):
        return shape
    left, right = (_shares_of(child, shares) for child in shape)
    pieces, ideal, ideal_left = [], Fraction(0), Fraction(0)
    lengths = [end - start for start, end in zip(starts, [*starts[1:], starts[-1]], strict=True)]
    for length, of_phase, left_share, right_share in zip(lengths, shares, left, right, strict=True):
        total = left_share + right_share
        if total:  # A phase in which nothing reaches a node has no length by its clock.
            offset = math.floor(Fraction(total, 2) + ideal_left * total - ideal * left_share)
            pieces.append(_Piece(ideal, left_share, total, offset))
        ideal += Fraction(length * total, sum(of_phase))
        ideal_left += Fraction(length * left_share, sum(of_phase))
    return _Split(_split(shape[0], starts, shares), _split(shape[1], starts, shares), pieces)


def _shares_of(shape: _Shape, shares: list[list[int]]) -> list[int]:
    """Return the share of a subtree in each phase."""
    if isinstance(shape, int):
        return [of_phase[shape] for of_phase in shares]
    return [sum(pair) for pair in zip(*(_shares_of(child, shares) for child in shape), strict=True)]


def _largest_error(node: _Split | int, error: Fraction) -> Fraction:
    """Return the bound of the module's docstring, for the leaves below a node that is off by at most `error`."""
    if isinstance(node, int):
        return error
    # Rounded up to a short fraction: the exact ones grow with every level.
    error = Fraction(math.ceil(error * 2**20), 2**20)
    begins = [piece.begin for piece in node.pieces]
    ends = [*begins[1:], begins[-1] + error]
    # The largest rise of a broken line over a stretch of one length begins or ends at a bend.
    places = {*begins, *(begin - error for begin in begins if begin >= error)}
    rises = [(Fraction(0), Fraction(0))]
    for place in places if error else ():
        left = Fraction(0)
        for begin, end, piece in zip(begins, ends, node.pieces, strict=True):
            overlap = max(Fraction(0), min(end, place + error) - max(begin, place))
            left += overlap * Fraction(piece.left_share, piece.total)
        rises.append((left, error - left))
    left, right = (Fraction(1, 2) + max(rise) for rise in zip(*rises, strict=True))
    return max(_largest_error(node.left, left), _largest_error(node.right, right))
