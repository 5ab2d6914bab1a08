"""Text shards from elsewhere: rows packed on the fly, and every way in which a shard may be broken."""

from __future__ import annotations

import gzip
import io
import itertools
import json
import lzma
import os
import random
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from corpora import write_shard
from doors import TINY, losses, pretrain
from servers import first, serve, status

from bigtx.config.schema import DataConfig, ForeignConfig, TokenizerTrainConfig
from bigtx.data.stream.foreign import RowStream, check_shards, expand, num_workers, read_texts
from bigtx.data.stream.foreign_loader import ForeignLoader
from bigtx.data.stream.loader import Division
from bigtx.data.stream.rows import IGNORED_LABEL, Batch
from bigtx.tokenizer.tokenizer import Tokenizer
from bigtx.tokenizer.train import train
from bigtx.utils.errors import DataError
from bigtx.utils.processes import children

LENGTH = 32
WORDS = [f"{a}{b}{c}" for a in "bdklmnprst" for b in "aeiou" for c in ("", "n", "r", "st")]


def make_texts(count: int, seed: int = 0) -> list[str]:
    generator = random.Random(seed)
    return [f"{number} " + " ".join(generator.choices(WORDS, k=generator.randrange(3, 30))) for number in range(count)]


def write_shards(folder: Path, texts: list[str], count: int) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    return [
        str(
            write_shard(
                folder / f"{shard:03d}.tar",
                [(f"{number:05d}.txt", text.encode()) for number, text in enumerate(texts) if number % count == shard],
            )
        )
        for shard in range(count)
    ]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train(TokenizerTrainConfig(vocab_size=420), make_texts(200)).save(folder)
    return folder


def stream(config: ForeignConfig, monkeypatch: pytest.MonkeyPatch, **place: int) -> RowStream:
    whose = {"rank": 0, "world_size": 1, "worker": 0, "num_workers": 1} | place
    for name, value in whose.items():
        monkeypatch.setenv(name.upper(), str(value))
    return RowStream(config, LENGTH, 1, **whose)


@pytest.mark.parametrize(
    ("shards", "asked", "world_size", "expected"),
    [(8, 3, 2, 3), (8, 4, 2, 4), (8, 9, 2, 4), (8, 9, 3, 2), (1, 5, 2, 1)],
)
def test_a_rank_has_no_more_workers_than_shards(shards: int, asked: int, world_size: int, expected: int) -> None:
    config = ForeignConfig(paths=[f"https://host/{{1..{shards}}}.tar"], num_workers=asked)
    assert num_workers(config, world_size) == expected


def texts_of_rows(rows: list[tuple[np.ndarray, np.ndarray]], tokenizer: Tokenizer) -> list[str]:
    """The whole documents in consecutive rows."""
    tokens = np.concatenate([row[:-1] for row, _ in rows])
    starts = np.concatenate([LENGTH * i + s[s < LENGTH] for i, (_, s) in enumerate(rows)])
    assert np.array_equal(starts[1:], np.flatnonzero(tokens == tokenizer.end_id)[: len(starts) - 1] + 1)
    return [tokenizer.decode(tokens[a : b - 1].tolist()) for a, b in itertools.pairwise(starts)]


