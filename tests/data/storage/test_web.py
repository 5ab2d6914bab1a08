"""Text on web servers: streamed, taken up again after a fault, and never with its credentials in what is written."""

from __future__ import annotations

import itertools
import json
import random
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from data.inputs import gz, json_lines, parquet, read_all, tar, texts_of
from data.web_double import LOGIN, Web, start

from bigtx.cli import main
from bigtx.config.schema import InputConfig, TokenizerTrainConfig
from bigtx.data.raw.documents import Reject, Rejects
from bigtx.data.raw.files import list_files, split_file
from bigtx.data.raw.read import read_file
from bigtx.data.storage import remote, web
from bigtx.data.storage.places import RemotePath
from bigtx.data.storage.remote import TransientError
from bigtx.tokenizer.train import train
from bigtx.utils.errors import DataError

# More than what is asked for at once.
TEXTS = [f"text {number} {random.Random(number).randbytes(400).hex()}" for number in range(4000)]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(remote, "BACK_OFF_SECONDS", (0.0, 0.01, 0.01))
    web = Web()
    running = start(web)
    yield web
    running.shutdown()
    running.server_close()


def test_files_of_all_kinds_are_streamed(server: Web) -> None:
    server.files = {
        "/a.jsonl": json_lines(TEXTS),
        "/b.jsonl.gz": gz(json_lines(TEXTS[:100])),
        "/c d/ö.txt": b"c",
        "/e.tar": tar({"e.txt": b"e"}),
        "/f.parquet": parquet([{"text": text} for text in TEXTS[:2000]]),
    }
    paths = [f"{server.url}{path}" for path in server.files]
    assert texts_of(paths) == [*TEXTS, *TEXTS[:100], "c", "e", *TEXTS[:2000]]
    found, _ = read_all(paths[2])
    assert (found[0].file, found[0].id) == (f"{server.url}/c d/ö.txt", "ö.txt")


def test_braces_stand_for_several_files(server: Web) -> None:
    server.files = {f"/{number:03d}.txt": str(number).encode() for number in range(12)}
    assert texts_of(f"{server.url}/{{000..011}}.txt") == [str(number) for number in range(12)]
    with pytest.raises(
        DataError, match=r"/012\.txt \(named in input\.paths\) cannot be read: its server responds with 4"
    ):
        texts_of(f"{server.url}/{{000..012}}.txt")
    with pytest.raises(DataError, match=r"does not list its files\. Name them, e\.g\. with \{000\.\.010\}\."):
        texts_of(f"{server.url}/*.txt")
    assert texts_of(f"{server.url}/{{000..010}}.txt") == [str(number) for number in range(11)]


@pytest.mark.parametrize("ranges", ["", "no ranges"])
def test_a_connection_that_breaks_is_taken_up_again(server: Web, ranges: str) -> None:
    server.files = {"/a.jsonl": json_lines(TEXTS)}
    faults = {1: "cut 1000000", 2: "503", 3: "cut 1000000", 4: ranges, 5: "429"}
    server.faults = {"/a.jsonl": lambda number: faults.get(number, ranges)}
    assert texts_of(f"{server.url}/a.jsonl") == TEXTS
    assert any(asked for _, _, asked in server.requests[2:])


def test_a_file_that_ends_early_is_one_reject(server: Web) -> None:
    content = json_lines(TEXTS)
    server.files = {"/a.jsonl": content}
    server.faults = {"/a.jsonl": lambda number: "cut 1500000" if number else ""}
    found, [reject] = read_all(f"{server.url}/a.jsonl")
    assert [d.text for d in found] == TEXTS[: len(found)] and 1000 < len(found) < len(TEXTS)
    assert reject.reason == f"cannot be read: it ends early, after 1,500,000 of {len(content):,} bytes"
    assert reject.line == len(found) + 1
    assert len(server.requests) < 10


