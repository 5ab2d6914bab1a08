"""A seeded sample of the input for training, drawn in one pass with memory bounded by the sample itself.

Each piece of text gets a hash; those with the smallest hashes are kept, as many as fit. So the sample depends on
the text and the seed only, not on the order of the files or their compression.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import xxhash

from bigtx.tokenizer.cut import cut

HELD_OUT_BYTES = 1_000_000
"""The bytes of text that are held out for measurements."""

_PIECE_CHARACTERS = 16_384
# One document in so many is held out.
_HELD_OUT_EVERY = 64


@dataclass
class Sample:
    """The drawn sample.

    Attributes:
        num_documents, num_bytes: the counts of the whole input (UTF-8).
        training: pieces of documents as UTF-8, in the order of their hashes.
        held_out: documents that are not in `training`; empty if there were few.
    """

    num_documents: int = 0
    num_bytes: int = 0
    training: list[bytes] = field(default_factory=list)
    held_out: list[str] = field(default_factory=list)

    @property
    def training_bytes(self) -> int:
        """Return the number of bytes of `training`."""
        return sum(map(len, self.training))


def draw_sample(documents: Iterable[str], max_bytes: int, seed: int) -> Sample:
    """Draw about `max_bytes` of UTF-8 text for training, and up to 1 MB of other documents for measurements.

    Args:
        documents: any number of texts of any length; long ones are sampled in pieces of lines.
    """
    sample = Sample()
    training, held_out = _Smallest(max_bytes), _Smallest(HELD_OUT_BYTES)
    for document in documents:
        data = document.encode()
        sample.num_documents += 1
        sample.num_bytes += len(data)
        place = xxhash.xxh3_64_intdigest(data, seed)
        if place % _HELD_OUT_EVERY == 0:
            held_out.add(place, data[:HELD_OUT_BYTES])
        else:
            for piece in _pieces(document, data):
                training.add(xxhash.xxh3_64_intdigest(piece, seed), piece)
    sample.training = training.in_order()
    if not sample.training:
        # There are so few documents that all would be held out.
        sample.training, held_out = held_out.in_order(), _Smallest(0)
    # A document that was cut at its size may end inside a character.
    sample.held_out = [data.decode(errors="ignore") for data in held_out.in_order()]
    return sample


def _pieces(document: str, data: bytes) -> Iterator[bytes]:
    if len(data) <= _PIECE_CHARACTERS:
        yield data
    else:
        yield from (piece.encode() for piece in cut(document, _PIECE_CHARACTERS))


class _Smallest:
    """The pieces with the smallest hashes that together just reach `max_bytes`."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._heap: list[tuple[int, bytes]] = []

    def add(self, place: int, data: bytes) -> None:
        if self._num_bytes >= self._max_bytes and -self._heap[0][0] < place:
            return
        heapq.heappush(self._heap, (-place, data))
        self._num_bytes += len(data)
        while self._num_bytes - len(self._heap[0][1]) >= self._max_bytes:
            self._num_bytes -= len(heapq.heappop(self._heap)[1])

    def in_order(self) -> list[bytes]:
        return [data for _, data in sorted(self._heap, reverse=True)]
