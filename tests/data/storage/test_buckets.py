"""Text in object stores: S3 by s3fs itself, against a small store on loopback; Google's by a stand-in for gcsfs."""

from __future__ import annotations

import hashlib
import http.server
import re
import sys
import threading
import types
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
from data.inputs import gz, json_lines, parquet, read_all, tar, texts_of

from bigtx.config.schema import InputConfig
from bigtx.data.raw.files import list_files
from bigtx.data.storage import buckets, remote
from bigtx.utils.errors import DataError

TEXTS = [f"text {number} {'x' * 500}" for number in range(2000)]


@dataclass
class Store:
    """Objects by `bucket/key`, and the statuses that the next requests for one get instead."""

    objects: dict[str, bytes] = field(default_factory=dict)
    faults: dict[str, list[int]] = field(default_factory=dict)
    ranges: list[str] = field(default_factory=list)


class Handler(http.server.BaseHTTPRequestHandler):
    """As much of S3's protocol as reading needs."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        store: Store = self.server.store  # type: ignore[attr-defined]
        parts = urlsplit(self.path)
        path, query = unquote(parts.path).strip("/"), parse_qs(parts.query)
        if store.faults.get(path):
            self._answer(store.faults[path].pop(0), b"")
        elif "/" not in path:
            self._answer(200, self._listing(store, path, query))
        elif path not in store.objects:
            self._answer(404, b"<Error><Code>NoSuchKey</Code></Error>")
        else:
            content = store.objects[path]
            headers = {
                "ETag": f'"{hashlib.md5(content).hexdigest()}"',
                "Last-Modified": "Tue, 24 Nov 2026 00:00:00 GMT",
            }
            match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            if not match:
                self._answer(200, content, headers)
                return
            store.ranges.append(match[0])
            begin, end = int(match[1]), min(int(match[2]) + 1, len(content))
            headers["Content-Range"] = f"bytes {begin}-{end - 1}/{len(content)}"
            self._answer(206, content[begin:end], headers)

    def _listing(self, store: Store, bucket: str, query: dict[str, list[str]]) -> bytes:
        prefix, delimiter = query.get("prefix", [""])[0], query.get("delimiter", [""])[0]
        keys = [path.partition("/")[2] for path in sorted(store.objects) if path.startswith(f"{bucket}/")]
        contents, folders = [], set()
        for key in keys:
            rest = key.removeprefix(prefix)
            if not key.startswith(prefix):
                continue
            if delimiter and delimiter in rest:
                folders.add(prefix + rest.partition(delimiter)[0] + delimiter)
                continue
            content = store.objects[f"{bucket}/{key}"]
            contents.append(
                f"<Contents><Key>{key}</Key><Size>{len(content)}</Size><ETag>&quot;{hashlib.md5(content).hexdigest()}"
                "&quot;</ETag><LastModified>2026-11-24T00:00:00.000Z</LastModified></Contents>"
            )
        common = "".join(f"<CommonPrefixes><Prefix>{folder}</Prefix></CommonPrefixes>" for folder in sorted(folders))
        return (
            '<?xml version="1.0"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
            f"<Name>{bucket}</Name><IsTruncated>false</IsTruncated><KeyCount>{len(contents) + len(folders)}</KeyCount>"
            f"{''.join(contents)}{common}</ListBucketResult>"
        ).encode()

    def _answer(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Store]:
    pytest.importorskip("s3fs")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    store = Store()
    server.store = store  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "somebody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret-access-key")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr(remote, "BACK_OFF_SECONDS", (0.0, 0.01, 0.01))
    buckets.file_system.cache_clear()
    yield store
    buckets.file_system.cache_clear()
    server.shutdown()
    server.server_close()


def test_files_folders_and_globs_of_s3(store: Store) -> None:
    store.objects = {
        "mine/a/1.jsonl": json_lines(TEXTS),
        "mine/a/b/2.jsonl.gz": gz(json_lines(["two"])),
        "mine/a/b/3.tar": tar({"3.txt": b"three"}),
        "mine/a/b/4.parquet": parquet([{"text": "four"}]),
        "mine/a/b/.hidden.txt": b"hidden",
        "mine/a/c/5.txt": b"five",
        "mine/a/c/6.rst": b"six",
        "mine/other/7.txt": b"seven",
    }
    assert texts_of("s3://mine/a/1.jsonl") == TEXTS
    assert texts_of("s3://mine/a") == [*TEXTS, "two", "three", "four", "five"]
    assert texts_of("s3://mine/a/", exclude=["b", "1.*"]) == ["five"]
    assert texts_of("s3://mine/*/*.txt") == ["seven"]
    assert texts_of("s3://mine/**/*.txt") == ["five", "seven"]
    assert texts_of("s3://mine/{a/c/5,other/7}.txt") == ["five", "seven"]
    [document], _ = read_all("s3://mine/a/c")
    assert (document.file, document.id) == ("s3://mine/a/c/5.txt", "5.txt")
    assert store.ranges


def test_an_object_that_is_not_there_is_an_error(store: Store) -> None:
    store.objects = {"mine/a.rst": b"a", "mine/b.txt": b"b"}
    for path, message in (
        ("s3://mine/gone.txt", r"s3://mine/gone\.txt \(named in input\.paths\) cannot be read: there is no"),
        ("s3://mine/*.md", r"No text in s3://mine/\*\.md"),
        ("s3://mine/a.rst", "The format of"),
    ):
        with pytest.raises(DataError, match=message):
            list_files(InputConfig(paths=[path]))
    store.faults = {"mine/b.txt": [403] * 9}
    with pytest.raises(DataError, match="access is refused") as caught:
        list_files(InputConfig(paths=["s3://mine/b.txt"]))
    assert "secret-access-key" not in str(caught.value)


def test_an_object_that_changes_is_one_reject(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.objects = {"mine/a.txt": b"before", "mine/b.txt": b"b"}
    files = list_files(InputConfig(paths=["s3://mine"]))
    store.objects["mine/a.txt"] = b"after"
    monkeypatch.setattr("bigtx.data.raw.read.list_files", lambda _: files)
    found, [reject] = read_all("s3://mine")
    assert [d.text for d in found] == ["b"]
    assert reject.reason == "cannot be read: it was changed since it was listed"


def test_a_busy_store_is_asked_again(store: Store) -> None:
    store.objects = {"mine/a.txt": b"a"}
    store.faults = {"mine/a.txt": [503, 500]}
    assert texts_of("s3://mine/a.txt") == ["a"]


def test_a_dead_store_is_asked_as_often_as_is_said(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    store.objects = {"mine/a.txt": b"a"}
    answer = Handler._answer
    monkeypatch.setattr(Handler, "_answer", lambda *args: (asked.append(1), answer(*args)))
    monkeypatch.delenv("AWS_MAX_ATTEMPTS")
    buckets.file_system.cache_clear()
    store.faults = {"mine/a.txt": [503] * 100}
    with pytest.raises(DataError, match=r"s3://mine/a\.txt"):
        list_files(InputConfig(paths=["s3://mine/a.txt"]))
    assert len(asked) == len(remote.BACK_OFF_SECONDS) + 1


class GoogleDouble:
    """gcsfs's manners: no protocol in the names that it lists, an etag for each."""

    objects: ClassVar = {"mine/a.jsonl": json_lines(TEXTS), "mine/b/c.txt": b"c"}

    def __init__(self, **_: object) -> None:
        pass

    def info(self, path: str) -> dict[str, Any]:
        name = path.removeprefix("gs://")
        if name in self.objects:
            return {"name": name, "size": len(self.objects[name]), "type": "file", "etag": "1"}
        return {"name": name, "size": 0, "type": "directory"}

    def find(self, path: str, detail: bool) -> dict[str, Any]:
        assert detail
        return {name: self.info(name) for name in self.objects if f"gs://{name}".startswith(path)}

    def cat_file(self, path: str, start: int, end: int) -> bytes:
        return self.objects[path.removeprefix("gs://")][start:end]


def test_a_folder_of_google_cloud_storage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", types.SimpleNamespace(GCSFileSystem=GoogleDouble))
    buckets.file_system.cache_clear()
    assert texts_of("gs://mine") == [*TEXTS, "c"]
    assert {file.version for file in list_files(InputConfig(paths=["gs://mine"]))} == {"1"}
    buckets.file_system.cache_clear()


@pytest.mark.parametrize(("url", "extra"), [("s3://mine/a.txt", "s3"), ("gs://mine/a.txt", "gs")])
def test_the_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, url: str, extra: str) -> None:
    monkeypatch.setitem(sys.modules, {"s3": "s3fs", "gs": "gcsfs"}[extra], None)
    buckets.file_system.cache_clear()
    with pytest.raises(DataError, match=rf"pip install 'bigtx\[{extra}\]'"):
        list_files(InputConfig(paths=[url]))
    buckets.file_system.cache_clear()
