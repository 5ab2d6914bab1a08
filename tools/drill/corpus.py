"""Faults of the data: shards that are missing, cut, flipped, empty or foreign, raw text that is broken."""

from __future__ import annotations

import random
import shutil
import signal
import sys
import time
from pathlib import Path

import forks
from corpora import DAMAGE, flip, write_shard
from doors import environment, losses

from drill.catalogue import fault
from drill.scene import Scene, Training, contents, expect

FLIPS = 100


def _damaged(scene: Scene, *kinds: str) -> list[str]:
    """Train on corpora with a damaged shard, and return what each message says."""
    seen = []
    for kind in kinds:
        corpus = Path(shutil.copytree(scene.corpus, scene.folder / f"corpus-{kind}"))
        change, words = DAMAGE[kind]
        change(corpus / "train" / "000001.tar")
        run = scene.training(f"data.sources.a.path={corpus}", "train.max_steps=400")
        end = run.run().refused("DataError", "000001.tar")
        expect(any(word in end.err for word in words.split("|")), f"{kind}: the cause is not named; {end.tail()}")
        end = scene.run("data", "verify", str(corpus)).refused("000001.tar")
        seen.append(kind)
    return seen


@fault(12, "shard-missing", "refused at the start, named")
def shard_missing(scene: Scene) -> str:
    """A shard missing."""
    _damaged(scene, "missing")
    expect(not any(scene.folder.glob("run-*/metrics.jsonl")), "the run began")
    return "refused at the start by pretrain and `bigtx data verify`, the shard is named"


@fault(13, "shard-cut", "found by size or hash, never a partial sample")
def shard_cut(scene: Scene) -> str:
    """A shard truncated: at a member's border, inside a member, and to nothing."""
    _damaged(scene, "member", "inside", "empty")
    expect(not any(scene.folder.glob("run-*/metrics.jsonl")), "the run began")
    return "3 of 3 refused at the start, the shard is named"


@fault(
    14,
    "shard-flipped",
    "found by the checksum of the block when it is first read, and by the hash of the shard in `bigtx data verify`",
)
def shard_flipped(scene: Scene) -> str:
    """One bit flipped in a shard: in a header, in the payload, and at 100 random places."""
    from bigtx.data.corpus.blocks import BlockReader
    from bigtx.data.corpus.manifest import Manifest
    from bigtx.data.corpus.verify import verify
    from bigtx.data.storage.places import as_place
    from bigtx.utils.errors import DataError

    _damaged(scene, "header", "payload")
    corpus = Path(shutil.copytree(scene.corpus, scene.folder / "corpus"))
    shard, generator, by_read, by_verify = corpus / "train" / "000001.tar", random.Random(1), 0, 0
    for _ in range(FLIPS):
        place = generator.randrange(shard.stat().st_size)
        flip(place)(shard)
        manifest = Manifest.load(corpus / "train")
        reader = BlockReader(manifest)
        try:
            for block in range(len(manifest.blocks)):
                reader.block(block)
        except DataError as error:
            by_read += "000001.tar" in str(error)
        by_verify += bool(verify(as_place(corpus), 1).problems)
        flip(place)(shard)
    expect(by_verify == FLIPS, f"verify found {by_verify} of {FLIPS}")
    padding = 10240 / shard.stat().st_size  # No block contains the end of a tar archive.
    expect(by_read >= FLIPS * (1 - 2 * padding) - 5, f"reading found {by_read} of {FLIPS}")
    return f"{by_read} of {FLIPS} at the first read, {by_verify} of {FLIPS} by verify"


