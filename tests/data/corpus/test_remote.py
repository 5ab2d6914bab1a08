"""Corpora behind URLs: the same batches as from local shards, a verified and bounded cache, and what may go wrong."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import time
from pathlib import Path

import numpy as np
import pytest
from servers import Served, cut, first, flipped, serve, status

from bigtx.config.schema import DataConfig, SourceConfig, TokenizerTrainConfig
from bigtx.data.corpus import blocks
from bigtx.data.corpus.blocks import load_tokenizer, open_reader
from bigtx.data.corpus.manifest import Manifest, has_split
from bigtx.data.storage import buckets, places
from bigtx.data.storage.places import Cache, DamagedError, RemotePath, as_place
from bigtx.data.stream.loader import Division, TrainLoader, ValidationBatches
from bigtx.data.stream.rows import RowFormat
from bigtx.tokenizer.tokenizer import Tokenizer
from bigtx.tokenizer.train import train
from bigtx.utils.errors import DataError


@pytest.fixture
def served(tmp_path: Path, make_corpus, monkeypatch: pytest.MonkeyPatch):
    """A corpus of random documents behind a web server."""
    monkeypatch.setattr(places, "FIRST_WAIT_SECONDS", 0.01)
    make_corpus(tmp_path / "web" / "corpus", num_documents=80)
    with serve(tmp_path / "web") as running:
        yield running


def place(served: Served, cache_dir: Path, size: int = 1 << 30) -> RemotePath:
    return RemotePath(f"{served.url}/corpus", Cache(cache_dir, size))


def same_blocks(found: Manifest, local: Manifest) -> None:
    readers = open_reader(found), open_reader(local)
    for block in range(len(local.blocks)):
        pairs = zip(*(reader.block(block) for reader in readers), strict=True)
        assert all(np.array_equal(remote, here) for remote, here in pairs)
    readers[0].close()


def steps(path: str, cache_dir: Path, *, rank: int = 0, world_size: int = 1) -> list[list[int]]:
    data = DataConfig(sources={"a": SourceConfig(path=path)}, cache_dir=str(cache_dir), document_mask=True)
    loader = TrainLoader(
        data,
        Division(global_batch_size=8, micro_batch_size=2, rank=rank, world_size=world_size),
        sequence_length=16,
        seed=5,
        start_sequence=24,
        pad_id=0,
    )
    found = [batch for _ in range(60) for batch in next(loader)]
    loader.close()
    return [part.tolist() for batch in found for part in (batch.tokens, batch.labels, batch.positions)]


def test_batches_are_those_of_the_local_corpus(tmp_path: Path, served: Served) -> None:
    for rank in range(2):
        expected = steps(str(tmp_path / "web" / "corpus"), tmp_path, rank=rank, world_size=2)
        assert steps(f"{served.url}/corpus", tmp_path / "cache", rank=rank, world_size=2) == expected
    form = RowFormat(sequence_length=16, pad_id=0, document_mask=False)
    for rank in range(2):
        here, there = (
            ValidationBatches(corpus, form, micro_batch_size=2, max_sequences=10, rank=rank, world_size=2)
            for corpus in (tmp_path / "web" / "corpus", place(served, tmp_path / "cache"))
        )
        assert [batch.tokens.tolist() for batch in here] == [batch.tokens.tolist() for batch in there]


def test_blocks_are_fetched_once_and_several_at_a_time(tmp_path: Path, served: Served) -> None:
    def slow(_, content: bytes) -> bytes:
        time.sleep(0.05)
        return content

    served.faults[".tar"] = slow
    manifest = Manifest.load(place(served, tmp_path / "cache") / "train")
    before = len(served.requests)
    reader = open_reader(manifest)
    assert len(manifest.blocks) > 8
    reader.expect(range(len(manifest.blocks)))
    for _ in range(2):
        for block in range(len(manifest.blocks)):
            reader.block(block)
    reader.close()
    assert 4 < served.most_at_once <= blocks.FETCHES_AT_ONCE
    assert len(served.requests) - before == len(manifest.blocks)
    # Another process, or another life of this one.
    count = len(served.requests)
    same_blocks(Manifest.load(place(served, tmp_path / "cache") / "train"), manifest)
    assert not [path for path in served.paths()[count:] if path.endswith((".tar", "blocks.npy"))]


@pytest.mark.parametrize("fault", [cut, status(500), status(503), status(429)])
def test_failures_that_pass_are_outlasted(tmp_path: Path, served: Served, fault) -> None:
    served.faults["corpus/train/000000.tar"] = first(3, fault)
    served.faults["manifest.json"] = first(2, fault)
    same_blocks(
        Manifest.load(place(served, tmp_path / "cache") / "train"),
        Manifest.load(tmp_path / "web" / "corpus" / "train"),
    )
    assert sum(path.endswith("manifest.json") for path in served.paths()) == 3


@pytest.mark.parametrize(
    ("fault", "said"),
    [(status(500), "responds with 500"), (status(403), "responds with 403"), (cut, "connection was lost")],
)
def test_failures_that_stay_are_named(
    tmp_path: Path, served: Served, monkeypatch: pytest.MonkeyPatch, fault, said: str
) -> None:
    monkeypatch.setattr(places, "LONGEST_WAIT_SECONDS", 0.01)
    manifest = Manifest.load(place(served, tmp_path / "cache") / "train")
    served.faults["000001.tar"] = fault
    reader = open_reader(manifest)
    block = int(np.searchsorted(manifest.blocks["shard"], 1))
    with pytest.raises(DataError, match=rf"{served.url}/corpus/train/000001.tar cannot be read: .*{said}"):
        reader.block(block)
    reader.close()


def test_a_bit_that_flips_on_the_way_is_fetched_again_once(tmp_path: Path, served: Served) -> None:
    remote = Manifest.load(place(served, tmp_path / "cache") / "train")
    served.faults["000001.tar"] = first(1, flipped)
    same_blocks(remote, Manifest.load(tmp_path / "web" / "corpus" / "train"))


def test_a_damaged_remote_shard_is_named_and_nothing_of_the_block_used(tmp_path: Path, served: Served) -> None:
    remote = Manifest.load(place(served, tmp_path / "cache") / "train")
    served.faults["000001.tar"] = flipped
    reader = open_reader(remote)
    block = int(np.searchsorted(remote.blocks["shard"], 1))
    reader.expect([block, block + 1])
    reader.block(0)
    for _ in range(2):
        with pytest.raises(DataError, match=rf"Block {block} of .* is damaged: .*000001.tar .*fetched twice"):
            reader.block(block)
    reader.close()
    assert not list((tmp_path / "cache").rglob(f"{block:x}"))


def test_a_block_damaged_in_the_cache_is_fetched_again(tmp_path: Path, served: Served) -> None:
    remote = Manifest.load(place(served, tmp_path / "cache") / "train")
    same_blocks(remote, remote)
    kept = sorted(path for path in (tmp_path / "cache" / "blocks").rglob("*") if path.is_file())
    assert len(kept) == len(remote.blocks) + 1
    for path in kept:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    again = Manifest.load(place(served, tmp_path / "cache") / "train")
    same_blocks(again, Manifest.load(tmp_path / "web" / "corpus" / "train"))


def test_a_tokenizer_damaged_in_the_cache_is_fetched_again_once(tmp_path: Path, served: Served) -> None:
    tokenizer = train(TokenizerTrainConfig(vocab_size=420), ["the quick brown fox jumps over a lazy dog"] * 20)
    tokenizer.save(tmp_path / "web" / "corpus" / "tokenizer")
    remote, kept = place(served, tmp_path / "cache"), tmp_path / "cache" / "tokenizers" / tokenizer.fingerprint
    assert load_tokenizer(remote, tokenizer.fingerprint).fingerprint == tokenizer.fingerprint
    (kept / "bigtx_tokenizer.json").write_text("{")
    assert load_tokenizer(remote, tokenizer.fingerprint).fingerprint == tokenizer.fingerprint
    assert Tokenizer.load(kept).fingerprint == tokenizer.fingerprint


def test_a_tokenizer_that_cannot_be_kept_needs_another_folder(tmp_path: Path, served: Served) -> None:
    tokenizer = train(TokenizerTrainConfig(vocab_size=420), ["the quick brown fox jumps over a lazy dog"] * 20)
    tokenizer.save(tmp_path / "web" / "corpus" / "tokenizer")
    barred = tmp_path / "barred"
    barred.write_text("")
    with pytest.raises(
        DataError, match=r"barred/tokenizers cannot keep .*make it writable, or set another data\.cache"
    ):
        load_tokenizer(place(served, barred), tokenizer.fingerprint)
    load_tokenizer(place(served, tmp_path / "another"), tokenizer.fingerprint)
    barred.unlink()
    load_tokenizer(place(served, barred), tokenizer.fingerprint)


def test_what_is_missing_or_of_another_size_is_refused_when_the_split_is_opened(tmp_path: Path, served: Served) -> None:
    train = tmp_path / "web" / "corpus" / "train"
    (train / "000001.tar").unlink()
    shard = train / "000000.tar"
    shard.write_bytes(shard.read_bytes()[:-512])
    with pytest.raises(DataError, match=r"000000.tar has [\d,]+ bytes instead of .*; .*000001.tar is missing"):
        Manifest.load(place(served, tmp_path / "cache") / "train")
    (train / "blocks.npy").unlink()
    with pytest.raises(DataError, match=r"blocks.npy is missing"):
        Manifest.load(place(served, tmp_path / "empty cache") / "train")
    (train / "manifest.json").unlink()
    with pytest.raises(DataError, match=r"has no manifest.json"):
        Manifest.load(place(served, tmp_path / "cache") / "train")
    assert not has_split(place(served, tmp_path / "cache"), "train")
    assert has_split(place(served, tmp_path / "cache"), "validation")


def test_a_changed_block_table_is_refused(tmp_path: Path, served: Served) -> None:
    served.faults["blocks.npy"] = flipped
    with pytest.raises(DataError, match=r"blocks\.npy was changed or damaged"):
        Manifest.load(place(served, tmp_path / "cache") / "train")


def test_a_corpus_prepared_anew_shares_nothing_with_the_old_one(tmp_path: Path, served: Served, make_corpus) -> None:
    remote = Manifest.load(place(served, tmp_path / "cache") / "train")
    same_blocks(remote, remote)
    for path in sorted((tmp_path / "web" / "corpus").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    make_corpus(tmp_path / "web" / "corpus", num_documents=80, seed=7)
    same_blocks(
        Manifest.load(place(served, tmp_path / "cache") / "train"),
        Manifest.load(tmp_path / "web" / "corpus" / "train"),
    )


class Bucket:
    """An object store's file system, as far as it is asked: a local folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def cat_file(self, url: str, start: int | None = None, end: int | None = None) -> bytes:
        return self._path(url).read_bytes()[start:end]

    def info(self, url: str) -> dict[str, object]:
        return {"type": "file", "size": self._path(url).stat().st_size, "ETag": "1"}

    def _path(self, url: str) -> Path:
        return self._folder / url.removeprefix("s3://bucket/")


