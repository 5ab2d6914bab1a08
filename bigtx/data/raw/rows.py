"""Rows, the common form of JSON lines, tables, parquet and archives, and the readers of text and JSON.

    stream ──by format──▶ Row(fields, file, line, number) ──┬─▶ documents of `data prepare` (read.py)
                   └────▶ Rejects                           ├─▶ records of fine-tuning (data/records/read.py)
                                                            └─▶ texts of foreign shards (data/stream/foreign.py)

A plain text is a row of one field, which `Options.text_field` names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, BinaryIO, NamedTuple

from bigtx.data.raw import documents, formats
from bigtx.data.raw.documents import EMPTY, Reject, Rejects
from bigtx.data.raw.formats import BadRowError
from bigtx.data.storage.access import CHUNK_BYTES

_BLANK = b" \t\r\n"
_ARRAY = "a JSON array; write one object in each line: jq -c '.[]' FILE > FILE.jsonl"


@dataclass(frozen=True)
class Origin:
    """The origin of a stream of rows.

    Attributes:
        file: its name in rows and rejects; a member of an archive is `<archive>/<member>`.
        name: its path within the folder that was named.
        first_line: number of the line at which the stream starts.
        num_bytes: the number of bytes to read; None: all.
        number: added to the line to give a row's number.
    """

    file: str
    name: str
    first_line: int = 1
    num_bytes: int | None = None
    number: int = 0


MakeValue = Callable[[Any, BinaryIO], Any]
FieldsOf = Callable[[bytes], Mapping[str, Any]]


@dataclass(frozen=True)
class Options:
    """The options of reading.

    Attributes:
        text_field: the field in which a plain text is put.
        text_suffixes: the suffixes of files that are plain text.
        document_per_line: each line of a plain text is a row.
        quoted_fields: fields of tables may be in quotation marks.
        columns: the fields that are used; None: all. Rows may lack the others.
        exclude: members of archives to leave out, as `InputConfig.exclude`.
        members: further members of archives by suffix: the field that each fills, and the function that makes its value
            from the member and its decompressed stream (it raises BadRowError). All members of a sample then form one
            row.
        only: read the members of archives that end so, and no others: `txt`, `en.txt`, `json`.
        forbidden: suffixes of members for which an archive is refused.
        settings: for messages, the names of these attributes in the configuration, if they exist.
        strict: a sample without a member that is read is rejected, and so is one with an earlier key.
    """

    text_field: str = "text"
    text_suffixes: Sequence[str] = (".txt", ".md")
    document_per_line: bool = False
    quoted_fields: bool = True
    columns: Sequence[str] | None = None
    exclude: Sequence[str] = ()
    members: Mapping[str, tuple[str, MakeValue]] = field(default_factory=dict)
    only: str | None = None
    forbidden: Sequence[str] = ()
    settings: Mapping[str, str] = field(default_factory=dict)
    strict: bool = False

    @property
    def has_metadata(self) -> bool:
        """Return whether a field besides the text is used."""
        return self.columns is None or any(name != self.text_field for name in self.columns)

    def see(self, name: str, value: str = "", before: str = "; see ") -> str:
        """Return the end of a message that names a setting, if there is one."""
        return f"{before}{self.settings[name]}{value}" if name in self.settings else ""

    @property
    def is_joined(self) -> bool:
        """Return whether all members of a sample form one row."""
        return bool(self.members)

    def text_fields(self, raw: bytes) -> dict[str, str]:
        """Return the fields of a plain text.

        Raises:
            BadRowError: it is empty, or not a text.
        """
        text = formats.decode(raw)
        if not text:
            raise BadRowError(EMPTY)
        return {self.text_field: text}

    def describe(self) -> str:
        """Return the suffixes of members that are read."""
        return f".{self.only}" if self.only else ", ".join([".json", *self.text_suffixes, *self.members])


class Row(NamedTuple):
    """Named values, and their place.

    Attributes:
        fields: the values by name, as in the format: texts in tables, any JSON in JSON lines.
        file: as in `Origin.file`.
        line: the line, from 1, at which it starts in the file or member; in parquet the row.
        number: unique within an input file, and independent of how the file is cut into parts.
        id: for plain texts, the path within the folder that was named.
    """

    fields: Mapping[str, Any]
    file: str
    line: int
    number: int = 0
    id: str | None = None


Reader = Callable[[BinaryIO, Origin, Options, Rejects], Iterator[Row]]


def read_text(stream: BinaryIO, origin: Origin, options: Options, rejects: Rejects) -> Iterator[Row]:
    """Yield the rows of a text file: one row, or one per line with `document_per_line`."""
    if not options.document_per_line:
        advice = options.see("document_per_line", "=true", "; to read each line as a document: ")
        whole = read_whole(stream, origin, rejects, advice)
        if whole is not None:
            yield from _row(formats.without_signature(whole), origin, 1, rejects, options.text_fields, origin.name)
        return
    for line, raw in lines(stream, origin, rejects):
        raw = raw.removesuffix(b"\n").removesuffix(b"\r")
        if raw.strip(b"\r"):
            yield from _row(raw, origin, line, rejects, options.text_fields, f"{origin.name}:{line}")
        del raw


def read_json_lines(stream: BinaryIO, origin: Origin, options: Options, rejects: Rejects) -> Iterator[Row]:
    """Yield the JSON object of each line that is not blank."""
    yield from _json_rows(lines(stream, origin, rejects), origin, rejects)


def read_json(stream: BinaryIO, origin: Origin, options: Options, rejects: Rejects) -> Iterator[Row]:
    """Yield the rows of a file with the suffix of JSON: by its content JSON lines, or one object."""
    numbered = lines(stream, origin, rejects)
    blank: list[bytes] = []
    for line, raw in numbered:
        if not raw.strip(_BLANK):
            blank.append(raw)
        elif _is_json_line(raw):
            whole = chain(iter([(line, raw)]), numbered)
            del raw  # As in `lines`.
            yield from _json_rows(whole, origin, rejects)
            return
        elif raw.strip(_BLANK).startswith(b"["):
            rejects.add(Reject(origin.file, line, _ARRAY, lost=None))
            return
        else:
            rest = read_whole(stream, origin, rejects, lost=None)
            if rest is not None:
                yield from _row(b"".join([*blank, raw, rest]), origin, line, rejects, formats.parse_json)
            return
    if blank:
        rejects.add(Reject(origin.file, 0, EMPTY))


def is_json_lines(head: bytes) -> bool:
    """Return whether a JSON file with this beginning has an object in each line."""
    first = next((line for line in formats.without_signature(head).split(b"\n") if line.strip(_BLANK)), b"")
    return _is_json_line(first)


def lines(stream: BinaryIO, origin: Origin, rejects: Rejects) -> Iterator[tuple[int, bytes]]:
    """Yield the lines with their numbers and ends; those that are too long are rejected and skipped.

    A line may have hundreds of megabytes, so neither this function nor its callers keep one while reading the next.
    """
    limit = documents.MAX_DOCUMENT_BYTES
    line, position = origin.first_line - 1, 0
    try:
        while origin.num_bytes is None or position < origin.num_bytes:
            raw = stream.readline(limit + 1)
            if not raw:
                return
            line, position = line + 1, position + len(raw)
            if len(raw) <= limit:
                yield line, formats.without_signature(raw) if line == 1 else raw
                del raw
                continue
            rejects.add(Reject(origin.file, line, too_long()))
            while not raw.endswith(b"\n") and (raw := stream.readline(CHUNK_BYTES)):
                position += len(raw)
    except formats.READ_ERRORS as error:
        rejects.add(Reject(origin.file, line + 1, formats.unreadable(error), lost=None))


def read_whole(
    stream: BinaryIO, origin: Origin, rejects: Rejects, advice: str = "", *, lost: int | None = 1
) -> bytes | None:
    """Return all bytes of a stream; None if they are rejected.

    Args:
        advice: what to do if there are too many.
        lost: as in `Reject`, if they cannot be read to the end.
    """
    try:
        raw = formats.read_up_to(stream, documents.MAX_DOCUMENT_BYTES + 1)
    except formats.READ_ERRORS as error:
        rejects.add(Reject(origin.file, 0, formats.unreadable(error), lost))
        return None
    if len(raw) > documents.MAX_DOCUMENT_BYTES:
        rejects.add(Reject(origin.file, 1, too_long() + advice))
        return None
    return raw


def _row(
    raw: bytes, origin: Origin, line: int, rejects: Rejects, fields_of: FieldsOf, name: str | None = None
) -> Iterator[Row]:
    """Yield the row of some bytes, unless they are rejected."""
    try:
        fields = fields_of(raw)
    except BadRowError as error:
        rejects.add(Reject(origin.file, line, str(error)))
    else:
        yield Row(fields, origin.file, line, origin.number + line, name)


def too_long() -> str:
    """Return the reason for the rejection of a row that is too long for memory."""
    return f"longer than {documents.MAX_DOCUMENT_BYTES >> 20} MiB"


def _json_rows(numbered: Iterator[tuple[int, bytes]], origin: Origin, rejects: Rejects) -> Iterator[Row]:
    for line, raw in numbered:
        if raw.strip(_BLANK):
            yield from _row(raw, origin, line, rejects, formats.parse_json)
        del raw


def _is_json_line(raw: bytes) -> bool:
    # This holds for a line that is broken inside too: the next ones may be valid.
    stripped = raw.strip(_BLANK)
    return stripped.startswith(b"{") and stripped.endswith(b"}")
