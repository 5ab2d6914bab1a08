"""The block format: plain webdataset tars, a block table that addresses every token, damage that is named."""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from corpora import write_split

from bigtx.data.corpus import blocks
from bigtx.data.corpus.blocks import BlockReader
from bigtx.data.corpus.manifest import Manifest, first_problems, padded_size
from bigtx.utils.errors import DataError
from bigtx.utils.files import sha256_file, write_sealed


def read_all(manifest: Manifest) -> tuple[np.ndarray, np.ndarray]:
    reader = BlockReader(manifest)
    blocks = [reader.block(block) for block in range(len(manifest.blocks))]
    starts = [starts + number * manifest.block_tokens for number, (_, starts) in enumerate(blocks)]
    return np.concatenate([tokens for tokens, _ in blocks]), np.concatenate(starts)


@pytest.mark.parametrize("vocab_size", [1000, 65_536, 70_000])
def test_blocks_come_back(tmp_path: Path, make_corpus, vocab_size: int) -> None:
    documents = make_corpus(tmp_path, vocab_size=vocab_size)
    manifest = Manifest.load(tmp_path / "train")
    tokens, starts = read_all(manifest)
    assert tokens.dtype == ("<u2" if vocab_size <= 65_536 else "<u4")
    assert tokens.tolist() == np.concatenate(documents).tolist()
    assert starts.tolist() == (np.cumsum([len(d) for d in documents]) - [len(d) for d in documents]).tolist()
    assert (manifest.num_tokens, manifest.num_documents) == (len(tokens), len(documents))
    assert len(manifest.shards) > 1


def test_shards_open_in_plain_webdataset(tmp_path: Path, make_corpus) -> None:
    webdataset = pytest.importorskip("webdataset")
    documents = make_corpus(tmp_path)
    manifest = Manifest.load(tmp_path / "train")
    paths = [str(manifest.shard_path(shard)) for shard in range(len(manifest.shards))]
    samples = list(webdataset.WebDataset(paths, shardshuffle=False).decode())
    assert [sample["__key__"] for sample in samples] == [f"{block:06d}" for block in range(len(manifest.blocks))]
    assert np.concatenate([sample["tokens.npy"] for sample in samples]).tolist() == np.concatenate(documents).tolist()
    reader = BlockReader(manifest)
    for block, sample in enumerate(samples):
        assert sample["docs.npy"].tolist() == reader.block(block)[1].tolist()


def test_members_are_plain_and_aligned(tmp_path: Path, make_corpus) -> None:
    make_corpus(tmp_path)
    manifest = Manifest.load(tmp_path / "train")
    assert (manifest.blocks["offset"] % 64 == 0).all()
    with tarfile.open(manifest.shard_path(0)) as shard:
        members = shard.getmembers()
    assert all(member.isfile() and member.mtime == member.uid == member.gid == 0 for member in members)
    assert members[0].offset_data + 128 == manifest.blocks["offset"][0]


def test_the_same_documents_give_the_same_bytes(tmp_path: Path) -> None:
    documents = [np.arange(4, 40), np.arange(4, 300), np.arange(4, 9)]
    for folder, parts in {"one": [documents], "three": [[document] for document in documents]}.items():
        write_split(tmp_path / folder, parts, block_tokens=64, shard_size=1024)
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "three").iterdir())
    assert all((tmp_path / "one" / name).read_bytes() == (tmp_path / "three" / name).read_bytes() for name in names)


def test_an_unfinished_split_is_refused(tmp_path: Path) -> None:
    write_split(tmp_path / "train", [[np.arange(100)]], block_tokens=16, shard_size=1024)
    (tmp_path / "train" / "manifest.json").unlink()
    with pytest.raises(DataError, match="lost that file"):
        Manifest.load(tmp_path / "train")
    with pytest.raises(DataError, match="no prepared split"):
        Manifest.load(tmp_path / "elsewhere")


def remove(folder: Path) -> None:
    (folder / "000001.tar").unlink()


def truncate(folder: Path) -> None:
    path = folder / "000000.tar"
    path.write_bytes(path.read_bytes()[:-512])


def change_table(folder: Path) -> None:
    path = folder / "blocks.npy"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def change_manifest(**changes: object):
    def change(folder: Path) -> None:
        path = folder / "manifest.json"
        write_sealed(path, json.loads(path.read_text()) | changes)

    return change


def change_figure(**changes: object):
    """As a flipped byte does: the hash of the manifest stays what it was."""

    def change(folder: Path) -> None:
        path = folder / "manifest.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def take_hash_away(folder: Path) -> None:
    path = folder / "manifest.json"
    content = json.loads(path.read_text())
    del content["sha256"]
    path.write_text(json.dumps(content))


def break_json(folder: Path) -> None:
    (folder / "manifest.json").write_text("{")