def test_rows_hold_every_text_once_an_epoch_in_another_order(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = make_texts(120)
    config = ForeignConfig(paths=write_shards(tmp_path, texts, 4), tokenizer=str(tokenizer), shuffle_buffer=20)
    rows = stream(config, monkeypatch).rows()
    found = texts_of_rows([next(rows) for _ in range(600)], Tokenizer.load(tokenizer))
    assert len(found) > 240
    epochs = [found[:120], found[120:240]]
    assert all(sorted(epoch) == sorted(texts) for epoch in epochs)
    assert epochs[0] != epochs[1] and epochs[0] != texts
    again = stream(config, monkeypatch).rows()
    assert texts_of_rows([next(again) for _ in range(600)], Tokenizer.load(tokenizer)) == found


def test_consecutive_rows_share_one_token_as_label_and_input(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ForeignConfig(paths=write_shards(tmp_path, make_texts(50), 1), tokenizer=str(tokenizer))
    rows = stream(config, monkeypatch).rows()
    previous = next(rows)[0]
    for _ in range(200):
        current = next(rows)[0]
        assert len(current) == LENGTH + 1 and current[0] == previous[-1]
        previous = current


def test_ranks_and_workers_share_the_shards_of_an_epoch(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = make_texts(70)
    config = ForeignConfig(paths=write_shards(tmp_path, texts, 7), tokenizer=str(tokenizer), shuffle_buffer=0)
    found: list[str] = []
    for rank in range(2):
        for worker in range(2):
            part = stream(config, monkeypatch, rank=rank, world_size=2, worker=worker, num_workers=2)
            found += list(part._texts(0))
    assert sorted(found) == sorted(texts)


def load(
    config: ForeignConfig, num_steps: int, *, start: int = 0, rank: int = 0, world_size: int = 1, mask: bool = False
) -> list[Batch]:
    loader = ForeignLoader(
        DataConfig(foreign=config, document_mask=mask),
        Division(global_batch_size=8, micro_batch_size=2, rank=rank, world_size=world_size),
        sequence_length=LENGTH,
        seed=1,
        start_sequence=start,
        pad_id=0,
    )
    workers = {process.pid for process in loader._workers._processes}
    try:
        batches = [batch for _ in range(num_steps) for batch in next(loader)]
        assert loader.next_sequence == start + 8 * num_steps
        return batches
    finally:
        loader.close()
        assert workers and not workers & set(children(os.getpid())), "a worker outlives the loader"


def test_batches_resume_where_they_were(tmp_path: Path, tokenizer: Path) -> None:
    paths = write_shards(tmp_path, make_texts(200), 5)
    config = ForeignConfig(paths=paths, tokenizer=str(tokenizer), num_workers=2)
    straight = load(config, 12, mask=True)
    assert straight[0].tokens.shape == (2, LENGTH) and straight[0].tokens.dtype.is_signed
    assert [i for batch in straight for i in batch.sequence_ids.tolist()] == list(range(96))
    resumed = load(config, 5, start=56, mask=True)
    for expected, found in zip(straight[28:], resumed, strict=True):
        for name in ("tokens", "labels", "positions", "segment_ids", "sequence_ids"):
            assert getattr(expected, name).equal(getattr(found, name))
    end = Tokenizer.load(tokenizer).end_id
    for batch in straight:
        # Nothing is predicted across a border, and positions begin anew behind one.
        assert batch.labels[batch.tokens == end].eq(IGNORED_LABEL).all()
        assert batch.positions is not None and batch.positions[:, 1:][batch.tokens[:, :-1] == end].eq(0).all()


def test_text_in_json_over_http_with_braces(tmp_path: Path, tokenizer: Path) -> None:
    texts = make_texts(40)
    (tmp_path / "web").mkdir()
    for shard in range(2):
        members = [
            (f"a/{number}.json", json.dumps({"id": number, "body": text}).encode())
            for number, text in enumerate(texts)
            if number % 2 == shard
        ]
        write_shard(tmp_path / "web" / f"{shard:04d}.tar", members)
    settings = {"tokenizer": str(tokenizer), "member": "json", "text_field": "body"}
    local = ForeignConfig(paths=[f"{tmp_path}/web/{{0000..0001}}.tar"], **settings)
    with serve(tmp_path / "web") as served:
        remote = ForeignConfig(paths=[f"{served.url}/{{0000..0001}}.tar"], **settings)
        served.faults["0001.tar"] = first(1, status(503))
        assert check_shards(remote, 2) == check_shards(local, 2)
        here, there = load(local, 3), load(remote, 3)
    assert all(a.tokens.equal(b.tokens) for a, b in zip(here, there, strict=True))


def cut_at_a_border(content: bytes) -> bytes:
    return content[: 2 * 1024]


def cut_inside(content: bytes) -> bytes:
    return content[: 3 * 1024 + 700]


def without_second_end(content: bytes) -> bytes:
    return content[:10240]


def flip_header(content: bytes) -> bytes:
    return content[:2048] + bytes([content[2048] ^ 1]) + content[2049:]


def two_archives(content: bytes) -> bytes:
    return content + content


def plain(text: str, number: int) -> tuple[str, bytes]:
    return f"{number}.txt", text.encode()


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """One good shard and one to be broken: ten samples of less than 512 bytes."""
    write_shard(tmp_path / "good.tar", [plain("good", number) for number in range(5)])
    return write_shard(tmp_path / "broken.tar", [plain("some text", number) for number in range(10)])


def damage(shard: Path, how: object) -> None:
    if how is None:
        shard.unlink()
    elif callable(how):
        shard.write_bytes(how(shard.read_bytes()))
    else:
        write_shard(shard, how)  # type: ignore[arg-type]


LINK = tarfile.TarInfo("9.txt")
LINK.type, LINK.linkname = tarfile.SYMTYPE, "/etc/passwd"

BROKEN_AT_START = [
    (None, "is missing|no such file"),
    (lambda _: b"", "is empty"),
    (cut_at_a_border, "is not a complete tar"),
    (cut_inside, "is not a complete tar"),
    (lambda content: content[:-1], "is not a complete tar"),
]
BROKEN_INSIDE = [
    (flip_header, "damaged at byte 2,048"),
    (two_archives, "bytes after its end"),
    (lambda _: bytes(1 << 14), "is refused: no members"),
    (lambda _: b"\x1f\x8b" + bytes(10238), "not a tar archive"),
    ([plain("a", 1), plain("b", 2), plain("c", 1)], "'1' appears again after others"),
    ([("1.txt", b"a"), ("2.txt", b"b"), ("1.json", b"{}"), ("2.json", b"{}")], "'1' appears again after others"),
    ([plain("a", 1), plain("b", 1)], "1.txt is refused: a second member of this name"),
    ([("../../escaped.txt", b"a")], "leads out of the archive"),
    ([("1.txt", b"a"), ("1.pkl", b"cos\nsystem\n(S'touch canary'\ntR.")], "may run code when loaded"),
    ([("1.txt", b"a"), ("1.pyd", b"cos\nsystem\n(S'touch canary'\ntR.")], "may run code when loaded"),
    ([("1.jpg", b"a")], r"has no member \.txt, but \.jpg"),
    ([("1.txt", b"\xff")], "1.txt is refused: not UTF-8"),
    ([("1.txt", ("utf-16 text" * 2).encode("utf-16le"))], r"1.txt is refused: UTF-16 text.*iconv -f UTF-16LE"),
    ([("1.txt.gz", b"plain")], "1.txt.gz is refused: cannot be read"),
]


@pytest.mark.parametrize(("how", "said"), BROKEN_AT_START)
def test_broken_shards_are_refused_at_the_start(tmp_path: Path, tokenizer: Path, broken: Path, how, said: str) -> None:
    damage(broken, how)
    config = ForeignConfig(paths=[str(tmp_path / "good.tar"), str(broken)], tokenizer=str(tokenizer))
    with pytest.raises(DataError, match=rf"broken.tar.*({said})"):
        check_shards(config, 1)


@pytest.mark.parametrize(("how", "said"), BROKEN_INSIDE)
def test_broken_shards_are_refused_when_they_are_read(
    tmp_path: Path, tokenizer: Path, broken: Path, how, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    damage(broken, how)
    config = ForeignConfig(paths=[str(broken)], tokenizer=str(tokenizer))
    with pytest.raises(DataError, match=rf"broken.tar.*({said})"):
        for _ in itertools.islice(stream(config, monkeypatch).rows(), 1000):
            pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken.tar", "good.tar"]


def test_a_link_is_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "broken.tar", "w") as shard:
        shard.addfile(LINK)
    with pytest.raises(DataError, match=r"9\.txt is refused: a link"):
        list(read_texts(str(tmp_path / "broken.tar"), ForeignConfig()))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"text":"x \\ud83d y"}', "an unpaired surrogate, at character 3"),
        (b'{"text":"a","text":"b"}', "the key 'text' is a duplicate"),
        (b'{"body":"a"}', r"no field 'text' \(its fields: body\)"),
        (b'{"text":7}', "is a number, not a text"),
        (b"[1]", "a JSON array"),
        (b'{"text":', "not JSON"),
        (b"\xff", "not UTF-8"),
    ],
)
def test_an_error_names_shard_and_sample(tmp_path: Path, content: bytes, said: str) -> None:
    shard = write_shard(tmp_path / "s.tar", [("000.json", b'{"text": "good"}'), ("001.json", content)])
    with pytest.raises(DataError, match=rf"s\.tar/001\.json is refused: .*{said}"):
        list(read_texts(str(shard), ForeignConfig(member="json")))