@fault(
    15,
    "raw-text",
    "counted, listed with file and line, skipped under a limit; after a kill the same choice again, with the same "
    "bytes",
)
def raw_text(scene: Scene) -> str:
    """Broken JSON and invalid UTF-8 in raw data."""
    lines = [f'{{"text": "text {number} of many, {number * 7919 % 1000}"}}\n'.encode() for number in range(20000)]
    lines[70], lines[9000] = b'{"text": \n', b'{"text": "\xff"}\n'
    raw = scene.folder / "raw.jsonl"
    raw.write_bytes(b"".join(lines))
    tokenizer = scene.stage.folder / "texts" / "tokenizer"
    words = [f"input.paths=[{raw}]", f"tokenizer={tokenizer}", "num_processes=1", "block_tokens=4096"]
    outputs = [scene.folder / "straight", scene.folder / "killed"]
    scene.run("data", "prepare", *words, f"output={outputs[0]}").succeeded()
    command = [sys.executable, "-m", "bigtx", "data", "prepare", *words, f"output={outputs[1]}"]
    process = forks.start(command, cwd=scene.folder, env=environment(), start_new_session=True)
    work = Path(f"{outputs[1]}.partial")
    while process.poll() is None and not work.exists():
        time.sleep(0.001)
    time.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    process.wait()
    expect(not outputs[1].exists(), "not killed in the middle")
    scene.run("data", "prepare", *words, f"output={outputs[1]}").succeeded()
    first, second = (contents(folder / "train") for folder in outputs)
    expect(first == second, "other bytes after the kill")
    rejects = [(folder / "rejects.jsonl").read_text() for folder in outputs]
    expect(rejects[0] == rejects[1] and rejects[0].count("\n") == 2, f"rejects: {rejects}")
    expect('"line": 71' in rejects[0] and '"line": 9001' in rejects[0], rejects[0])
    lines[100:400] = [b"{\n"] * 300
    raw.write_bytes(b"".join(lines))
    scene.run("data", "prepare", *words, f"output={scene.folder / 'too-many'}").refused("input.max_rejects", str(raw))
    return "2 of 2 listed with file and line; too many are refused; the same bytes after kill -9"


def _foreign(scene: Scene, *shards: Path, ranks: int = 2) -> Training:
    """Return a training on shards that bigtx did not write."""
    paths = ",".join(map(str, shards))
    run = scene.training(
        f"data.foreign.paths=[{paths}]",
        f"data.foreign.tokenizer={scene.stage.folder / 'texts' / 'tokenizer'}",
        "train.max_steps=8",
        ranks=ranks,
    )
    del run.settings["data.sources.a.path"]
    return run


def _shard(scene: Scene, name: str, *members: tuple[str, bytes]) -> Path:
    return write_shard(scene.folder / name, members)


def _texts(count: int, start: int = 0) -> list[tuple[str, bytes]]:
    return [(f"{number:05d}.txt", f"text {number} of many ".encode() * 20) for number in range(start, start + count)]


@fault(16, "shard-empty", "refused, or the same number of steps on all ranks")
def shard_empty(scene: Scene) -> str:
    """An empty shard; fewer shards than ranks."""
    good, empty = _shard(scene, "good.tar", *_texts(100)), _shard(scene, "empty.tar")
    _foreign(scene, good, empty).run().refused("empty.tar")
    empty.write_bytes(b"")
    _foreign(scene, good, empty).run().refused("empty.tar")
    run = _foreign(scene, good, ranks=2)
    end = run.run()
    if end.status == 0:
        expect(sorted(losses(run.run_dir)) == list(range(1, 9)), "not all steps were made")
        return "empty shards are refused by name; one shard for two ranks: all steps were made"
    end.refused("shard")
    return "empty shards, and fewer shards than ranks, are refused"


@fault(17, "shard-keys", "refused, named")
def shard_keys(scene: Scene) -> str:
    """Keys that are interleaved or twice in a foreign shard."""
    good = _shard(scene, "good.tar", *_texts(40))
    twice = _shard(scene, "twice.tar", *_texts(3), *_texts(1))
    a, b = _texts(2)
    interleaved = _shard(scene, "interleaved.tar", a, b, ("00000.json", b"{}"), ("00001.json", b"{}"))
    for bad in (twice, interleaved):
        _foreign(scene, bad, good).run().refused(bad.name, "appears again after others")
    return "2 of 2 refused, with the shard and the key"


