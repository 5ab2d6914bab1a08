"""Fuzz all readers of rows: what comes out, plus what is counted as lost, is what was put in.

    python tools/fuzz_readers.py --seconds 120             seeds follow from the commit
    python tools/fuzz_readers.py --seconds 3600 --seed 7   other seeds

Random files are made of items that are known to be good or bad: texts, JSON lines, tables, archives of files and of
samples, with random names, quotation marks, encodings, duplicates and compressions. They are read in three ways:

- `bigtx data prepare`: the good items come out as they are, and each other one counts as a reject. Nothing is invented.
- fine-tuning records: the same, by the records that cannot be used.
- foreign shards: all items come out, or the shard is refused by name.

A file may also be cut at a random byte, or have one flipped: then whatever is missing of a compressed file or an
archive must have left a reject. A failure prints the smallest such file that hypothesis found, and the seed.
"""

from __future__ import annotations

import argparse
import bz2
import contextlib
import csv
import gzip
import io
import json
import lzma
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import zstandard
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from bigtx.config.schema import ForeignConfig, InputConfig
from bigtx.data.raw.read import Rejects, read_documents
from bigtx.data.records.read import read_records
from bigtx.data.records.record import Broken
from bigtx.data.stream.foreign import read_texts
from bigtx.utils.errors import DataError

EXAMPLES_AT_ONCE = 200
COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": lambda content: gzip.compress(content, mtime=0),
    ".zst": zstandard.ZstdCompressor(write_checksum=True).compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}

# Some NULs are text, and NULs throughout are not: that is tried by itself.
CHARACTERS = st.characters(exclude_categories=["Cs"], exclude_characters="\0")
TEXTS = st.text(CHARACTERS, min_size=1, max_size=30).map(lambda text: text.removeprefix("\ufeff") or "x")
LINES = TEXTS.map(lambda text: " ".join(text.replace("\r", " ").split("\n")) or "x")
NAMES = st.sampled_from(["a", "v1", "2101", "a b", "ü", "x/y", "x/v1", "deep/er/n", "name (final)", "C:"])


@dataclass(frozen=True)
class Item:
    """What was put in: the text that must come out, or None for what must be counted."""

    text: str | None


@dataclass(frozen=True)
class Made:
    """A file, and what it was made of.

    Attributes:
        name: of the file; its suffix says what it holds.
        items: in order.
        swallows: a broken item may take the next ones along.
        shown: what the content is, for people.
        is_strict: fine-tuning records and foreign shards refuse it although `data prepare` reads it.
    """

    name: str
    content: bytes = field(repr=False)
    items: list[Item]
    swallows: bool = False
    shown: object = None
    is_strict: bool = False

    @property
    def texts(self) -> list[str]:
        """Those that must come out."""
        return [item.text for item in self.items if item.text is not None]


@st.composite
def json_lines(draw: st.DrawFn) -> Made:
    """JSON lines under any of their suffixes, some of them broken."""
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
    # What holds JSON is known by the first line where the suffix does not say.
    suffixes = (
        [".jsonl", ".ndjson"]
        if lines[0] in (b"[1]", b"", b"  ", b"\r") or lines[0][-1:] != b"}"
        else [".json", ".jsonl"]
    )
    mark = draw(st.sampled_from([b"", b"\xef\xbb\xbf"]))
    return Made(f"a{draw(st.sampled_from(suffixes))}", mark + b"\n".join(lines), items, shown=lines)


@st.composite
def tables(draw: st.DrawFn) -> Made:
    """Tables, with broken rows; a stray quotation mark swallows what follows."""
    delimiter = draw(st.sampled_from([",", "\t"]))
    written = io.StringIO(newline="")
    if draw(st.booleans()):
        writer = csv.writer(written, delimiter=delimiter)
    else:
        # Where lines end with a line feed alone, only a quotation keeps a carriage return in a field.
        writer = csv.writer(written, delimiter=delimiter, lineterminator="\n", quoting=csv.QUOTE_ALL)
    writer.writerow(["id", "text"])
    content, items, swallows = written.getvalue().encode(), [], False
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
            encoded, swallows = f'{number}{delimiter}"5 inch disk\n'.encode(), True
        content += encoded
        items.append(Item(None if fault else text))
    return Made("a.csv" if delimiter == "," else "a.tsv", content, items, swallows=swallows, shown=content)


