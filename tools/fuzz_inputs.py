"""Random files for tools/fuzz_readers.py, made of items that are known to be good or bad."""

from __future__ import annotations

import csv
import gzip
import io
import json
import tarfile
from dataclasses import dataclass, field

from hypothesis import strategies as st

# A few NULs are text and many NULs are not; a separate case tests this.
CHARACTERS = st.characters(exclude_categories=["Cs"], exclude_characters="\0")
TEXTS = st.text(CHARACTERS, min_size=1, max_size=30).map(lambda text: text.removeprefix("\ufeff") or "x")
LINES = TEXTS.map(lambda text: " ".join(text.replace("\r", " ").split("\n")) or "x")
NAMES = st.sampled_from(["a", "v1", "2101", "a b", "ü", "x/y", "x/v1", "deep/er/n", "name (final)", "C:"])


Member = tuple[str, bytes, bytes]
"""Name, content and type."""


@dataclass(frozen=True)
class Item:
    """An item of a file: the text that must be read, or None if it must count as a reject."""

    text: str | None


@dataclass(frozen=True)
class Made:
    """A file, and the items that it was made of.

    Attributes:
        name: the file's name, with the suffix of its content.
        content: the file's bytes.
        items: the items in order.
        hides_next: whether a broken item may hide the next ones.
        shown: a readable form of the content.
        is_strict: fine-tuning records and foreign shards refuse it although `data prepare` reads it.
    """

    name: str
    content: bytes = field(repr=False)
    items: list[Item]
    hides_next: bool = False
    shown: object = None
    is_strict: bool = False

    @property
    def texts(self) -> list[str]:
        """Return the texts that must be read."""
        return [item.text for item in self.items if item.text is not None]


@st.composite
def json_lines(draw: st.DrawFn) -> Made:
    """Draw JSON lines with any of their suffixes, some of them broken."""
    lines, items = [], []
    for number in range(draw(st.integers(1, 8))):
        text = draw(TEXTS)
        fault = draw(st.sampled_from(["", "", "", "key", "json", "twice", "type", "utf8", "surrogate", "nul", "list"]))
        record = json.dumps({"id": number, "text": text}, ensure_ascii=draw(st.booleans())).encode()
        lines.append(
            {
                "": record,
                "key": json.dumps({"body": text}).encode(),
                "json": record[:-1],
                "twice": record[:-1] + b', "text": "again"}',
                "type": b'{"text": 7}',
                "utf8": b'{"text": "\xff"}',
                "surrogate": b'{"text": "\\ud83d"}',
                "nul": json.dumps({"text": "\0" * 20}).encode(),
                "list": b"[1]",
            }[fault]
        )
        items.append(Item(None if fault else text))
        if draw(st.integers(0, 5)) == 0:
            lines.append(draw(st.sampled_from([b"", b"  ", b"\r"])))
    # If the suffix does not determine the format, the first line does.
    suffixes = (
        [".jsonl", ".ndjson"]
        if lines[0] in (b"[1]", b"", b"  ", b"\r") or lines[0][-1:] != b"}"
        else [".json", ".jsonl"]
    )
    mark = draw(st.sampled_from([b"", b"\xef\xbb\xbf"]))
    return Made(f"a{draw(st.sampled_from(suffixes))}", mark + b"\n".join(lines), items, shown=lines)


@st.composite
def tables(draw: st.DrawFn) -> Made:
    """Draw tables with broken rows; after a stray quotation mark the following lines are part of its row."""
    delimiter = draw(st.sampled_from([",", "\t"]))
    written = io.StringIO(newline="")
    if draw(st.booleans()):
        writer = csv.writer(written, delimiter=delimiter)
    else:
        # If lines end with only a line feed, a carriage return in a field needs quotation.
        writer = csv.writer(written, delimiter=delimiter, lineterminator="\n", quoting=csv.QUOTE_ALL)
    writer.writerow(["id", "text"])
    content, items, hides_next = written.getvalue().encode(), [], False
    has_stray = draw(st.booleans())
    for number in range(draw(st.integers(1, 8))):
        fault = draw(st.sampled_from(["", "", "", "short", "long", "utf8", "nul", *(["stray"] if has_stray else [])]))
        # A row that cannot be used counts with all its lines.
        text = draw(LINES if has_stray or fault else TEXTS)
        written.seek(0)
        written.truncate()
        rows: dict[str, list[object]] = {
            "short": [number],
            "long": [number, text, "x"],
            "nul": [number, "\0" * 20],
        }
        writer.writerow(rows.get(fault, [number, text]))
        encoded = written.getvalue().encode()
        if fault == "utf8":
            encoded = f"{number}{delimiter}".encode() + b"\xff\n"
        if fault == "stray":
            encoded, hides_next = f'{number}{delimiter}"5 inch disk\n'.encode(), True
        content += encoded
        items.append(Item(None if fault else text))
    return Made("a.csv" if delimiter == "," else "a.tsv", content, items, hides_next=hides_next, shown=content)


