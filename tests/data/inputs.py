"""Raw text of all kinds, for the tests of the readers."""

from __future__ import annotations

import csv
import gzip
import io
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import zstandard

from bigtx.config.schema import InputConfig
from bigtx.data.raw.documents import Document, Reject, Rejects
from bigtx.data.raw.read import read_documents


def read_all(path: Path | str | list[str], **settings: Any) -> tuple[list[Document], list[Reject]]:
    """The documents and rejects of an input."""
    paths = path if isinstance(path, list) else [str(path)]
    found: list[Reject] = []
    return list(read_documents(InputConfig(paths=paths, **settings), Rejects(1.0, found.append))), found


def texts_of(path: Path | str | list[str], **settings: Any) -> list[str]:
    """The texts of an input in which everything can be read."""
    documents, rejects = read_all(path, **settings)
    assert rejects == []
    return [document.text for document in documents]


def json_lines(texts: list[str]) -> bytes:
    return b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)


def table(rows: list[list[str]], delimiter: str = ",") -> bytes:
    written = io.StringIO(newline="")
    csv.writer(written, delimiter=delimiter).writerows(rows)
    return written.getvalue().encode()


def tar(members: Mapping[str, bytes] | list[tuple[str, bytes]], **of_members: Any) -> bytes:
    """A tar archive; `of_members` are attributes of every member, e.g. its type."""
    written = io.BytesIO()
    with tarfile.open(fileobj=written, mode="w", format=of_members.pop("format", tarfile.PAX_FORMAT)) as archive:
        for name, content in members.items() if isinstance(members, Mapping) else members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            for attribute, value in of_members.items():
                setattr(info, attribute, value)
            archive.addfile(info, io.BytesIO(content))
    return written.getvalue()


def without_end(archive: bytes) -> bytes:
    """A tar archive that is cut at the border of its last member."""
    content = archive.rstrip(b"\0")
    return content + bytes(-len(content) % tarfile.BLOCKSIZE)


def parquet(rows: list[dict[str, Any]], row_group_size: int = 10) -> bytes:
    import pyarrow
    from pyarrow.parquet import write_table

    written = io.BytesIO()
    write_table(pyarrow.Table.from_pylist(rows), written, row_group_size=row_group_size)
    return written.getvalue()


def zst(content: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(content)


def gz(content: bytes) -> bytes:
    return gzip.compress(content, mtime=0)
