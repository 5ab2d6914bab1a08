"""What reading gives: documents, and rejects in place of those that cannot be read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

from bigtx.utils.errors import DataError

MAX_DOCUMENT_BYTES = 256 << 20
"""A longer document is rejected: it would have to be held in memory whole."""

EMPTY = "empty"
"""The reason that is counted apart: not every file has to say something."""

_NUM_EXAMPLES = 5

Item = TypeVar("Item")


class Document(NamedTuple):
    """A text and where it comes from.

    Attributes:
        file: path of its file, without credentials; a member of an archive is `<archive>/<member>`.
        line: from 1, where it begins in the file or member; in parquet the row.
        id: the text's own, by `input.id_field`; of plain files the path within the folder that was named.
        source: where the text is from, by `input.source_field`.
        language: by `input.language_field`.
        number: increases from document to document of one input file, and is the same however the file is cut.
    """

    text: str
    file: str
    line: int
    id: str | None = None
    source: str | None = None
    language: str | None = None
    number: int = 0

    def with_text(self, text: str) -> Document:
        """The same document after its text was changed."""
        return self._replace(text=text)


@dataclass(frozen=True)
class Origin:
    """Where a stream of documents comes from.

    Attributes:
        file: what documents and rejects name it.
        name: its path within the folder that was named.
        first_line: number of the line at which the stream begins.
        num_bytes: to be read of it; None: all.
        number: added to the line to give a document's number.
    """

    file: str
    name: str
    first_line: int = 1
    num_bytes: int | None = None
    number: int = 0


@dataclass(frozen=True, slots=True)
class Reject:
    """Something that could not be read: the file, the line (from 1; 0 means the file as a whole) and why."""

    file: str
    line: int
    reason: str


@dataclass
class Rejects:
    """Counts what could not be read; `sink` gets each as it is found, and only the first few are kept here.

    A file that is cut short or damaged in the middle is one reject, at the place where reading ended: how many
    documents lay behind it nobody knows. The documents before that place are kept.

    Attributes:
        passed_over: numbers of archive members that were not read because of their suffix, by suffix.
    """

    max_share: float
    sink: Callable[[Reject], None] | None = None
    count: int = 0
    num_empty: int = 0
    examples: list[Reject] = field(default_factory=list)
    passed_over: Counter[str] = field(default_factory=Counter)

    def add(self, reject: Reject) -> None:
        """Count one more."""
        if reject.reason == EMPTY:
            self.num_empty += 1
        else:
            self.count += 1
            if len(self.examples) < _NUM_EXAMPLES:
                self.examples.append(reject)
        if self.sink:
            self.sink(reject)

    def first(self) -> str:
        """The first few as text for the terminal, each in a line of its own that begins with a line break."""
        return "".join(
            f"\n  {_visible(r.file)}{f', line {r.line}' if r.line else ''}: {_visible(r.reason)}" for r in self.examples
        )

    def check(self, num_documents: int) -> None:
        """Judge the whole input, `num_documents` being those that were read well.

        Raises:
            DataError: more than `max_share` was rejected, or there is no document at all.
        """
        share = self.count / max(1, num_documents + self.count)
        if self.count and share > self.max_share:
            raise DataError(
                f"{self.count:,} of {num_documents + self.count:,} documents ({share:.2%}) could not be read, and "
                f"input.max_rejects allows {self.max_share:.2%}. Mend them, leave them out with input.exclude, or "
                f"allow more with input.max_rejects={_round_up(share):g}. The first:{self.first()}"
            )
        if num_documents == 0:
            empty = f" ({self.num_empty:,} without a single character)" if self.num_empty else ""
            raise DataError(f"The input has no documents{empty}; check input.paths.{self.first()}")


def in_batches(items: Iterable[Item], length: Callable[[Item], int], characters: int) -> Iterator[list[Item]]:
    """The items in lists that end where their texts have at least so many characters together.

    Args:
        length: characters of an item's text.
    """
    batch: list[Item] = []
    size = 0
    for item in items:
        batch.append(item)
        size += length(item)
        if size >= characters:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _visible(text: str) -> str:
    # Names inside an archive are anybody's: they must not steer the terminal.
    return "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in text)


def _round_up(share: float) -> float:
    return min(1.0, round(share * 1.05 + 5e-4, 3))