@fault(29, "members-with-code", "refused; never run")
def members_with_code(scene: Scene) -> str:
    """`.pyd`, `.pkl` and `.pth` members; `pipe:` URLs; GOPEN_REWRITE."""
    canary = scene.folder / "canary"
    code = f"cos\nsystem\n(S'touch {canary}'\ntR.".encode()
    good, tried = _shard(scene, "good.tar", *_texts(100)), 0
    for suffix in ("pyd", "pkl", "pth", "pickle", "pt"):
        bad = _shard(scene, f"{suffix}.tar", *_texts(3), (f"00002.{suffix}", code))
        _foreign(scene, bad, good).run().refused(bad.name, "may run code when loaded")
        tried += 1
    for url in (f"pipe:touch {canary}", f"pipe://touch {canary}"):
        _foreign(scene, Path(url)).run().refused("data.foreign.paths")
        tried += 1
    run = _foreign(scene, good, ranks=1)
    run.environment = {"GOPEN_REWRITE": f"{scene.folder}=pipe:touch {canary} ", "USE_GOPEN": "1"}
    run.run().succeeded()
    expect(not canary.exists(), "code ran")
    return f"{tried} of {tried} refused, GOPEN_REWRITE has no effect, no code ran"


@fault(
    30,
    "members-outside",
    "nothing is written outside: `..` and links are refused with their names, a leading `/` is removed",
)
def members_outside(scene: Scene) -> str:
    """`../`, absolute and link members in a tar."""
    import io
    import tarfile

    escaped = Path("/tmp/bigtx-drill-escaped.txt")
    inputs = scene.folder / "inputs"
    inputs.mkdir()
    shard = inputs / "a.tar"
    with tarfile.open(shard, "w") as archive:
        for name, kind in (("../../out.txt", None), ("link.txt", tarfile.SYMTYPE), ("hard.txt", tarfile.LNKTYPE)):
            info = tarfile.TarInfo(name)
            if kind:
                info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
        for name, content in ((str(escaped), b"absolute"), *_texts(30)):
            info = tarfile.TarInfo(name)
            info.name, info.size = name, len(content)
            archive.addfile(info, io.BytesIO(content))
    before = sorted(path for path in scene.folder.rglob("*"))
    tokenizer = scene.stage.folder / "texts" / "tokenizer"
    words = [f"input.paths=[{inputs}]", f"tokenizer={tokenizer}", f"output={inputs.parent / 'made'}"]
    end = scene.run("data", "prepare", *words, "input.max_rejects=1", "num_processes=1").succeeded()
    after = sorted(path for path in scene.folder.rglob("*") if "made" not in path.parts)
    rejects = (scene.folder / "made" / "rejects.jsonl").read_text()
    expect("out.txt" in rejects and "leads out" in rejects, f"`..` is not named: {rejects}")
    expect("link.txt" in rejects and "hard.txt" in rejects, f"links are not named: {rejects}; {end.tail()}")
    expect(before == after and not escaped.exists(), "a file was written outside")
    for name in ("../../out.txt", "../out.txt"):
        bad = _shard(scene, "bad.tar", (name, b"text"), *_texts(40))
        _foreign(scene, bad, ranks=1).run().refused("bad.tar", "leads out of the archive")
    return "named as rejects by `data prepare`, refused by pretrain; nothing was written outside"


@fault(42, "corpus-manifest", "refused: the manifest has a hash of itself")
def corpus_manifest(scene: Scene) -> str:
    """A byte of the corpus's manifest.json changed."""
    tried = 0
    for key in ("num_bytes", "block_tokens", "split", "num_tokens", "seed"):
        corpus = Path(shutil.copytree(scene.corpus, scene.folder / f"corpus-{key}"))
        path = corpus / "train" / "manifest.json"
        text = path.read_text()
        place = text.index(f'"{key}"') + len(key) + 4
        other = str((int(text[place]) + 1) % 10) if text[place].isdigit() else "z"
        place += not text[place].isdigit()
        path.write_text(text[:place] + other + text[place + 1 :])
        for end in (scene.training(f"data.sources.a.path={corpus}").run(), scene.run("data", "verify", str(corpus))):
            end.refused("manifest.json")
        tried += 1
    return f"{tried} of {tried} refused by pretrain and by `bigtx data verify`"
