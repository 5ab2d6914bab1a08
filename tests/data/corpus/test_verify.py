"""`bigtx data verify | stats | inspect`, and what each kind of damage is found by."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import pickle
import random
import re
import shutil
import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import xxhash
from corpora import DAMAGE, END_ID, write_split
from doors import TINY, bigtx, losses, pretrain
from servers import flipped, serve

from bigtx.cli import main
from bigtx.config.schema import TokenizerTrainConfig
from bigtx.data.corpus import verify as verify_module
from bigtx.data.corpus.blocks import BlockReader
from bigtx.data.corpus.inspect import facts, length_bins, read_sample
from bigtx.data.corpus.manifest import Manifest
from bigtx.data.corpus.verify import verify
from bigtx.data.storage.places import as_place
from bigtx.data.workers import Workers
from bigtx.tokenizer.tokenizer import Tokenizer
from bigtx.tokenizer.train import train
from bigtx.utils.errors import DataError
from bigtx.utils.files import write_sealed

WORDS = [f"{a}{b}{c}" for a in "bdklmnprst" for b in "aeiou" for c in ("", "n", "r", "st")]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of two splits in several shards, with its tokenizer."""
    folder = tmp_path_factory.mktemp("whole") / "corpus"
    draw = random.Random(1)
    texts = [" ".join(draw.choices(WORDS, k=draw.randrange(3, 60))) for _ in range(300)]
    tokenizer = train(TokenizerTrainConfig(vocab_size=420), texts)
    tokenizer.save(folder / "tokenizer")
    documents = [np.array([*ids, tokenizer.end_id]) for ids in tokenizer.encode_batch(texts)]
    assert tokenizer.end_id == 3
    settings = {"block_tokens": 512, "shard_size": 8192, "vocab_size": 420, "fingerprint": tokenizer.fingerprint}
    write_split(folder / "train", [documents[20:]], split="train", **settings)
    write_split(folder / "validation", [documents[:20]], split="validation", **settings)
    return folder


@pytest.fixture
def corpus_copy(tmp_path: Path, whole: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "corpus"))


def run(*arguments: str) -> int:
    return main(["data", *arguments])


@pytest.mark.parametrize("processes", ["1", "2"])
def test_a_whole_corpus_is_as_it_was_written(whole: Path, capsys: pytest.CaptureFixture[str], processes: str) -> None:
    assert run("verify", str(whole), "--processes", processes) == 0
    manifests = [Manifest.load(whole / split) for split in ("train", "validation")]
    shards, blocks = (sum(len(getattr(m, part)) for m in manifests) for part in ("shards", "blocks"))
    assert f"{whole} is as it was written: {shards} shards, {blocks} blocks" in capsys.readouterr().out