@st.composite
def text_files(draw: st.DrawFn) -> Made:
    """One text file, in some encoding."""
    text = draw(TEXTS)
    fault = draw(st.sampled_from(["", "", "utf-16", "utf-16-le", "utf-16-be", "utf-32-le", "nul", "binary"]))
    if fault in ("nul", "binary"):
        content = bytes(100) if fault == "nul" else b"\xfe\xff\xff\x80" * 9
    elif fault:
        content = "a text that is long enough to look like its encoding".encode(fault)
    else:
        content = draw(st.sampled_from([b"", b"\xef\xbb\xbf"])) + text.encode()
    return Made("a.txt", content, [Item(None if fault else text)], shown=content)


def member(name: str, content: bytes, kind: bytes = tarfile.REGTYPE) -> tuple[str, bytes, bytes]:
    """A member of an archive: name, content and type."""
    return name, content, kind


def key_of(name: str) -> str:
    """Webdataset's key: the path up to the first dot of its last name."""
    folder, slash, last = name.rpartition("/")
    return f"{folder}{slash}{last.partition('.')[0]}"


@st.composite
def archives(draw: st.DrawFn) -> Made:
    """Archives of samples, with names in which dots are anywhere, links, duplicates and members of no interest."""
    members: list[tuple[str, bytes, bytes]] = []
    items: list[Item] = []
    is_strict = False
    keys: list[str] = []
    for number in range(draw(st.integers(1, 6))):
        text, encoded = (found := draw(TEXTS)), found.encode()
        # Numbers of one width: no stem continues another one.
        stem = draw(NAMES) + draw(st.sampled_from(["", ".", ".x.", " v1."])) + f"{number:03d}"
        front = draw(st.sampled_from(["", "", "./", "/"]))
        what = draw(
            st.sampled_from(
                [
                    "text",
                    "text",
                    "record",
                    "pair",
                    "reversed",
                    "languages",
                    "lines",
                    "both",
                    "labelled",
                    "link",
                    "out",
                    "twice",
                    "utf8",
                    "apart",
                ]
            )
        )
        record = json.dumps({"text": text, "id": number}).encode()
        own = {
            "text": [member(f"{stem}.txt", encoded)],
            "record": [member(f"{stem}.json", record)],
            "pair": [member(f"{stem}.txt", encoded), member(f"{stem}.json", record)],
            "reversed": [member(f"{stem}.json", record), member(f"{stem}.txt", encoded)],
            "languages": [
                member(f"{stem}.de.txt", encoded),
                member(f"{stem}.en.txt", encoded),
                member(f"{stem}.json", b"{}"),
            ],
            "labelled": [member(f"{stem}.cls", b"joy"), member(f"{stem}.TXT.gz", gzip.compress(encoded, mtime=0))],
            "both": [member(f"{stem}.jsonl", record), member(f"{stem}.json", record)],
            "lines": [member(f"{stem}.jsonl", record + b"\n" + record)],
            "link": [member(f"{stem}.txt", b"", tarfile.SYMTYPE)],
            "out": [member(f"{stem}/../../out{number}.txt", encoded)],
            "twice": [member(f"{stem}.txt", encoded), member(f"{stem}.txt", b"again")],
            "utf8": [member(f"{stem}.txt", b"\xff")],
            "apart": [
                member(f"{stem}.txt", encoded),
                member(f"between{number}.txt", encoded),
                member(f"{stem}.json", b'{"id": 1}'),
            ],
        }[what]
        members += [member(front + name if what != "out" else name, content, kind) for name, content, kind in own]
        keys += [key_of(name) for name, _, _ in own]
        items += {
            "languages": [Item(text)] * 2,
            "both": [Item(text)] * 2,
            "lines": [Item(text)] * 2,
            "link": [Item(None)],
            "out": [Item(None)],
            "twice": [Item(text), Item(None)],
            "utf8": [Item(None)],
            "apart": [Item(text), Item(text), Item(None)],
        }.get(what, [Item(text)])
        if draw(st.integers(0, 4)) == 0:
            members += draw(
                st.sampled_from(
                    [
                        [member("README", b"x")],
                        [member("folder", b"", tarfile.DIRTYPE)],
                        [member(".hidden.txt", b"x")],
                        [member(f"{stem}.png", b"\x89PNG")],
                        [member(f"{stem}.so", b"", tarfile.SYMTYPE)],
                    ]
                )
            )
    # Keys that come again are refused where samples are records; `data prepare` needs them for records alone.
    runs = [key for place, key in enumerate(keys) if place == 0 or keys[place - 1] != key]
    is_strict = len(set(runs)) < len(runs)
    return Made(
        "a.tar",
        tar_of(members, draw(st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]))),
        items,
        shown=members,
        is_strict=is_strict,
    )