@pytest.mark.parametrize(
    ("fault", "reason"), [("404", "responds with 404"), ("500", "responds with 500"), ("401", "responds with 401")]
)
def test_a_file_that_vanishes_is_one_reject(server: Web, fault: str, reason: str) -> None:
    server.files = {"/a.txt": b"a", "/b.txt": b"b"}
    server.faults = {"/a.txt": lambda number: fault if number else ""}
    found, [reject] = read_all([f"{server.url}/a.txt", f"{server.url}/b.txt"])
    assert [d.text for d in found] == ["b"]
    assert f"responds with {fault}" in reject.reason and reject.file == f"{server.url}/a.txt"
    assert len(server.requests) == (3 + 4 if fault == "500" else 4)


def test_a_file_that_changes_is_one_reject(server: Web) -> None:
    server.files = {"/a.txt": b"before"}
    [file] = list_files(InputConfig(paths=[f"{server.url}/a.txt"]))
    for content, version, reason in ((b"after!", "", "was changed"), (b"longer", 'W/"x"', "was changed")):
        server.files["/a.txt"] = content
        server.versions = {"/a.txt": version} if version else {}
        found: list[Reject] = []
        assert list(read_file(file, InputConfig(), Rejects(0, found.append))) == []
        assert reason in found[0].reason


@pytest.mark.parametrize(
    ("name", "encoding", "is_read"),
    [
        ("a.txt", "gzip", False),
        ("a.jsonl", "br", False),
        ("a.jsonl.gz", "br", False),
        ("a.jsonl.gz", "gzip", True),
        ("a.jsonl.gz", "x-gzip", True),
        ("a.jsonl", "identity", True),
    ],
)
def test_a_server_that_compresses_unasked_is_named(server: Web, name: str, encoding: str, is_read: bool) -> None:
    content = json_lines(["one", "two"])
    server.files = {f"/{name}": gz(content) if is_read and name.endswith(".gz") else content}
    server.faults = {f"/{name}": lambda _: f"encoding {encoding}"}
    if is_read:
        assert texts_of(f"{server.url}/{name}") == ["one", "two"]
        return
    with pytest.raises(DataError, match=rf"{name}.* compressed \(Content-Encoding: {encoding}\)"):
        texts_of(f"{server.url}/{name}")
    with pytest.raises(OSError, match="compressed"):
        web.read_range(f"{server.url}/{name}", 0, 5)
    with pytest.raises(OSError, match="compressed"):
        web.read_range(f"{server.url}/{name}")


def test_mirrors_with_versions_of_their_own_are_named(server: Web, tmp_path: Path) -> None:
    server.files = {"/a.txt": b"the same"}

    def another(number: int) -> str:
        server.versions["/a.txt"] = f'"mirror-{number % 2}"'
        return ""

    server.faults = {"/a.txt": another}
    _, [reject] = read_all(f"{server.url}/a.txt")
    assert "different versions of it in turn (ETag), as several mirrors" in reject.reason
    server.files["/mirror-1/a.txt"] = b"the same"
    assert texts_of(f"{server.url}/mirror-1/a.txt") == texts_of(copy(server, "a.txt", tmp_path)) == ["the same"]


def copy(server: Web, name: str, folder: Path) -> str:
    """A copy that curl makes of the server, as the messages advise."""
    words = ["curl", "--compressed", "--silent", "--show-error", "--fail", "--output", name, f"{server.url}/{name}"]
    if shutil.which("curl") is None:
        pytest.skip("needs curl")
    subprocess.run(words, cwd=folder, check=True)
    return str(folder / name)


