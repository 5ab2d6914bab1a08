"""The format as docs/format.md describes it: read by the document's own program, and field by field."""

from __future__ import annotations

import hashlib
import json
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from doors import ROOT

PAGE = ROOT / "docs" / "format.md"


@pytest.mark.parametrize("vocab_size", [1000, 70_000])
def test_the_program_in_the_page_reads_the_documents(tmp_path: Path, make_corpus, vocab_size: int) -> None:
    section = PAGE.read_text(encoding="utf-8").partition("## The format")[2].partition("\n## ")[0]
    (program,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    program += "\nimport sys\nprint(json.dumps([list(document) for document in read_split(sys.argv[1])]))\n"
    (tmp_path / "reader.py").write_text(program)
    documents = make_corpus(tmp_path, vocab_size=vocab_size, longest=600)
    # Isolated: it can import nothing but the standard library.
    command = [sys.executable, "-I", "-S", str(tmp_path / "reader.py"), str(tmp_path / "train")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [document.tolist() for document in documents]


def test_shards_are_byte_for_byte_what_the_page_says(tmp_path: Path, make_corpus) -> None:
    """Nothing of bigtx.data is used to read here."""
    documents = make_corpus(tmp_path)
    folder = tmp_path / "train"
    manifest = json.loads((folder / "manifest.json").read_text())
    table = (folder / "blocks.npy").read_bytes()
    assert hashlib.sha256(table).hexdigest() == manifest["blocks_sha256"]
    assert table[:8] == b"\x93NUMPY\x01\x00"
    first = 10 + struct.unpack_from("<H", table, 8)[0]
    assert len(table) == first + 32 * manifest["num_blocks"]
    stream = [i for document in documents for i in document.tolist()]
    ends, expected_shard = {}, 0
    for block in range(manifest["num_blocks"]):
        shard, tokens, count, docs_offset, offset, _ = struct.unpack_from("<IIIIQQ", table, first + 32 * block)
        assert shard in (expected_shard, expected_shard + 1)
        expected_shard = shard
        content = (folder / manifest["shards"][shard]["name"]).read_bytes()
        begin, docs = offset - 640, offset + docs_offset
        assert begin == ends.get(shard, 0)
        for at, name, size in (
            (begin, f"{block:06d}.tokens.npy", 128 + 2 * tokens),
            (docs - 640, f"{block:06d}.docs.npy", 128 + 4 * count),
        ):
            assert content[at : at + 100].rstrip(b"\0").decode() == name
            assert (int(content[at + 124 : at + 135], 8), content[at + 156 : at + 157]) == (size, b"0")
            assert content[at + 257 : at + 263] == b"ustar\0"
            assert content[at + 512 : at + 520] == b"\x93NUMPY\x01\x00"
            assert 10 + struct.unpack_from("<H", content, at + 520)[0] == 128
            padded = -(-size // 512) * 512
            assert not any(content[at + 512 + size : at + 512 + padded])
        assert docs - 640 == begin + 512 + -(-(128 + 2 * tokens) // 512) * 512
        ends[shard] = docs - 128 + -(-(128 + 4 * count) // 512) * 512
        place = block * manifest["block_tokens"]
        assert list(struct.unpack_from(f"<{tokens}H", content, offset)) == stream[place : place + tokens]
        starts = struct.unpack_from(f"<{count}I", content, docs)
        assert all(place + start == 0 or stream[place + start - 1] == manifest["end_id"] for start in starts)
    assert sum(len(document) for document in documents) == manifest["num_tokens"] == len(stream)
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    canonical = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    assert hashlib.sha256(canonical.encode()).hexdigest() == manifest["sha256"]
    for shard, about in enumerate(manifest["shards"]):
        content = (folder / about["name"]).read_bytes()
        assert re.fullmatch(r"\d{6,}\.tar", about["name"]) and len(content) == about["size"] == ends[shard] + 1024
        assert hashlib.sha256(content).hexdigest() == about["sha256"] and not any(content[-1024:])


def test_the_page_names_every_key_of_a_manifest(tmp_path: Path, make_corpus) -> None:
    make_corpus(tmp_path)
    page = PAGE.read_text(encoding="utf-8")
    for key in json.loads((tmp_path / "train" / "manifest.json").read_text()):
        assert f"`{key}`" in page, key