def test_samples_are_read_as_in_data_prepare(tmp_path: Path) -> None:
    members = [
        ("/2101.00001.json", b'\xef\xbb\xbf{"article": {"body": "one"}}'),
        ("2101.00002.json.gz", gzip.compress(b'{"article": {"body": "two"}}')),
        ("lib.so", b"passed over"),
        ("lib.json", b'{"article.body": "three"}'),
        ("four.jpg", b"of the next"),
        ("four.JSON", b'{"article": {"body": "four"}}'),
        ("four.txt", b"not this"),
    ]
    shard = write_shard(tmp_path / "s.tar", members)
    config = ForeignConfig(member="json", text_field="article.body")
    assert list(read_texts(str(shard), config)) == ["one", "two", "three", "four"]
    from data.inputs import texts_of

    assert texts_of(shard, text_field="article.body", exclude=["*.txt"]) == ["one", "two", "three", "four"]
    many = write_shard(tmp_path / "m.tar", [("0.de.txt", b"zwei"), ("0.en.txt", b"two"), ("1.en.txt", b"three")])
    assert list(read_texts(str(many), ForeignConfig(member="en.txt"))) == ["two", "three"]


@pytest.mark.parametrize("suffix", [".tar.gz", ".tgz", ".tar.zst", ".tar.xz"])
def test_a_compressed_shard_is_read_as_in_data_prepare(tmp_path: Path, tokenizer: Path, suffix: str) -> None:
    from data.inputs import gz, texts_of, zst

    content = write_shard(tmp_path / "s.tar", [plain("one", 1), plain("two", 2)]).read_bytes()
    compress = {".tar.zst": zst, ".tar.xz": lzma.compress}.get(suffix, gz)
    shard = tmp_path / f"s{suffix}"
    shard.write_bytes(compress(content))
    config = ForeignConfig(paths=[str(shard)], tokenizer=str(tokenizer))
    check_shards(config, 1)
    assert list(read_texts(str(shard), config)) == texts_of(shard) == ["one", "two"]
    with serve(tmp_path) as served:
        remote = ForeignConfig(paths=[f"{served.url}/s{suffix}"], tokenizer=str(tokenizer))
        assert check_shards(remote, 1) == check_shards(config, 1)
        assert list(read_texts(remote.paths[0], remote)) == ["one", "two"]
    shard.write_bytes(compress(content)[:-30])
    with pytest.raises(DataError, match=rf"s{suffix} is refused: "):
        list(read_texts(str(shard), config))
    shard.write_bytes(content)
    with pytest.raises(DataError, match=rf"s{suffix} is refused: cannot be read"):
        list(read_texts(str(shard), config))