def change_header(folder: Path) -> None:
    """As an attacker does: a header that numpy's parser cannot read, under a hash that fits."""
    path = folder / "blocks.npy"
    content = path.read_bytes()
    path.write_bytes(content[:40] + bytes(40) + content[80:])
    change_manifest(blocks_sha256=sha256_file(path))(folder)


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (change_header, r"manifest.json is damaged \(ValueError"),
        (remove, "000001.tar is missing"),
        (truncate, r"000000.tar has [\d,]+ bytes instead of"),
        (change_table, "blocks.npy was changed"),
        (break_json, "not valid JSON"),
        (change_manifest(format_version=2), "format version 2"),
        (change_manifest(format="other"), "not a manifest"),
        (change_manifest(num_tokens=1), "different counts"),
        (change_manifest(dtype="|O"), "damaged"),
        (change_manifest(shards=[{"name": "../../000001.tar", "size": 1, "sha256": ""}]), "damaged"),
        (change_manifest(shards=[]), "no block that its shards have"),
        (change_manifest(recipe=None), "damaged"),
        (change_manifest(split="validation"), "says that it is the split 'validation'"),
        (change_figure(num_bytes=1), "does not have the hash that it contains"),
        (change_figure(block_tokens=7), "does not have the hash that it contains"),
        (change_figure(split="validation"), "does not have the hash that it contains"),
        (take_hash_away, "has no hash of itself"),
    ],
)
def test_damage_is_named_when_a_split_is_opened(tmp_path: Path, make_corpus, damage, named: str) -> None:
    make_corpus(tmp_path)
    damage(tmp_path / "train")
    with pytest.raises(DataError, match=named):
        Manifest.load(tmp_path / "train")


def test_every_flipped_byte_of_a_block_is_found_when_it_is_touched(tmp_path: Path, make_corpus) -> None:
    make_corpus(tmp_path, num_documents=20)
    manifest = Manifest.load(tmp_path / "train")
    begin, end = manifest.block_range(1)
    path = manifest.shard_path(int(manifest.blocks["shard"][1]))
    content = path.read_bytes()
    for place in np.random.default_rng(0).integers(begin, end, 100).tolist():
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        reader = BlockReader(manifest)
        reader.block(0)
        with pytest.raises(DataError, match="Block 1 of"):
            reader.block(1)


def test_blocks_cover_the_shards_whole(tmp_path: Path, make_corpus) -> None:
    make_corpus(tmp_path)
    manifest = Manifest.load(tmp_path / "train")
    place = 0
    for block, shard in enumerate(manifest.blocks["shard"].tolist()):
        begin, end = manifest.block_range(block)
        if begin == 0 and block:
            assert manifest.shards[shard - 1].size == place + 1024
            place = 0
        assert begin == place
        place = end
    assert manifest.shards[-1].size == place + 1024


@pytest.mark.parametrize(("limits", "fits"), [((300, 300), True), ((100, 300), True), ((100, 100), False)])
def test_many_shards_and_sources_need_few_open_files(tmp_path: Path, limits: tuple[int, int], fits: bool) -> None:
    """Two sources of 400 shards each are read to the end, out of order, in a process with limits (soft, hard)."""
    for name in ("a", "b"):
        write_split(tmp_path / name, [[np.ones(17, np.uint16)] * 400], block_tokens=17, shard_size=1)
    code = (
        f"import resource; resource.setrlimit(resource.RLIMIT_NOFILE, {limits})\n"
        "from bigtx.data.corpus.manifest import Manifest\n"
        "from bigtx.data.corpus.blocks import BlockReader\n"
        f"readers = [BlockReader(Manifest.load({str(tmp_path)!r} + name)) for name in ('/a', '/b')]\n"
        "for block in range(400): [reader.block(block * 7 % 400) for reader in readers]\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode == 0) == fits, done.stderr
    assert fits or "limit of open files is too low" in done.stderr


@pytest.mark.parametrize(
    ("count", "said"),
    [(1, "0"), (5, "0; 1; 2; 3; 4"), (6, "0; 1; 2; 3; 4; and 1 more"), (12, "0; 1; 2; 3; 4; and 7 more")],
)
def test_of_many_problems_the_first_are_named(count: int, said: str) -> None:
    assert first_problems([str(number) for number in range(count)]) == said


@pytest.mark.parametrize(("size", "padded"), [(0, 0), (1, 512), (512, 512), (513, 1024)])
def test_a_member_fills_whole_units_of_a_tar(size: int, padded: int) -> None:
    assert padded_size(size) == padded


def test_a_block_is_verified_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = write_split(tmp_path / "train", [[np.arange(4, 40)] * 20], block_tokens=64, shard_size=4096)
    reader, verified = BlockReader(manifest), list[int]()
    is_block = blocks.is_block
    monkeypatch.setattr(blocks, "is_block", lambda *of: verified.append(of[1]) or is_block(*of))
    for block in (0, 1, 0):
        reader.block(block)
        reader.block.cache_clear()  # As if other blocks had been read since.
    assert verified == [0, 1]