def tar_of(members: list[tuple[str, bytes, bytes]], layout: int) -> bytes:
    """The bytes of an archive."""
    written = io.BytesIO()
    with tarfile.open(fileobj=written, mode="w", format=layout) as archive:
        for name, content, kind in members:
            info = tarfile.TarInfo(name)
            info.type, info.size = kind, len(content)
            info.linkname = "elsewhere" if kind == tarfile.SYMTYPE else ""
            archive.addfile(info, io.BytesIO(content))
    return written.getvalue()


MADE = st.one_of(json_lines(), tables(), text_files(), archives())


def prepare(path: Path, **options: object) -> tuple[list[str], Rejects]:
    """What `bigtx data prepare` reads."""
    rejects = Rejects(1.0)
    config = InputConfig(paths=[str(path)], **options)  # type: ignore[arg-type]
    return [document.text for document in read_documents(config, rejects)], rejects


def check_prepare(made: Made, path: Path, has_metadata: bool) -> None:
    """The good items come out, and each other one counts."""
    texts, rejects = prepare(path, id_field="id" if has_metadata else "")
    assert not Counter(texts) - Counter(made.texts), f"invented: {Counter(texts) - Counter(made.texts)}"
    assert rejects.num_cut == 0 or made.name.endswith(".csv") or made.name.endswith(".tsv"), rejects.examples
    counted = len(texts) + rejects.count + rejects.num_empty
    assert counted == len(made.items), (counted, len(made.items), texts, rejects)
    if not made.swallows:
        assert sorted(texts) == sorted(made.texts), (texts, rejects)


def check_records(made: Made, path: Path) -> None:
    """The same, with the records that cannot be used; samples are judged as a whole."""
    if made.name.endswith(".txt"):
        return  # Text files are records in folders alone.
    broken = Broken()
    found = [record.fields.get("text") for record in read_records([str(path)], broken)]
    told = (found, broken.count, made.items)
    if made.name.endswith(".tar"):
        is_good = len(made.texts) == len(made.items) and not made.is_strict
        assert (broken.count == 0) == is_good, told
        assert not is_good or sorted(map(str, found)) == sorted(made.texts), told
    else:
        # A record without a text is one for other tasks.
        assert len(found) + broken.count == len(made.items), told
        assert made.swallows or not Counter(made.texts) - Counter(map(str, found)), told