def test_long_and_other_names_are_read(tmp_path: Path) -> None:
    long = "folder/" + "n" * 150
    for kind in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        with tarfile.open(tmp_path / "shard.tar", "w", format=kind) as shard:
            folder = tarfile.TarInfo("folder")
            folder.type = tarfile.DIRTYPE
            shard.addfile(folder)
            for name in ("README", f"{long}.TXT", f"{long}.json", "folder/ü.txt"):
                info = tarfile.TarInfo(name)
                info.size = 1
                shard.addfile(info, io.BytesIO(b"x"))
        assert list(read_texts(str(tmp_path / "shard.tar"), ForeignConfig())) == ["x", "x"]


def test_no_opener_of_webdatasets_is_asked(
    tmp_path: Path, tokenizer: Path, broken: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GOPEN_REWRITE", f"{broken}=pipe:touch {tmp_path}/canary")
    rows = stream(ForeignConfig(paths=[str(broken)], tokenizer=str(tokenizer)), monkeypatch).rows()
    next(rows)
    monkeypatch.setenv("WDS_CANARY", f"pipe:touch {tmp_path}/canary;")
    for path in ("${CANARY}", f"pipe:touch {tmp_path}/canary", f"{broken}::pipe:touch {tmp_path}/canary"):
        with pytest.raises(DataError):
            check_shards(ForeignConfig(paths=[path], tokenizer=str(tokenizer)), 1)
    assert not (tmp_path / "canary").exists()


def test_lists_of_shards(tmp_path: Path) -> None:
    assert expand(["a/{08..11}.tar", "b.tar"]) == ["a/08.tar", "a/09.tar", "a/10.tar", "a/11.tar", "b.tar"]
    with pytest.raises(DataError, match="not balanced"):
        expand(["a/{0..3.tar"])
    with pytest.raises(DataError, match=r"names b\.tar twice"):
        expand(["b.tar", "{a,b}.tar"])
    config = ForeignConfig(paths=write_shards(tmp_path, make_texts(6), 3))
    with pytest.raises(DataError, match="3 shards for 4 ranks"):
        check_shards(config, 4)


def test_a_killed_process_is_told(tmp_path: Path, tokenizer: Path, broken: Path) -> None:
    """A run with fewer texts in memory, as the message advises, reads on."""
    config = ForeignConfig(paths=[str(broken)], tokenizer=str(tokenizer))
    division = Division(global_batch_size=2, micro_batch_size=2)

    def start() -> ForeignLoader:
        data = DataConfig(foreign=config)
        return ForeignLoader(data, division, sequence_length=LENGTH, seed=1, pad_id=0, start_sequence=0)

    loader = start()
    next(loader)
    loader._workers._processes[0].kill()
    with pytest.raises(
        DataError, match=r"ended with status -9.*; lower data\.foreign\.num_workers or .*shuffle_buffer"
    ):
        for _ in range(10_000):
            next(loader)
    loader.close()
    config.shuffle_buffer = 10
    loader = start()
    next(loader)
    loader.close()


def foreign_run(folder: Path, corpus: Path, run_dir: Path) -> list[str]:
    write_shards(folder, make_texts(400), 5)
    return [
        *TINY,
        f"data.foreign.paths=['{folder}/{{000..004}}.tar']",
        f"data.foreign.tokenizer={corpus / 'tokenizer'}",
        f"validation.sources.held_out.path={corpus}",
        "train.checkpoint_every=4 steps",
        "track.wandb=off",
        f"run_dir={run_dir}",
    ]


@pytest.mark.dist
def test_training_on_foreign_shards_and_going_on(tmp_path: Path, corpus: Path) -> None:
    arguments = foreign_run(tmp_path / "shards", corpus, tmp_path / "run")
    done = pretrain(*arguments, "train.max_steps=8", ranks=2)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "5 foreign shards" in done.stdout and "validation at step 8: held_out loss" in done.stdout
    straight = losses(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000008")
    done = pretrain(*arguments, "train.max_steps=8", ranks=2)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "reading 32 rows again" in done.stdout and "bigtx data prepare" in done.stdout
    assert losses(tmp_path / "run") == straight


@pytest.mark.slow
@pytest.mark.dist
def test_other_ranks_and_a_damaged_foreign_shard(tmp_path: Path, corpus: Path) -> None:
    arguments = foreign_run(tmp_path / "shards", corpus, tmp_path / "run")
    assert pretrain(*arguments, "train.max_steps=4", ranks=2).returncode == 0
    more = [*arguments, "allow_changes=[train.max_steps]"]
    done = pretrain(*more, "train.max_steps=8")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "with 1 rank instead of 2 the shards are split differently" in done.stdout
    with open(tmp_path / "shards" / "003.tar", "r+b") as shard:
        shard.seek(2048)
        shard.write(b"\xff")
    done = pretrain(*more, "train.max_steps=1000", ranks=2)
    assert done.returncode == 2 and "Traceback" not in done.stdout + done.stderr
    assert "003.tar is refused: damaged at byte 2,048" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["data.sources.a.path={corpus}"], "is for prepared corpora"),
        (["data.foreign.paths=[pipe:touch canary]"], "is not a URL that bigtx reads"),
        (["data.foreign.paths=[file:///etc/passwd]"], "write its plain path"),
        (["data.foreign.paths=[nowhere.tar]"], "no such file"),
        (["data.foreign.tokenizer="], "is not given; name a folder"),
    ],
)
def test_mistakes_in_the_config(tmp_path: Path, tokenizer: Path, broken: Path, arguments: list[str], said: str) -> None:
    given = [argument.format(corpus=tmp_path) for argument in arguments]
    settings = [f"data.foreign.paths=[{broken}]", f"data.foreign.tokenizer={tokenizer}", f"run_dir={tmp_path / 'run'}"]
    done = pretrain(*TINY, *settings, *given, "train.max_steps=2", cwd=tmp_path)
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert not (tmp_path / "canary").exists()
