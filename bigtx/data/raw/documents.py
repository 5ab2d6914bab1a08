"""The results of reading: documents, and rejects in place of those that cannot be read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

from bigtx.utils.errors import DataError
from bigtx.utils.terminal import visible
from bigtx.utils.units import counted

MAX_DOCUMENT_BYTES = 256 << 20
"""A longer document is rejected: it would have to fit into memory."""

BATCH_CHARACTERS = 1 << 17
"""Characters of text that are processed at once."""
EMPTY = "empty"
"""The reason that is counted separately: a file may be empty."""

_NUM_EXAMPLES = 5

Item = TypeVar("Item")


class Document(NamedTuple):
    """A text and its origin.

    Attributes:
        file: path of its file, without credentials; a member of an archive is `<archive>/<member>`.
        line: the line, from 1, at which it starts in the file or member; in parquet the row.
        id: the text's id, by `input.id_field`; for plain files the path within the folder that was named.
        source: the origin of the text, by `input.source_field`.
        language: the language, by `input.language_field`.
        number: increases from document to document of one input file, and does not depend on how the file is cut.
    """

    text: str
    file: str
    line: int
    id: str | None = None
    source: str | None = None
    language: str | None = None
    number: int = 0


@dataclass(frozen=True, slots=True)
class Reject:
    """A document or file that could not be read.

    Attributes:
        line: the line, from 1; 0: the file as a whole.
        lost: documents that are missing because of it; for a broken row of a table, the lines that it includes. None:
            the rest of the file, whose documents cannot be counted.
    """

    file: str
    line: int
    reason: str
    lost: int | None = 1


@dataclass
class Rejects:
    """The count of rejects; `sink` receives each as it is found, and only the first few are kept here.

    If a file is truncated or damaged, the documents before that place are kept.

    Attributes:
        count: documents that could not be read, if they can be counted.
        num_cut: places after which an unknown number of documents is missing.
        passed_over: numbers of archive members that are not read, by suffix.
    """

    max_share: float
    sink: Callable[[Reject], None] | None = None
    count: int = 0
    num_cut: int = 0
    num_empty: int = 0
    examples: list[Reject] = field(default_factory=list)
    passed_over: Counter[str] = field(default_factory=Counter)

    def __bool__(self) -> bool:
        """Return whether there are rejects."""
        return bool(self.count or self.num_cut)

    def add(self, reject: Reject) -> None:
        """Count one more."""
        if reject.reason == EMPTY:
            self.num_empty += 1
        else:
            self.count += reject.lost or 0
            self.num_cut += reject.lost is None
            if len(self.examples) < _NUM_EXAMPLES:
                self.examples.append(reject)
        if self.sink:
            self.sink(reject)

    def first(self) -> str:
        """Return the first few as text for the terminal, each on a line of its own that starts with a line break."""
        return "".join(
            f"\n  {visible(r.file)}{f', line {r.line}' if r.line else ''}: {visible(r.reason)}{_swallowed(r)}"
            for r in self.examples
        )

    def describe(self) -> str:
        """Return the counts in words."""
        parts = [f"{self.count:,} that cannot be read"] if self.count or not self.num_cut else []
        if self.num_cut:
            parts.append(f"an unknown number in {self._unfinished()}")
        return ", and ".join(parts)

    def _unfinished(self) -> str:
        return f"{counted(self.num_cut, 'file')} that cannot be read to the end"

    def lost(self, num_documents: int, num_files: int) -> int:
        """Estimate how many documents are missing: after each cut, as many as a file has on average.

        Args:
            num_documents: the number of documents that could be read.
            num_files: the number of files of the input.
        """
        return self.count + self.num_cut * max(1, -(-num_documents // max(1, num_files)))

    def check(self, num_documents: int, num_files: int) -> None:
        """Check the whole input; the arguments are those of `lost`.

        Raises:
            DataError: more than `max_share` was rejected, or there is no document.
        """
        lost = self.lost(num_documents, num_files)
        share = lost / max(1, num_documents + lost)
        if lost and share > self.max_share:
            estimated = (
                f" ({lost - self.count:,} of them is an estimate for {self._unfinished()}: as many as a file has on "
                "average)"
                if self.num_cut
                else ""
            )
            raise DataError(
                f"{lost:,} of {num_documents + lost:,} documents ({share:.2%}) could not be read{estimated}, and "
                f"input.max_rejects allows {self.max_share:.2%}. Repair them, leave them out with input.exclude, or "
                f"allow more with input.max_rejects={_round_up(share):g}. The first:{self.first()}"
            )
        if num_documents == 0:
            empty = f" ({self.num_empty:,} are empty)" if self.num_empty else ""
            raise DataError(f"The input has no documents{empty}; check input.paths.{self.first()}")


def in_batches(
    items: Iterable[Item], length: Callable[[Item], int], characters: int | None = None
) -> Iterator[list[Item]]:
    """Yield the items in lists that end where their texts have at least so many characters together, by default
    `BATCH_CHARACTERS`.

    An item may have hundreds of megabytes, so none is kept here while the next one is read.

    Args:
        length: the function that returns the characters of an item's text.
    """
    batch: list[Item] = []
    size = 0
    for item in items:
        batch.append(item)
        size += length(item)
        del item
        if size >= (characters or BATCH_CHARACTERS):
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _swallowed(reject: Reject) -> str:
    return f" (with it {reject.lost:,} lines are lost)" if reject.lost and reject.lost > 1 else ""


def _round_up(share: float) -> float:
    return min(1.0, round(share * 1.05 + 5e-4, 3))