@pytest.mark.parametrize(
    ("name", "fault", "message"),
    [
        ("a.txt", "no ranges, no length", "does not report its size; copy it and read the copy"),
        ("a.parquet", "no ranges", "cannot send parts of files, which parquet needs; copy it and read the copy"),
        ("a.jsonl", "encoding gzip", r"copy it with a program that decompresses it \(curl --compressed\) and read the"),
    ],
)
def test_a_copy_is_read_of_what_a_server_does_not_send_in_a_usable_form(
    server: Web, tmp_path: Path, name: str, fault: str, message: str
) -> None:
    content = {"a.txt": b"one", "a.parquet": parquet([{"text": "one"}]), "a.jsonl": gz(json_lines(["one"]))}[name]
    server.files = {f"/{name}": content}
    server.faults = {f"/{name}": lambda _: fault}
    try:
        said = [reject.reason for reject in read_all(f"{server.url}/{name}")[1]]
    except DataError as error:
        said = [str(error)]
    assert re.search(message, said[0]), said
    assert texts_of(copy(server, name, tmp_path)) == ["one"]
    if fault.startswith("encoding"):  # Switched off for this file.
        server.files, server.faults = {f"/{name}": json_lines(["one"])}, {}
        assert texts_of(f"{server.url}/{name}") == ["one"]