@st.composite
def text_files(draw: st.DrawFn) -> Made:
    """Draw a text file in some encoding."""
    text = draw(TEXTS)
    fault = draw(st.sampled_from(["", "", "utf-16", "utf-16-le", "utf-16-be", "utf-32-le", "nul", "binary"]))
    if fault in ("nul", "binary"):
        content = bytes(100) if fault == "nul" else b"\xfe\xff\xff\x80" * 9
    elif fault:
        content = "a text that is long enough to look like its encoding".encode(fault)
    else:
        content = draw(st.sampled_from([b"", b"\xef\xbb\xbf"])) + text.encode()
    return Made("a.txt", content, [Item(None if fault else text)], shown=content)


def member(name: str, content: bytes, kind: bytes = tarfile.REGTYPE) -> Member:
    """Return a member of an archive."""
    return name, content, kind


def key_of(name: str) -> str:
    """Return webdataset's key: the path up to the first dot of its last name."""
    folder, slash, last = name.rpartition("/")
    return f"{folder}{slash}{last.partition('.')[0]}"


KINDS = (
    *("text", "text", "record", "pair", "reversed", "languages", "labelled", "both", "lines"),
    *("link", "out", "twice", "utf8", "apart"),
)
"""Samples, good and bad: see `sample`."""


def others(stem: str) -> list[Member]:
    """Draw members that are not read, after a sample with this stem."""
    return [
        member("README", b"x"),
        member("folder", b"", tarfile.DIRTYPE),
        member(".hidden.txt", b"x"),
        member(f"{stem}.png", b"\x89PNG"),
        member(f"{stem}.so", b"", tarfile.SYMTYPE),
    ]


def sample(kind: str, stem: str, text: str) -> tuple[list[Member], list[Item]]:
    """Draw a sample's members, and the result that they must have."""
    encoded, record = text.encode(), json.dumps({"text": text, "id": 1}).encode()
    plain, good, bad = member(f"{stem}.txt", encoded), Item(text), Item(None)
    packed = member(f"{stem}.TXT.gz", gzip.compress(encoded, mtime=0))
    sides = [member(f"{stem}.de.txt", encoded), member(f"{stem}.en.txt", encoded)]
    between = member(f"{stem.rpartition('/')[0]}/between{stem[-3:]}.txt".lstrip("/"), encoded)
    made = {
        "text": ([plain], [good]),
        "record": ([member(f"{stem}.json", record)], [good]),
        "pair": ([plain, member(f"{stem}.json", record)], [good]),
        "reversed": ([member(f"{stem}.json", record), plain], [good]),
        "languages": ([*sides, member(f"{stem}.json", b"{}")], [good, good]),
        "labelled": ([member(f"{stem}.cls", b"joy"), packed], [good]),
        "both": ([member(f"{stem}.jsonl", record), member(f"{stem}.json", record)], [good, good]),
        "lines": ([member(f"{stem}.jsonl", record + b"\n" + record)], [good, good]),
        "link": ([member(f"{stem}.txt", b"", tarfile.SYMTYPE)], [bad]),
        "out": ([member(f"x/../../out{stem[-3:]}.txt", encoded)], [bad]),
        "twice": ([plain, member(f"{stem}.txt", b"again")], [good, bad]),
        "utf8": ([member(f"{stem}.txt", b"\xff")], [bad]),
        "apart": ([plain, between, member(f"{stem}.json", b'{"id": 1}')], [good, good, bad]),
    }
    return made[kind]


@st.composite
def archives(draw: st.DrawFn) -> Made:
    """Draw archives of samples, with dots anywhere in names, links, duplicates and members that are not read."""
    members: list[Member] = []
    items: list[Item] = []
    keys: list[str] = []
    for number in range(draw(st.integers(1, 6))):
        # The numbers have the same width, so that no stem is the prefix of another.
        stem = draw(NAMES) + draw(st.sampled_from(["", ".", ".x.", " v1."])) + f"{number:03d}"
        front = draw(st.sampled_from(["", "", "./", "/"]))
        own, expected = sample(draw(st.sampled_from(KINDS)), stem, draw(TEXTS))
        members += [member(front + name, content, kind) for name, content, kind in own]
        items += expected
        keys += [key_of(name) for name, _, _ in own]
        if draw(st.integers(0, 4)) == 0:
            members.append(draw(st.sampled_from(others(stem))))
    # Duplicate keys are refused in records of samples; `data prepare` refuses them only in such records.
    runs = [key for place, key in enumerate(keys) if place == 0 or keys[place - 1] != key]
    content = tar_of(members, draw(st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])))
    return Made("a.tar", content, items, shown=members, is_strict=len(set(runs)) < len(runs))


def tar_of(members: list[Member], layout: int) -> bytes:
    """Return the bytes of an archive."""
    written = io.BytesIO()
    with tarfile.open(fileobj=written, mode="w", format=layout) as archive:
        for name, content, kind in members:
            info = tarfile.TarInfo(name)
            info.type, info.size = kind, len(content)
            info.linkname = "elsewhere" if kind == tarfile.SYMTYPE else ""
            archive.addfile(info, io.BytesIO(content))
    return written.getvalue()


MADE = st.one_of(json_lines(), tables(), text_files(), archives())