def test_every_flipped_byte_is_found(corpus_copy: Path) -> None:
    shard = corpus_copy / "train" / "000001.tar"
    content = shard.read_bytes()
    places = [0, 130, 520, 700, len(content) - 1, *np.random.default_rng(0).integers(0, len(content), 20).tolist()]
    for place in places:
        shard.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        problems = verify(as_place(corpus_copy), 1).problems
        assert len(problems) >= 2 and all("000001.tar" in problem for problem in problems)
        assert any("SHA-256" in problem for problem in problems)
        assert any("block" in problem for problem in problems) or place >= len(content) - 1024


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_shards_are_named_by_verify(corpus_copy: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    change, said = DAMAGE[kind]
    change(corpus_copy / "train" / "000001.tar")
    assert run("verify", str(corpus_copy), "--processes", "1") == 2
    told = capsys.readouterr().err
    assert "DataError" in told and "000001.tar" in told and any(part in told for part in said.split("|")), told


@pytest.mark.dist
@pytest.mark.parametrize(
    "kind", [kind if kind in ("payload", "missing") else pytest.param(kind, marks=pytest.mark.slow) for kind in DAMAGE]
)
def test_damaged_shards_end_a_training_and_are_named(corpus_copy: Path, tmp_path: Path, kind: str) -> None:
    change, said = DAMAGE[kind]
    change(corpus_copy / "train" / "000001.tar")
    done = pretrain(*TINY, f"data.sources.a.path={corpus_copy}", f"run_dir={tmp_path / 'run'}", "train.max_steps=1000")
    assert done.returncode == 2, done.stdout + done.stderr
    assert "000001.tar" in done.stderr and any(part in done.stderr for part in said.split("|")), done.stderr
    assert "Traceback" not in done.stdout + done.stderr


def rewrite_block(folder: Path, block: int, change) -> None:
    """Change a block's bytes, and every hash with it: what is wrong is the content alone."""
    manifest = Manifest.load(folder)
    blocks, shard = np.array(manifest.blocks), int(manifest.blocks[block]["shard"])
    begin, end = manifest.block_range(block)
    path = folder / manifest.shards[shard].name
    content = bytearray(path.read_bytes())
    content[begin:end] = change(bytes(content[begin:end]))
    path.write_bytes(content)
    blocks[block]["checksum"] = xxhash.xxh3_64_intdigest(bytes(content[begin:end]))
    np.save(folder / "blocks.npy", blocks)
    raw = json.loads((folder / "manifest.json").read_text())
    raw["blocks_sha256"] = hashlib.sha256((folder / "blocks.npy").read_bytes()).hexdigest()
    raw["shards"][shard]["sha256"] = hashlib.sha256(content).hexdigest()
    write_sealed(folder / "manifest.json", raw)


def with_token(place: int, token: int):
    def change(content: bytes) -> bytes:
        at = 640 + 2 * place
        return content[:at] + token.to_bytes(2, "little") + content[at + 2 :]

    return change


def renamed(content: bytes) -> bytes:
    info = tarfile.TarInfo.frombuf(content[:512], "utf-8", "strict")
    info.name = "../../000000.tokens.npy"
    return info.tobuf(tarfile.USTAR_FORMAT) + content[512:]


def pickled(content: bytes) -> bytes:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|O", "fortran_order": False, "shape": (512,)})
    return content[:512] + header.getvalue().ljust(128, b"\n")[:128] + content[640:]


@pytest.mark.parametrize(
    ("block", "change", "said"),
    [
        (1, with_token(7, 9999), "has the id 9999, but the vocabulary has 420"),
        (1, with_token(7, 420), "has the id 420, but the vocabulary has 420"),
        (1, with_token(7, 3), "do not start where the previous ones end"),
        (1, renamed, "the member '../../000000.tokens.npy'"),
        (1, pickled, "an array .* of object"),
        (0, with_token(511, 3), "unlike the end of the previous block"),
    ],
)
def test_wrong_content_with_right_hashes_is_found(corpus_copy: Path, block: int, change, said: str) -> None:
    rewrite_block(corpus_copy / "train", block, change)
    problems = verify(as_place(corpus_copy), 1).problems
    assert problems
    assert any(re.search(said, problem) for problem in problems), problems


def test_every_header_of_a_block_that_cannot_be_read_is_named(corpus_copy: Path) -> None:
    manifest = Manifest.load(corpus_copy / "train")
    docs = int(manifest.blocks["docs_offset"][1])
    bad = b"\xff" * 640
    rewrite_block(corpus_copy / "train", 1, lambda content: bad + content[640:docs] + bad + content[docs + 640 :])
    problems = "\n".join(verify(as_place(corpus_copy), 1).problems)
    assert "the headers of 000001.tokens.npy cannot be read" in problems
    assert "the headers of 000001.docs.npy cannot be read" in problems


@pytest.mark.parametrize(("asked", "processes"), [(0, 3), (2, 2), (1000, 1000)])
def test_a_process_for_each_core_or_as_many_as_are_asked_for(
    whole: Path, monkeypatch: pytest.MonkeyPatch, asked: int, processes: int
) -> None:
    """But no more than there are shards. The seconds are those of the work."""
    made: list[int] = []

    def workers(number: int, *others: Any) -> Workers:
        made.append(number)
        return Workers(1, *others)

    monkeypatch.setattr(verify_module, "Workers", workers)
    monkeypatch.setattr(verify_module, "num_cores", lambda: 3)
    times = itertools.chain([100.0], itertools.repeat(104.0))
    monkeypatch.setattr(verify_module, "time", SimpleNamespace(monotonic=lambda: next(times)))
    verified = verify(as_place(whole), asked)
    assert made == [min(processes, verified.num_shards)] and verified.num_shards > 3
    assert verified.seconds == 4.0


def test_the_end_of_the_last_document_is_missed(corpus_copy: Path) -> None:
    """A split whose last token ends no document, and one of which the last shards are named no longer."""
    folder = corpus_copy / "train"
    manifest = Manifest.load(folder)
    last = len(manifest.blocks) - 1
    rewrite_block(folder, last, with_token(int(manifest.blocks[last]["tokens"]) - 1, 5))
    assert verify(as_place(corpus_copy), 1).problems == [f"{folder}: the last document has no end"]


def test_a_document_of_several_blocks(corpus_copy: Path) -> None:
    """A block in which no document starts."""
    manifest = Manifest.load(corpus_copy / "train")
    shutil.rmtree(corpus_copy / "train")
    documents = [np.array([*[5] * (length - 1), 3]) for length in (1500, 40)]
    settings = {"block_tokens": 512, "shard_size": 8192, "fingerprint": manifest.tokenizer_fingerprint}
    write_split(corpus_copy / "train", [documents], split="train", vocab_size=420, **settings)
    assert Manifest.load(corpus_copy / "train").blocks["documents"].tolist() == [1, 0, 1, 0]
    assert verify(as_place(corpus_copy), 1).problems == []


def test_shards_follow_each_other(corpus_copy: Path) -> None:
    """An end where the next shard goes on with a document, or none where it begins with one."""
    folder = corpus_copy / "train"
    manifest = Manifest.load(folder)
    last = int(np.searchsorted(manifest.blocks["shard"], 1)) - 1
    has_end = BlockReader(manifest).block(last)[0][-1] == manifest.end_id
    rewrite_block(folder, last, with_token(int(manifest.blocks[last]["tokens"]) - 1, 5 if has_end else 3))
    said = "000001.tar: a document starts there, or does not, unlike the end of the previous shard"
    assert verify(as_place(corpus_copy), 1).problems == [f"{folder}/{said}"]


def test_a_manifest_without_its_last_shard(corpus_copy: Path) -> None:
    folder = corpus_copy / "train"
    manifest = Manifest.load(folder)
    blocks, left = np.array(manifest.blocks), len(manifest.shards) - 1
    tokens = np.concatenate([BlockReader(manifest).block(block)[0] for block in range(len(blocks))])
    while tokens[int(blocks[blocks["shard"] < left]["tokens"].sum()) - 1] == manifest.end_id:
        left -= 1
    kept = blocks[blocks["shard"] < left]
    reseal(folder, kept, num_blocks=len(kept), shards=[vars(shard) for shard in manifest.shards[:left]])
    reseal(folder, kept, num_tokens=int(kept["tokens"].sum()), num_documents=int(kept["documents"].sum()))
    assert verify(as_place(corpus_copy), 1).problems == [f"{folder}: the last document has no end"]


def reseal(folder: Path, blocks: np.ndarray | bytes, **changes: Any) -> None:
    """Write a table, or the bytes of its file, and a manifest of which every hash is right."""
    if isinstance(blocks, bytes):
        (folder / "blocks.npy").write_bytes(blocks)
    else:
        np.save(folder / "blocks.npy", blocks)
    raw = json.loads((folder / "manifest.json").read_text())
    raw["blocks_sha256"] = hashlib.sha256((folder / "blocks.npy").read_bytes()).hexdigest()
    write_sealed(folder / "manifest.json", raw | changes)


TABLE = [
    ("shard", 1, "not in the order of their shards"),
    ("tokens", -1, "have different counts"),
    ("documents", 1, "have different counts"),
    ("documents", 1_000_000, "places outside its shards"),
    ("docs_offset", -1028, "places outside its shards"),
    ("offset", 512, r"block 1 \(bytes .* is damaged|not from byte"),
    ("offset", 512_000, "places outside its shards"),
    ("offset", 2, "places outside its shards"),
    ("checksum", 1, r"block 1 \(bytes .* is damaged"),
]
"""Fields of the block table, what is added to them, and what is said of it."""


@pytest.mark.parametrize(("field", "added", "said"), TABLE)
def test_a_wrong_table_with_right_hashes_is_found(corpus_copy: Path, field: str, added: int, said: str) -> None:
    folder = corpus_copy / "train"
    blocks = np.array(Manifest.load(folder).blocks)
    blocks[1][field] = int(blocks[1][field]) + added
    reseal(folder, blocks)
    problems = verify(as_place(corpus_copy), 1).problems
    assert any(re.search(said, problem) for problem in problems), problems


def npy(header: str, version: int = 1, magic: bytes = b"\x93NUMPY") -> bytes:
    return magic + bytes([version, 0]) + len(header).to_bytes(2, "little") + header.encode("latin-1")


BLOCKS_FILE = [
    b"",
    b"\x93NUMPY",
    b"\x93NUMPY\1\0\xff\xff",
    b"PK\3\4" + bytes(100),
    b"PK\5\6" + bytes(18),  # An archive without members.
    b"cos\nsystem\n(S'true'\ntR.",
    npy("{'descr': '|O', 'fortran_order': False, 'shape': (1,), }\n") + pickle.dumps([1]),
    npy("{'descr': '<u4', 'fortran_order': False, 'shape': (), }\n") + bytes(4),
    npy("{'descr': '<u4', 'fortran_order': False, 'shape': (-1,), }\n") + bytes(4),
    npy("{'descr': [('a', '<u4', (1 << 60,))], 'fortran_order': False, 'shape': (1,), }\n"),
    npy("{'descr': '<u4', 'fortran_order': False, 'shape': (1,), }\n", version=3),
    npy("[" * 9000),
    npy("{'descr': None}"),
    npy("\0\xff"),
    npy("if 1:\n    a\n  b\n"),
    npy("(1,"),
    npy("'''"),
]
"""Files in the place of a block table that none is."""


@pytest.mark.parametrize("content", BLOCKS_FILE, ids=range(len(BLOCKS_FILE)))
def test_what_is_no_table_is_refused(
    corpus_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    reseal(corpus_copy / "train", content)
    with serve(corpus_copy) as served:
        for place in (str(corpus_copy), served.url):
            with pytest.raises(DataError, match=r"manifest.json is damaged"):
                Manifest.load(as_place(f"{place}/train"))


def test_a_table_that_ends_early_is_refused(corpus_copy: Path) -> None:
    content = (corpus_copy / "train" / "blocks.npy").read_bytes()
    for length in range(0, len(content), 7):
        reseal(corpus_copy / "train", content[:length])
        with pytest.raises(DataError, match=r"manifest.json is damaged"):
            Manifest.load(corpus_copy / "train")


MANIFEST: dict[str, tuple[Any, str]] = {
    "format": ("other", "is not a manifest"),
    "format_version": (9, "format version 9"),
    "split": ("validation", "says that it is the split 'validation'"),
    "dtype": ("<u4", "."),
    "vocab_size": (500, "the manifest has 500 ids"),
    "end_id": (5, "the end id 5, its tokenizer 420 and 3"),
    "tokenizer_fingerprint": ("0" * 64, "tokenizer"),
    "block_tokens": (511, "block_tokens"),
    "num_blocks": (1, "records of"),
    "num_tokens": (1, "have different counts"),
    "num_documents": (1, "have different counts"),
    "blocks_sha256": ("0" * 64, "was changed or damaged"),
}
"""For each field of the manifest a wrong value, and what is said of it."""


@pytest.mark.parametrize("field", MANIFEST)
def test_a_wrong_manifest_with_a_right_hash_is_found(corpus_copy: Path, field: str) -> None:
    path = corpus_copy / "train" / "manifest.json"
    raw = json.loads(path.read_text())
    wrong, said = MANIFEST[field]
    write_sealed(path, raw | {field: wrong})
    problems = verify(as_place(corpus_copy), 1).problems
    assert any(re.search(said, problem) for problem in problems), problems


@pytest.mark.parametrize(
    ("field", "wrong", "said"),
    [
        ("name", "000000.tar", "."),
        ("name", "../000001.tar", "shard name"),
        ("size", 512, "bytes instead of|outside its shards"),
        ("sha256", "0" * 64, "SHA-256 is not the manifest's"),
    ],
)
def test_a_wrong_shard_with_a_right_hash_is_found(corpus_copy: Path, field: str, wrong: Any, said: str) -> None:
    path = corpus_copy / "train" / "manifest.json"
    raw = json.loads(path.read_text())
    raw["shards"][1][field] = wrong
    write_sealed(path, raw)
    problems = verify(as_place(corpus_copy), 1).problems
    assert any(re.search(said, problem) for problem in problems), problems


@pytest.mark.parametrize("field", ["num_bytes", "block_tokens", "recipe", "end_id", "sha256"])
def test_a_manifest_that_was_edited_is_refused(corpus_copy: Path, field: str) -> None:
    path = corpus_copy / "train" / "manifest.json"
    raw = json.loads(path.read_text())
    path.write_text(json.dumps(raw | {field: {"seed": 2} if field == "recipe" else 7}))
    (problem,) = verify(as_place(corpus_copy), 1).problems
    assert "does not have the" in problem


def test_all_problems_are_named_together(corpus_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    DAMAGE["payload"][0](corpus_copy / "train" / "000001.tar")
    (corpus_copy / "train" / "000002.tar").unlink()
    (corpus_copy / "validation" / "blocks.npy").write_bytes(b"")
    model = next((corpus_copy / "tokenizer").glob("*.model"))
    model.write_bytes(model.read_bytes() + b"\0")
    assert run("verify", str(corpus_copy), "--processes", "1") == 2
    told = capsys.readouterr().err
    for named in (
        "000001.tar: block",
        "000002.tar is missing",
        "validation/blocks.npy was changed",
        "corpus/tokenizer: ",
    ):
        assert named in told, told


def test_verify_reads_what_a_url_serves(
    corpus_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    with serve(corpus_copy.parent) as served:
        url = f"{served.url}/corpus"
        assert run("verify", url, "--processes", "1") == 0
        served.faults["000001.tar"] = flipped
        assert run("verify", url, "--processes", "1") == 2
        assert f"{url}/train/000001.tar: block" in capsys.readouterr().err
        served.faults.clear()
        assert run("stats", url) == 0 and run("inspect", url, "--samples", "1") == 0
        shown = capsys.readouterr().out
    assert run("inspect", str(corpus_copy), "--samples", "1") == 0
    local = capsys.readouterr().out
    assert local.replace(str(corpus_copy), url) in shown


def test_stats_in_words_and_as_json(corpus_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = corpus_copy / "train" / "manifest.json"
    manifest = json.loads(path.read_text())
    tokens, documents = manifest["num_tokens"], manifest["num_documents"]
    groups = [
        {"source": "wiki", "language": "de", "documents": documents - 30, "tokens": tokens - 700, "bytes": 5000},
        {"source": None, "language": None, "documents": 30, "tokens": 700, "bytes": 1400},
    ]
    write_sealed(path, manifest | {"groups": groups})
    assert run("stats", str(corpus_copy)) == 0
    shown = capsys.readouterr().out
    assert f"{documents:,}" in shown and "wiki" in shown and f"{700 / tokens:.2%}" in shown and "█" in shown
    assert next(line for line in shown.splitlines() if line.startswith("not known")).split()[-1] == "2.00"
    assert run("stats", str(corpus_copy), "--json") == 0
    figures = json.loads(capsys.readouterr().out)
    train_split, validation = figures["splits"]
    assert train_split["groups"] == groups and validation["groups"] == []
    assert (train_split["documents"], train_split["tokens"]) == (documents, tokens)
    assert sum(bar["documents"] for bar in train_split["lengths"]["histogram"]) == documents
    assert train_split["lengths"]["mean"] == pytest.approx(tokens / documents)


def test_the_lengths_are_those_of_the_first_blocks(tmp_path: Path) -> None:
    """Half a block for each document: 64 blocks have 128 of them, and where the last one ends is not known."""
    document = np.array([*range(4, 19), END_ID])
    manifest = write_split(tmp_path / "train", [[document] * 140], block_tokens=32, shard_size=8192)
    sample = read_sample(manifest)
    assert len(sample.tokens) == 64 * 32
    assert sample.lengths.tolist() == [16] * 127
    assert sample.document(5).tolist() == list(range(4, 19))


def test_lengths_are_counted_between_powers_of_two() -> None:
    bins = list(length_bins(np.array([4, 7, 8, 15, 16, 70])))
    assert bins == [(4, 7, 2), (8, 15, 2), (16, 31, 1), (32, 63, 0), (64, 127, 1)]


def test_the_split_that_was_asked_for_is_inspected(corpus_copy: Path) -> None:
    place = as_place(corpus_copy)
    for split in ("train", "validation"):
        shards = facts(place, split=split, num_samples=0, seed=1)["shards"]
        assert {Path(shard["path"]).parent.name for shard in shards} == {split}
    shutil.rmtree(corpus_copy / "validation")
    with pytest.raises(DataError, match=f"{place} has no split 'validation'; it has train"):
        facts(place, split="validation", num_samples=0, seed=1)


def test_there_must_be_a_corpus(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("verify", "stats", "inspect"):
        for path, said in ((tmp_path, "has no split"), (tmp_path / "none", "does not exist")):
            assert run(command, str(path)) == 2
            assert said in capsys.readouterr().err


@pytest.mark.dist
def test_from_text_to_a_verified_corpus_and_a_training_by_url(corpus: Path, tmp_path: Path) -> None:
    assert "is as it was written" in bigtx("data", "verify", str(corpus)).stdout
    with serve(corpus.parent) as served:
        settings = [f"data.cache_dir={tmp_path / 'cache'}", "train.max_steps=3", "track.wandb=off"]
        remote = f"{served.url}/{corpus.name}"
        done = pretrain(*TINY, f"data.sources.a.path={remote}", f"run_dir={tmp_path / 'run'}", *settings)
        assert done.returncode == 0, done.stdout + done.stderr
    assert "validation at step 3: a loss" in done.stdout
    assert sorted(losses(tmp_path / "run")) == [1, 2, 3]
    assert (
        Tokenizer.load(tmp_path / "run" / "tokenizer").fingerprint == Tokenizer.load(corpus / "tokenizer").fingerprint
    )