def test_a_bucket(tmp_path: Path, make_corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    make_corpus(tmp_path / "corpus")
    monkeypatch.setattr(buckets, "file_system", lambda _: Bucket(tmp_path))
    remote = RemotePath("s3://bucket/corpus", Cache(tmp_path / "cache"))
    same_blocks(Manifest.load(remote / "train"), Manifest.load(tmp_path / "corpus" / "train"))
    assert has_split(remote, "validation") and not has_split(remote, "test")


def cached_bytes(folder: Path) -> int:
    """What the cache holds now; other processes may remove files meanwhile, which then count as nothing."""
    total = 0
    for place, _, names in itertools.chain(os.walk(folder / "blocks"), os.walk(folder / "partial")):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                total += os.stat(os.path.join(place, name)).st_size
    return total


def read_all(url: str, cache_dir: Path, size: int, seed: int, ends: object) -> None:
    manifest = Manifest.load(RemotePath(url, Cache(cache_dir, size)))
    reader = open_reader(manifest)
    for block in np.random.default_rng(seed).permutation(len(manifest.blocks)).tolist():
        reader.expect([block])
        tokens, starts = reader.block(block)
        ends.put((block, tokens.tobytes() + starts.tobytes(), cached_bytes(cache_dir)))  # type: ignore[attr-defined]
    reader.close()
    ends.put(None)  # type: ignore[attr-defined]


def test_processes_share_a_bounded_cache(tmp_path: Path, served: Served) -> None:
    local = Manifest.load(tmp_path / "web" / "corpus" / "train")
    size = 8192  # Some ten of these blocks.
    assert sum(shard.size for shard in local.shards) > 2 * size
    context = multiprocessing.get_context("spawn")
    ends = context.Queue()
    arguments = f"{served.url}/corpus/train", tmp_path / "cache", size
    readers = [context.Process(target=read_all, args=(*arguments, seed, ends)) for seed in range(2)]
    for process in readers:
        process.start()
    largest = max(np.diff([local.block_range(block) for block in range(len(local.blocks))]).tolist())[0]
    expected = open_reader(local)
    running = len(readers)
    while running:
        found = ends.get(timeout=60)
        if found is None:
            running -= 1
            continue
        block, content, used = found
        assert content == b"".join(part.tobytes() for part in expected.block(block))
        assert used <= size + len(readers) * largest
    for process in readers:
        process.join()
        assert process.exitcode == 0
    assert cached_bytes(tmp_path / "cache") <= size


def test_what_was_used_last_is_kept(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 1000)

    def get(name: str) -> bool:
        fetched = []
        content = cache.get(f"a/{name}", lambda: fetched.append(name) or name.encode() * 100, lambda _: True)
        assert bytes(content) == name.encode() * 100
        return bool(fetched)

    now = time.time()
    for age, name in enumerate("123456789"):
        assert get(name)
        os.utime(tmp_path / "blocks" / "a" / name, (now, now - 100 + age))
    assert not get("1")
    for name in "xyz":
        assert get(name)
    assert not get("1") and not get("z")
    assert get("2")


def test_a_cache_without_room_or_rights_is_done_without(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    none = Cache(tmp_path / "none", 0)
    (tmp_path / "file").write_text("")
    barred = Cache(tmp_path / "file", 1000)
    for cache in (none, barred, none, barred):
        assert cache.get("a/b", lambda: b"content", lambda _: True) == b"content"
    assert "".join(capsys.readouterr()).count("cannot keep remote data") == 1
    for advised in (Cache(tmp_path / "another", 1000), Cache(tmp_path / "file", 6)):
        assert bytes(advised.get("a/b", lambda: b"content", lambda _: True)) == b"content"
    (tmp_path / "file").unlink()
    assert bytes(barred.get("a/b", lambda: b"content", lambda _: True)) == b"content"
    assert cached_bytes(tmp_path / "another") == cached_bytes(tmp_path / "file") == 7
    assert "cannot keep" not in "".join(capsys.readouterr())
    assert cached_bytes(tmp_path / "none") == 0
    with pytest.raises(DamagedError):
        none.get("a/b", lambda: b"content", lambda _: False)


@pytest.mark.parametrize(
    "url",
    [
        "pipe:touch canary",
        "file:///etc/passwd",
        "ftp://host/corpus",
        "simplecache::https://host/corpus",
        "https://name:word@host/corpus",
        "s3://",
    ],
)
def test_other_urls_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError):
        as_place(url)
    assert not (tmp_path / "canary").exists()


def test_a_missing_package_is_named(tmp_path: Path) -> None:
    try:
        import gcsfs  # noqa: F401
    except ImportError:
        with pytest.raises(DataError, match=r"pip install 'bigtx\[gs\]'"):
            Manifest.load(RemotePath("gs://bucket/corpus/train", Cache(tmp_path)))
    else:
        pytest.skip("gcsfs is installed")