def test_waiting_for_a_silent_place_is_said_once(
    server: Web, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server.files = {"/a.txt": b"a"}
    said = threading.Event()
    server.faults = {"/a.txt": lambda _: "" if said.wait(20) else "503"}
    monkeypatch.setattr(remote, "SAY_AFTER_SECONDS", 0.01)

    def say(text: str) -> None:
        print(text)
        said.set()

    monkeypatch.setattr(remote, "say", say)
    assert texts_of(f"{server.url}/a.txt?key=secret-word") == ["a"]
    [line] = capsys.readouterr().out.splitlines()
    assert line.startswith(f"waiting for {server.url}/a.txt?")
    assert "secret-word" not in line and line.endswith("it is given up after 4 tries")
    said.clear()
    assert RemotePath(f"{server.url}/a.txt").read_bytes() == b"a"
    assert f"waiting for {server.url}/a.txt, which" in capsys.readouterr().out


def test_a_request_is_not_tried_again_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    now = itertools.count(0.0, 50.0)
    monkeypatch.setattr(remote.time, "monotonic", lambda: next(now))
    monkeypatch.setattr(remote.time, "sleep", lambda _: None)
    calls = []

    def call() -> None:
        calls.append(1)
        raise TransientError("no answer")

    with pytest.raises(TransientError, match="no answer"):
        remote.retried(call, "https://dead.example/a.txt")
    assert len(calls) == 3


def test_a_silent_server_is_given_up(server: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    server.files = {"/a.txt": b"a", "/b.txt": b"b"}
    server.faults = {"/a.txt": lambda number: "slow" if number == 1 else "", "/b.txt": lambda _: "slow"}
    monkeypatch.setattr(web, "TIMEOUT_SECONDS", 0.2)
    assert texts_of(f"{server.url}/a.txt") == ["a"]


@pytest.mark.parametrize(
    ("path", "fault", "message"),
    [
        ("/a.txt", "404", "responds with 404"),
        ("/a.txt", "403", "responds with 403"),
        ("/a.txt", "503", "responds with 503"),
        ("/a.txt", "no ranges, no length", "does not report its size"),
        ("/a.txt", "to file:///etc/hostname", "responds with 302 Found"),
        ("/a.txt", "to ftp://127.0.0.1/a.txt", "redirects to another protocol"),
        ("/a", "", "The format of"),
        ("", "", "The format of"),
    ],
)
def test_what_cannot_be_read_at_all_is_an_error(server: Web, path: str, fault: str, message: str) -> None:
    server.files = {"/a.txt": b"a"}
    server.faults = {"/a.txt": lambda _: fault}
    with pytest.raises(DataError, match=message):
        list_files(InputConfig(paths=[f"{server.url}{path}"]))


def test_a_server_that_is_not_there_is_an_error(server: Web) -> None:
    with pytest.raises(DataError, match=r"http://127\.0\.0\.1:9/a\.txt\?<hidden> .*cannot be read: Connection refused"):
        list_files(InputConfig(paths=["http://127.0.0.1:9/a.txt?sig=abc"]))


def test_redirections_are_followed_without_the_password(
    server: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.files = {"/b.txt": b"b"}
    server.faults = {"/a.txt": lambda _: f"to {server.url.replace('127.0.0.1', 'localhost')}/b.txt"}
    assert texts_of(f"{server.url}/a.txt") == ["b"]
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".netrc").write_text(f"machine 127.0.0.1 login user password {LOGIN.partition(':')[2]}")
    (tmp_path / ".netrc").chmod(0o600)
    server.needs_login = True
    assert texts_of(f"{server.url}/b.txt") == ["b"]
    with pytest.raises(DataError, match="responds with 401"):
        texts_of(f"{server.url}/a.txt")


def test_an_empty_file_is_told(server: Web) -> None:
    server.files = {"/a.txt": b"", "/b.txt": b"b"}
    found, [reject] = read_all([f"{server.url}/a.txt", f"{server.url}/b.txt"])
    assert (found[0].text, reject.reason) == ("b", "empty")


def test_parquet_needs_ranges(server: Web) -> None:
    server.files = {"/a.parquet": parquet([{"text": text} for text in TEXTS])}
    server.faults = {"/a.parquet": lambda _: "no ranges"}
    _, [reject] = read_all(f"{server.url}/a.parquet")
    assert "cannot send parts of files" in reject.reason


def test_remote_files_are_not_cut_into_parts(server: Web) -> None:
    server.files = {"/a.jsonl": json_lines(TEXTS)}
    [file] = list_files(InputConfig(paths=[f"{server.url}/a.jsonl"]))
    assert file.size == len(server.files["/a.jsonl"]) and file.version
    assert split_file(file, InputConfig(), 1000) == [file]


def test_credentials_are_used_and_never_written(
    server: Web, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    train(TokenizerTrainConfig(vocab_size=400), [text[:60] for text in TEXTS[:300]]).save(tmp_path / "tokenizer")
    server.needs_login = True
    server.files = {"/a.jsonl": json_lines(TEXTS[:50]) + b"broken\n", "/b.txt": b"\xff"}
    query = "id=0123secret&share=tokensecret"
    (tmp_path / ".netrc").write_text(f"machine 127.0.0.1 login user password {LOGIN.partition(':')[2]}")
    (tmp_path / ".netrc").chmod(0o600)
    paths = ",".join(f'"{server.url}/{name}?{query}"' for name in ("a.jsonl", "b.txt"))
    with_login = server.url.replace("://", f"://{LOGIN}@")
    assert main(["data", "prepare", f"input.paths=[{with_login}/b.txt]", f"output={tmp_path}/d"]) == 2
    for path in (f"{with_login}/b.txt", f"simplecache::{with_login}/b.txt", f"ftp://{LOGIN}@host/b.txt"):
        with pytest.raises(DataError, match=r"input\.paths") as caught:
            list_files(InputConfig(paths=[path]))
        assert LOGIN.partition(":")[2] not in str(caught.value)
    arguments = ["data", "prepare", f"input.paths=[{paths}]", f"tokenizer={tmp_path}/tokenizer", "num_processes=1"]
    assert main([*arguments, f"output={tmp_path}/a", "input.max_rejects=1"]) == 0
    assert main([*arguments, f"output={tmp_path}/b"]) == 2
    server.faults = {"/b.txt": lambda _: "404"}
    assert main([*arguments, f"output={tmp_path}/c"]) == 2
    assert all(f"?{query}" in asked for _, asked, _ in server.requests)
    out, err = capsys.readouterr()
    (tmp_path / ".netrc").unlink()
    written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    rejects = [json.loads(line) for line in (tmp_path / "a" / "rejects.jsonl").read_text().splitlines()]
    assert [reject["file"] for reject in rejects] == [f"{server.url}/{name}?<hidden>" for name in ("a.jsonl", "b.txt")]
    assert "b.txt?<hidden>" in err and "404" in err
    for secret in (LOGIN.rpartition(":")[2], "0123secret", "tokensecret"):
        assert secret not in out + err
        assert not any(secret.encode() in content for content in written)