def check_foreign(made: Made, path: Path) -> None:
    """All texts come out, or the shard is refused by name."""
    try:
        texts = list(read_texts(str(path), ForeignConfig()))
    except DataError as error:
        assert str(path) in str(error), error
        return
    plain = []
    with tarfile.open(path) as archive:
        for info in archive:
            name = Path(info.name.lower()).name
            if info.isreg() and name.endswith((".txt", ".txt.gz")) and not name.startswith("."):
                raw = archive.extractfile(info).read()  # type: ignore[union-attr]
                plain.append((gzip.decompress(raw) if name.endswith(".gz") else raw).decode())
    assert texts == [text for text in plain if text], (texts, plain)


def check_damaged(made: Made, path: Path, content: bytes, *, is_cut: bool) -> None:
    """What is missing of a damaged archive or compressed file has left a reject, and no reader raises."""
    path.write_bytes(content)
    for has_metadata in (False, True):
        texts, rejects = prepare(path, id_field="id" if has_metadata else "")
        is_checked = path.suffix in COMPRESSIONS or (is_cut and path.suffix == ".tar")
        if is_checked and len(texts) + rejects.count + rejects.num_empty < len(made.items):
            assert rejects.num_cut, (texts, rejects)
    if not made.name.endswith(".txt"):
        broken = Broken()
        for _ in read_records([str(path)], broken):
            pass
    if path.suffix == ".tar":
        with contextlib.suppress(DataError):
            list(read_texts(str(path), ForeignConfig()))


def check(folder: Path, made: Made, suffix: str, damage: tuple[str, float]) -> None:
    """Try one file in all ways."""
    content = COMPRESSIONS[suffix](made.content)
    path = folder / f"{made.name}{suffix}"
    path.write_bytes(content)
    try:
        for has_metadata in (False, True):
            check_prepare(made, path, has_metadata)
        check_records(made, path)
        if path.suffix == ".tar":
            check_foreign(made, path)
        how, where = damage
        place = int(where * len(content))
        if how == "cut" and place > 0:
            check_damaged(made, path, content[:place], is_cut=True)
        elif how == "flip":
            flipped = content[:place] + bytes([content[place] ^ 0x55]) + content[place + 1 :]
            check_damaged(made, path, flipped, is_cut=False)
    finally:
        path.unlink()


def rounds(first_seed: int, seconds: float) -> Iterator[int]:
    """Seeds, until the time is over."""
    end = time.monotonic() + seconds
    number = first_seed
    while time.monotonic() < end:
        yield number
        number += 1


def seed_of_commit() -> int:
    """A seed that follows from the commit, so that each one tries other files."""
    found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    return int(found.stdout.strip()[:8] or "0", 16)


def main() -> int:
    """Fuzz for a while."""
    parser = argparse.ArgumentParser(description="Fuzz the readers of rows.")
    parser.add_argument("--seconds", type=float, default=120.0, help="how long (default: 120)")
    parser.add_argument("--seed", type=int, help="the first seed (default: by the commit)")
    options = parser.parse_args()
    first = seed_of_commit() if options.seed is None else options.seed
    count = 0
    with tempfile.TemporaryDirectory() as scratch:
        for number in rounds(first, options.seconds):

            @seed(number)
            @settings(
                max_examples=EXAMPLES_AT_ONCE,
                deadline=None,
                database=None,
                suppress_health_check=list(HealthCheck),
                phases=(Phase.generate, Phase.shrink),
            )
            @given(
                MADE,
                st.sampled_from(list(COMPRESSIONS)),
                st.tuples(st.sampled_from(["", "cut", "flip"]), st.floats(0, 0.999)),
            )
            def try_one(made: Made, suffix: str, damage: tuple[str, float]) -> None:
                check(Path(scratch), made, suffix, damage)

            try:
                try_one()
            except BaseException:
                print(f"seed {number} fails: python tools/fuzz_readers.py --seed {number} --seconds 1", file=sys.stderr)
                raise
            count += EXAMPLES_AT_ONCE
    print(f"{count:,} files in seeds {first} to {number}: nothing found")
    return 0


if __name__ == "__main__":
    sys.exit(main())
