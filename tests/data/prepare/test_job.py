"""`bigtx data prepare | merge | inspect`: the same bytes however the work is shared or cut short."""

from __future__ import annotations

import gzip
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from doors import ROOT, as_json, bigtx

from bigtx.commands.data import inspect_command, merge_command, prepare_command, stats_command, verify_command
from bigtx.config.schema import InputConfig, PrepareConfig, TokenizerTrainConfig
from bigtx.data.corpus import shards
from bigtx.data.corpus.blocks import BlockReader
from bigtx.data.corpus.manifest import Manifest
from bigtx.data.prepare import assemble, encode
from bigtx.data.prepare import job as prepare_module
from bigtx.data.prepare.job import PartReport, merge, prepare
from bigtx.data.prepare.report import describe_part, describe_report
from bigtx.data.raw import documents
from bigtx.data.raw.files import list_files
from bigtx.tokenizer.tokenizer import Tokenizer
from bigtx.tokenizer.train import train
from bigtx.utils.errors import ConfigError, DataError
from bigtx.utils.locks import FolderLock
from bigtx.utils.units import clock

PANGRAM = """the quick brown fox jumps over a lazy dog while seven wizards brew café and naïve 🧙 potions
"""


def make_texts(count: int, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(PANGRAM.split(" "), k=draw.randint(1, 120))) for _ in range(count)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train(TokenizerTrainConfig(vocab_size=420), make_texts(200)).save(folder)
    return folder


@pytest.fixture
def texts(tmp_path: Path) -> list[str]:
    """Documents in files of every kind, in a folder `input`; some texts stand there twice."""
    texts = make_texts(300) + make_texts(300)[::7]
    folder = tmp_path / "input"
    folder.mkdir()
    lines = [json.dumps({"text": text}) + "\n" for text in texts]
    (folder / "a.jsonl").write_text("".join(lines[:200]))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress("".join(lines[200:300]).encode()))
    for number, text in enumerate(texts[300:]):
        (folder / f"c{number:03d}.txt").write_text(text)
    return texts


def make_config(tmp_path: Path, tokenizer: Path, **changes: object) -> PrepareConfig:
    settings = {
        "input": InputConfig(paths=[str(tmp_path / "input")]),
        "output": str(tmp_path / "corpus"),
        "tokenizer": str(tokenizer),
        "validation_fraction": 0.1,
        "block_tokens": 512,
        "shard_size": 8192,
        "num_processes": 1,
    }
    return PrepareConfig(**(settings | changes))  # type: ignore[arg-type]


def read_documents(folder: Path, tokenizer: Path) -> list[str]:
    manifest = Manifest.load(folder)
    reader = BlockReader(manifest)
    tokens = np.concatenate([reader.block(block)[0] for block in range(len(manifest.blocks))])
    ends = np.flatnonzero(tokens == manifest.end_id)
    loaded = Tokenizer.load(tokenizer)
    parts = np.split(tokens, ends + 1)
    assert len(parts[-1]) == 0, "every document ends with the end id"
    return [loaded.decode(part[:-1].tolist()) for part in parts[:-1]]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_what_bigtx_made_is_never_its_input(
    tmp_path: Path, tokenizer: Path, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The output lies within the input: before, while it is made, after an end in the middle, and when it is there."""
    config = make_config(tmp_path, tokenizer, input=InputConfig(paths=[str(tmp_path)]), num_processes=2)
    prepare(config)
    corpus = tmp_path / "corpus"
    made = contents(corpus)
    assert prepare(config).reused and prepare(config).passed_over == Counter({"made by bigtx": 1})  # type: ignore[union-attr]
    corpus.rename(tmp_path / "input" / "older")
    shutil.copytree(tmp_path / "input" / "older" / "train", tmp_path / "a split")
    shutil.copytree(tokenizer, tmp_path / "tokenizer")
    (tmp_path / "input" / "older.rejects.jsonl").write_text('{"file": "a", "line": 1, "reason": "text"}\n')
    run_dir = tmp_path / "runs" / "mine"
    for name in ("logs/rank-00000.log", "run.lock", "metrics.jsonl", "predictions.jsonl"):
        (run_dir / name).parent.mkdir(parents=True, exist_ok=True)
        (run_dir / name).write_text('{"text": "of a run that has only begun"}\n')
    (tmp_path / "answers.jsonl").write_text('{"text": "said by a model"}\n')
    (tmp_path / "answers.jsonl.about.json").write_text("{}")
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "README.md").write_text("---\ntags:\n- bigtx\n- llama\n---\n\n# A card\n")

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(assemble.Assembly, "run", stop)
    with pytest.raises(KeyboardInterrupt):
        prepare(config)
    monkeypatch.undo()
    assert (tmp_path / "corpus.partial" / "work").is_dir()
    report = prepare(config)
    assert contents(corpus) == made and report.passed_over["made by bigtx"] == 9  # type: ignore[union-attr]
    assert prepare(config).reused  # type: ignore[union-attr]
    everything = InputConfig(paths=[f"{tmp_path}/**"])
    assert len(list_files(everything)) == len(list_files(config.input))
    for folder in (corpus, run_dir):
        with pytest.raises(DataError, match="was made by bigtx"):
            list_files(InputConfig(paths=[str(folder)]))
    (tmp_path / "input" / "mine.rejects.jsonl").write_text('{"text": "a corpus about rejects"}\n')
    assert len(list_files(config.input)) == len(list_files(everything)) > 3


def test_every_document_is_in_one_split_whole(tmp_path: Path, tokenizer: Path, texts: list[str]) -> None:
    report = prepare(make_config(tmp_path, tokenizer))
    training, held_out = (read_documents(tmp_path / "corpus" / split, tokenizer) for split in ("train", "validation"))
    assert Counter(training + held_out) == Counter(set(texts))
    assert report.removed["exact duplicate"].documents == len(texts) - len(set(texts)) > 0
    assert not set(training) & set(held_out)
    assert 0.03 < len(held_out) / len(set(texts)) < 0.2
    assert (report.train.num_documents, report.validation and report.validation.num_documents) == (
        len(training),
        len(held_out),
    )
    assert report.train.num_bytes == sum(len(text.encode()) for text in training)
    assert training != [text for text in texts if text in set(training)]
    assert len(report.train.shards) > 1 and len(report.train.blocks) > 10
    assert Tokenizer.load(tmp_path / "corpus" / "tokenizer").fingerprint == report.train.tokenizer_fingerprint
    assert not list(tmp_path.glob("*.partial"))


def test_the_bytes_do_not_depend_on_processes_units_chunks_or_ranges(
    tmp_path: Path, tokenizer: Path, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(make_config(tmp_path, tokenizer, output=str(tmp_path / "one")))
    expected = contents(tmp_path / "one")
    assert {"recipe.json", "rejects.jsonl", "train/manifest.json", "train/blocks.npy", "train/000000.tar"} <= set(
        expected
    )
    monkeypatch.setattr(encode, "_UNIT_BYTES", (2000, 4000))
    for num_processes in (2, 3):
        name = f"processes-{num_processes}"
        prepare(make_config(tmp_path, tokenizer, output=str(tmp_path / name), num_processes=num_processes))
        assert contents(tmp_path / name) == expected
    monkeypatch.setattr(prepare_module, "_BUFFER_BYTES", (3000, 3000))
    monkeypatch.setattr(documents, "BATCH_CHARACTERS", 700)
    prepare(make_config(tmp_path, tokenizer, output=str(tmp_path / "small")))
    assert contents(tmp_path / "small") == expected


def test_parts_of_several_jobs_make_the_same_corpus(
    tmp_path: Path, tokenizer: Path, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode, "_UNIT_BYTES", (2000, 4000))
    prepare(make_config(tmp_path, tokenizer, output=str(tmp_path / "one")))
    config = make_config(tmp_path, tokenizer)
    with pytest.raises(DataError, match="has no parts to merge"):
        merge(config.output)
    for number in (3, 1):
        report = prepare(config, (number, 3))
        assert isinstance(report, PartReport) and 0 < report.num_own_units < report.num_units
        assert "part=2/3" in "\n".join(describe_part(report))
    with pytest.raises(DataError, match="part=2/3"):
        merge(config.output)
    with pytest.raises(DataError, match="was started in 3 parts"):
        prepare(config)
    prepare(make_config(tmp_path, tokenizer, seed=2), (2, 3))
    with pytest.raises(DataError, match=r"Part 2 .* seed was 1 and is now 2"):
        merge(config.output)
    prepare(config, (2, 3))
    victim = next((tmp_path / "corpus.partial" / "work").glob("*.json"))
    victim.rename(tmp_path / "kept.json")
    with pytest.raises(DataError, match=r"lacks 1 of .*part=\d/3"):
        merge(config.output)
    (tmp_path / "kept.json").rename(victim)
    tokens = victim.with_name(f"{victim.stem}-0000.tokens")
    whole = tokens.read_bytes()
    tokens.write_bytes(bytes(len(whole)))
    with pytest.raises(DataError, match="or they are damaged"):
        merge(config.output)
    tokens.write_bytes(whole)
    shutil.rmtree(tmp_path / "input")
    merge(config.output, 2)
    assert contents(tmp_path / "corpus") == contents(tmp_path / "one")
    assert not (tmp_path / "corpus.partial").exists()


def test_rules_duplicates_and_groups_are_accounted_for(
    tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Too short, contaminated, copied and nearly copied texts go, each counted by its rule, with examples."""
    long = [text for text in make_texts(400, seed=3) if len(text.split()) >= 40]
    near = [f"{text} and then one ending more" for text in long[:20]]
    leaked = "the answer of the secret examination is that seven brown wizards jump over nine lazy foxes each day"
    records = [{"text": text, "origin": ("web", "books")[number % 2]} for number, text in enumerate(long)]
    records += [{"text": text, "origin": "near"} for text in [*near, long[0]]]
    records += [{"text": "only a few words", "origin": "short"}, {"text": f"{long[1]} {leaked} {long[2]}"}]
    (tmp_path / "input").mkdir()
    (tmp_path / "input" / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (tmp_path / "exam.txt").write_text(leaked)
    arguments = [
        f"input.paths=[{tmp_path}/input]",
        "input.source_field=origin",
        f"output={tmp_path}/corpus",
        f"tokenizer={tokenizer}",
        "validation_fraction=0.2",
        "filters.min_words=20",
        "near_duplicates.enabled=true",
        "near_duplicates.threshold=0.7",
        f"decontaminate.paths=[{tmp_path}/exam.txt]",
    ]
    prepare_command([*arguments, "--dry-run"])
    assert "the rules leave out 2" in capsys.readouterr().out
    prepare_command(arguments)
    shown = capsys.readouterr().out
    report = json.loads((tmp_path / "corpus" / "report.json").read_text())
    counts = {rule: removed["documents"] for rule, removed in report["removed"].items()}
    assert counts == {"filters.min_words": 1, "decontaminate": 1, "exact duplicate": 1, "near duplicate": len(near)}
    assert report["documents_read"] == len(records) and report["kept"] == len(long)
    assert all(rule in shown for rule in counts)
    assert report["removed"]["filters.min_words"]["examples"][0]["text"] == "only a few words"
    splits = [Manifest.load(tmp_path / "corpus" / split) for split in ("train", "validation")]
    assert Counter(text for split in splits for text in read_documents(split.folder, tokenizer)) == Counter(long)
    for split in splits:
        assert sum(group["tokens"] for group in split.groups) == split.num_tokens
        assert {group["source"] for group in split.groups} == {"web", "books"}


def test_another_seed_gives_another_order_and_the_same_held_out_texts(
    tmp_path: Path, tokenizer: Path, texts: list[str]
) -> None:
    splits = []
    for seed in (1, 2):
        output = tmp_path / f"seed-{seed}"
        prepare(make_config(tmp_path, tokenizer, output=str(output), seed=seed))
        splits.append([read_documents(output / split, tokenizer) for split in ("train", "validation")])
    assert splits[0][0] != splits[1][0]
    assert [Counter(split) for split in splits[0]] == [Counter(split) for split in splits[1]]


def test_copies_of_a_text_do_not_stand_side_by_side(tmp_path: Path, tokenizer: Path) -> None:
    (tmp_path / "input").mkdir()
    texts = make_texts(50) + ["the same"] * 50
    (tmp_path / "input" / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    prepare(make_config(tmp_path, tokenizer, validation_fraction=0, exact_duplicates="keep"))
    order = [text == "the same" for text in read_documents(tmp_path / "corpus" / "train", tokenizer)]
    assert sum(order) == 50 and sum(a and b for a, b in pairwise(order)) < 40


@pytest.mark.parametrize(
    ("memory", "processes", "expected"),
    [
        (2 << 30, 16, 16 << 20),
        (2 << 30, 1, 48 << 20),
        (64 << 20, 4, 2 << 20),
        (64 << 20, 64, 1 << 20),
        (100_000_000, 7, 1_785_714),
    ],
)
def test_the_processes_share_the_memory(memory: int, processes: int, expected: int) -> None:
    """Each process holds 8 copies of its buffer at most."""
    assert prepare_module.buffer_bytes(memory, processes) == expected


@pytest.mark.parametrize("seconds", [0.5, 4])
def test_speed_and_remaining_time_are_shown(
    tmp_path: Path, tokenizer: Path, texts: list[str], monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    """By a clock of which so many seconds have passed since the tokenizing began, whenever it is asked."""
    times = itertools.chain([100.0, 100.0], itertools.repeat(100.0 + seconds))
    lines: list[tuple[str, float]] = []
    line = SimpleNamespace(show=lambda text, share=0.0: lines.append((text, share)), clear=lambda: None)
    monkeypatch.setattr(prepare_module, "time", SimpleNamespace(monotonic=lambda: next(times)))
    monkeypatch.setattr(prepare_module, "ProgressLine", lambda: line)
    prepare(make_config(tmp_path, tokenizer))
    shown = [(text, share) for text, share in lines if text.startswith("tokenizing: ")]
    assert shown
    for text, share in shown:
        words = text.split()
        tokens, speed = (float(word.removesuffix("k")) * 1000 ** word.endswith("k") for word in (words[-6], words[-2]))
        assert speed == pytest.approx(tokens / seconds, rel=0.01), text
        if share:
            assert text.startswith(f"tokenizing: {share:.0%}, {clock(seconds / share - seconds)} left, "), text


def test_blocks_and_shards_are_as_large_as_was_asked_for(tmp_path: Path, tokenizer: Path) -> None:
    (tmp_path / "input").mkdir()
    (tmp_path / "input" / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in make_texts(60)))
    shard_counts = []
    for number, shard_size in enumerate((4096, 1 << 20)):
        folder = tmp_path / str(number)
        prepare(make_config(tmp_path, tokenizer, output=str(folder), block_tokens=256, shard_size=shard_size))
        manifest = Manifest.load(folder / "train")
        assert manifest.block_tokens == 256 and len(manifest.blocks) > 1
        shard_counts.append(len(manifest.shards))
    assert shard_counts[0] > shard_counts[1] == 1


@pytest.mark.parametrize(
    ("documents", "fraction", "expected"),
    [
        (["one"], 0.5, (1, 0)),
        (["one", "one"], 0.5, (1, 0)),
        (["one", "two"], 0.001, (1, 1)),
        (["one", "two"], 0.5, (1, 1)),
        (["one", "two", "three"], 0, (3, 0)),
    ],
)
def test_small_inputs_hold_out_what_they_can(
    tmp_path: Path, tokenizer: Path, documents: list[str], fraction: float, expected: tuple[int, int]
) -> None:
    (tmp_path / "input").mkdir()
    for number, text in enumerate(documents):
        (tmp_path / "input" / f"{number}.txt").write_text(text)
    report = prepare(make_config(tmp_path, tokenizer, validation_fraction=fraction))
    assert (report.train.num_documents, report.validation.num_documents if report.validation else 0) == expected
    assert list(describe_report(report))


def test_little_held_out_text_is_told(tmp_path: Path, tokenizer: Path) -> None:
    (tmp_path / "input").mkdir()
    for number in range(100):
        (tmp_path / "input" / f"{number}.txt").write_text(f"text {number}")
    (tmp_path / "input" / "100.rst").write_text("not read")
    shown = "\n".join(describe_report(prepare(make_config(tmp_path, tokenizer, validation_fraction=0.01))))
    assert "validation_fraction=0.4 would hold out about 40" in shown
    assert "Skipped, by their suffix: 1 .rst" in shown


def test_an_existing_corpus_is_kept_or_refused(tmp_path: Path, tokenizer: Path, texts: list[str]) -> None:
    config = make_config(tmp_path, tokenizer)
    prepare(config)
    before = contents(tmp_path / "corpus")
    report = prepare(make_config(tmp_path, tokenizer, num_processes=2))
    assert report.reused and "prepared already" in next(describe_report(report))
    with pytest.raises(DataError, match="seed was 1 and is now 2"):
        prepare(make_config(tmp_path, tokenizer, seed=2))
    os.utime(tmp_path / "input" / "a.jsonl", ns=(1, 1))
    with pytest.raises(DataError, match="input files were changed"):
        prepare(config)
    assert contents(tmp_path / "corpus") == before
    with pytest.raises(DataError, match="is not a corpus"):
        prepare(make_config(tmp_path, tokenizer, output=str(tmp_path / "input")))


def test_an_empty_folder_may_become_the_corpus(tmp_path: Path, tokenizer: Path, texts: list[str]) -> None:
    (tmp_path / "corpus").mkdir()
    assert prepare(make_config(tmp_path, tokenizer)).train.num_documents > 0


@pytest.mark.parametrize("num_processes", [1, 2])
def test_rejects_are_listed_and_too_many_refused(
    tmp_path: Path, tokenizer: Path, texts: list[str], num_processes: int
) -> None:
    (tmp_path / "input" / "a2.jsonl").write_text('{"text": "good"}\nbroken\n{"text": ""}\n')
    config = make_config(tmp_path, tokenizer, num_processes=num_processes)
    with pytest.raises(DataError, match=r"could not be read(.|\n)*listed in .*corpus\.rejects\.jsonl"):
        prepare(config)
    listed = [json.loads(line) for line in (tmp_path / "corpus.rejects.jsonl").read_text().splitlines()]
    assert [(Path(reject["file"]).name, reject["line"]) for reject in listed] == [("a2.jsonl", 2), ("a2.jsonl", 3)]
    assert not (tmp_path / "corpus").exists()
    config.input.max_rejects = 0.01
    report = prepare(config)
    assert (report.rejects.count, report.rejects.num_empty) == (1, 1)
    assert (tmp_path / "corpus" / "rejects.jsonl").read_text() == (tmp_path / "corpus.rejects.jsonl").read_text()


class Disk:
    """A disk that is full for the n-th write of one kind, and then has room again."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, place: object, name: str, fails_at: int) -> None:
        self.calls = 0
        real = getattr(place, name)

        def write(*arguments: object, **named: object) -> object:
            self.calls += 1
            if self.calls == fails_at:
                raise OSError(28, "No space left on device")
            return real(*arguments, **named)

        monkeypatch.setattr(place, name, write)


@pytest.mark.parametrize(
    ("place", "name", "fails_at"),
    [
        (encode.Chunk, "write", 3),
        (encode.UnitResult, "save", 2),
        (shards.ShardWriter, "_write_block", 7),
        (shards.ShardWriter, "_end_shard", 2),
        (assemble, "_save_entry", 1),
        (prepare_module, "write_json", 1),
    ],
)
def test_a_job_that_failed_goes_on_to_the_same_bytes(
    tmp_path: Path,
    tokenizer: Path,
    texts: list[str],
    monkeypatch: pytest.MonkeyPatch,
    place: object,
    name: str,
    fails_at: int,
) -> None:
    monkeypatch.setattr(encode, "_UNIT_BYTES", (2000, 4000))
    prepare(make_config(tmp_path, tokenizer, output=str(tmp_path / "one")))
    with monkeypatch.context() as patched:
        disk = Disk(patched, place, name, fails_at)
        with pytest.raises(DataError, match=r"No space left on device.*continues from"):
            prepare(make_config(tmp_path, tokenizer))
        assert disk.calls == fails_at
    assert not (tmp_path / "corpus").exists()
    prepare(make_config(tmp_path, tokenizer))
    assert contents(tmp_path / "corpus") == contents(tmp_path / "one")


class Touch:
    """An object whose pickle makes a file when it is read."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self._path,)


def pickled(path: Path) -> None:
    np.save(path, np.array([Touch(path.with_name("executed"))], object), allow_pickle=True)


@pytest.mark.parametrize(
    "damage",
    [
        pickled,
        Path.unlink,
        lambda path: path.write_bytes(b""),
        lambda path: os.truncate(path, 30),
        lambda path: path.write_bytes(path.read_bytes()[:10] + b"(" * 118 + path.read_bytes()[128:]),
    ],
)
def test_a_damaged_table_of_an_unfinished_job_is_written_again(
    tmp_path: Path, tokenizer: Path, texts: list[str], monkeypatch: pytest.MonkeyPatch, damage: Any
) -> None:
    def fail(**facts: object) -> None:
        raise DataError("stopped before the manifest")

    with monkeypatch.context() as patched:
        patched.setattr(assemble, "Manifest", fail)
        with pytest.raises(DataError, match="stopped before"):
            prepare(make_config(tmp_path, tokenizer))
    work = tmp_path / "corpus.partial" / "work"
    damaged = sorted(work.glob("*.npy"))[0]
    damage(damaged)
    with pytest.raises(DataError, match=f"{damaged.name} is damaged .*; repeat the command"):
        prepare(make_config(tmp_path, tokenizer))
    assert not (work / "executed").exists()
    prepare(make_config(tmp_path, tokenizer))
    undisturbed = make_config(tmp_path, tokenizer, output=str(tmp_path / "undisturbed"))
    prepare(undisturbed)
    for path in (tmp_path / "undisturbed").rglob("*"):
        if path.is_file() and path.name != "report.json":
            assert (tmp_path / "corpus" / path.relative_to(tmp_path / "undisturbed")).read_bytes() == path.read_bytes()


def test_a_write_that_was_cut_short_is_told_in_words(
    tmp_path: Path, tokenizer: Path, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(*_: object) -> None:
        raise OSError("244864 requested and 231424 written")

    monkeypatch.setattr(encode.Chunk, "write", write)
    with pytest.raises(DataError, match="when a disk is full"):
        prepare(make_config(tmp_path, tokenizer))


def test_only_what_changed_is_done_again(
    tmp_path: Path, tokenizer: Path, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode, "_UNIT_BYTES", (2000, 4000))
    with monkeypatch.context() as patched:
        Disk(patched, prepare_module, "write_json", 1)
        with pytest.raises(DataError):
            prepare(make_config(tmp_path, tokenizer))
    work = tmp_path / "corpus.partial" / "work"
    damaged = work / "000001-0000.tokens"
    damaged.write_bytes(b"\xff" * damaged.stat().st_size)
    # The last of the files, so that the units before it stay as they are.
    (tmp_path / "input" / "d.txt").write_text("one text more")
    written: list[str] = []
    save = encode.UnitResult.save
    monkeypatch.setattr(encode.UnitResult, "save", lambda self, work: (written.append(self.number), save(self, work)))
    prepare(make_config(tmp_path, tokenizer, block_tokens=256))
    assert 1 in written and 2 <= len(written) <= 3
    prepare(make_config(tmp_path, tokenizer, output=str(tmp_path / "one"), block_tokens=256))
    assert contents(tmp_path / "corpus") == contents(tmp_path / "one")


@pytest.mark.parametrize("changes", [{"validation_fraction": 0.4}, {"shard_size": 4096}], ids=["split", "shards"])
def test_shards_of_other_settings_are_written_again(
    tmp_path: Path, tokenizer: Path, texts: list[str], monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    """A job that failed while it wrote shards, and is repeated with another plan: no text is lost or in both splits."""
    with monkeypatch.context() as patched:
        Disk(patched, assemble, "_save_entry", 2)
        with pytest.raises(DataError, match="No space left on device"):
            prepare(make_config(tmp_path, tokenizer))
    assert len(list((tmp_path / "corpus.partial" / "work").glob("*.shard"))) == 1
    prepare(make_config(tmp_path, tokenizer, **changes))
    prepare(make_config(tmp_path, tokenizer, output=str(tmp_path / "one"), **changes))
    assert contents(tmp_path / "corpus") == contents(tmp_path / "one")
    held_out, learned = (read_documents(tmp_path / "corpus" / split, tokenizer) for split in ("validation", "train"))
    assert Counter(held_out + learned) == Counter(set(texts))


def test_an_output_that_cannot_be_written_is_refused(tmp_path: Path, tokenizer: Path, texts: list[str]) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="Not a directory"):
        prepare(make_config(tmp_path, tokenizer, output=str(tmp_path / "file" / "corpus")))


def test_a_folder_of_something_else_is_no_place_to_work_in(tmp_path: Path, tokenizer: Path, texts: list[str]) -> None:
    other = tmp_path / "corpus.partial"
    other.mkdir()
    (other / "mine.txt").write_text("precious")
    with pytest.raises(DataError, match="has other content"):
        prepare(make_config(tmp_path, tokenizer))
    assert [path.name for path in other.iterdir()] == ["mine.txt"]


def test_only_one_job_writes_a_corpus(tmp_path: Path, tokenizer: Path, texts: list[str]) -> None:
    folder = tmp_path / "corpus.partial" / "part-1-of-1"
    folder.mkdir(parents=True)
    with FolderLock(folder), pytest.raises(DataError, match="Another `bigtx data` command is writing"):
        prepare(make_config(tmp_path, tokenizer))


@pytest.fixture(scope="module")
def uninterrupted(tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path]:
    """What a job of several units of work is given, all but its output, and the corpus that it makes."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    (folder / "input").mkdir()
    (folder / "input" / "a.txt").write_text("\n".join(make_texts(24_000)))
    given = [f"input.paths=[{folder}/input]", f"tokenizer={tokenizer}", "input.document_per_line=true"]
    given.append("num_processes=2")
    done = bigtx("data", "prepare", *given, f"output={folder}/corpus")
    assert done.returncode == 0, done.stderr
    return given, folder / "corpus"


@pytest.mark.dist
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_job_leaves_nothing_that_could_be_taken_for_good(
    tmp_path: Path, uninterrupted: tuple[list[str], Path], sent: signal.Signals
) -> None:
    given, whole = uninterrupted
    arguments = [*given, f"output={tmp_path}/corpus"]
    program = "import sys; from bigtx.cli import main; sys.exit(main(sys.argv[1:]))"
    job = subprocess.Popen(
        [sys.executable, "-c", program, "data", "prepare", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("corpus.partial/work/*")) and job.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    workers = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(job.pid)], capture_output=True, text=True
    ).stdout.split()
    assert job.poll() is None and workers
    if sent == signal.SIGINT:
        os.killpg(job.pid, sent)
    else:
        job.send_signal(sent)
    output, _ = job.communicate(timeout=30)
    assert job.returncode == (130 if sent == signal.SIGINT else -signal.SIGKILL)
    assert "Traceback" not in output
    assert not (tmp_path / "corpus").exists()
    assert ("the same command resumes the job" in output) == (sent == signal.SIGINT)
    deadline = time.monotonic() + 10
    while (
        any(
            Path(f"/proc/{worker}/stat").exists() and b") Z" not in Path(f"/proc/{worker}/stat").read_bytes()
            for worker in workers
        )
        and time.monotonic() < deadline
    ):
        time.sleep(0.05)
    assert time.monotonic() < deadline, "a tokenizing process outlived the job"
    done = bigtx("data", "prepare", *arguments)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "corpus") == contents(whole)


@pytest.mark.slow
@pytest.mark.dist
def test_kill_9_at_any_moment_changes_no_byte(tmp_path: Path, imdb_jsonl: Path) -> None:
    """The unlabelled IMDB reviews, killed at 20 random moments, several times on the way to each corpus."""
    tokenizer = tmp_path / "tokenizer"
    trained = bigtx("tokenizer", "train", f"input.paths=[{imdb_jsonl}]", f"output={tokenizer}", "vocab_size=16k")
    assert trained.returncode == 0, trained.stderr
    command = [sys.executable, "-m", "bigtx", "data", "prepare", f"input.paths=[{imdb_jsonl}]", "num_processes=2"]
    command += [f"tokenizer={tokenizer}", "shard_size=2 MiB", "block_tokens=64Ki", "near_duplicates.enabled=true"]
    begin = time.monotonic()
    subprocess.run([*command, f"output={tmp_path}/one"], cwd=ROOT, check=True, capture_output=True)
    whole = time.monotonic() - begin
    expected = contents(tmp_path / "one")
    draw = random.Random(1)
    kills, corpora = 0, 0
    while kills < 20:
        output = tmp_path / f"killed-{corpora}"
        corpora += 1
        while not output.exists():
            job = subprocess.Popen(
                [*command, f"output={output}"], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
            )
            try:
                _, errors = job.communicate(timeout=draw.uniform(0.3, 0.9) * whole)
                assert job.returncode == 0, errors
            except subprocess.TimeoutExpired:
                kills += 1
                job.kill()
                job.communicate()
        assert contents(output) == expected
        shutil.rmtree(output)


def test_the_commands(tmp_path: Path, tokenizer: Path, texts: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        f"input.paths=[{tmp_path}/input]",
        f"output={tmp_path}/corpus",
        f"tokenizer={tokenizer}",
        "block_tokens=1k",
        "num_processes=1",
        "validation_fraction=0.1",
    ]
    with pytest.raises(SystemExit):
        prepare_command([*arguments, "--print-config"])
    assert "block_tokens: 1000" in capsys.readouterr().out
    prepare_command(arguments)
    shown = capsys.readouterr().out
    assert (
        "Prepared" in shown and "Held out for validation" in shown and f"bigtx data inspect {tmp_path}/corpus" in shown
    )
    inspect_command([f"{tmp_path}/corpus", "samples=2", "split=validation"])
    shown = capsys.readouterr().out
    held_out = Manifest.load(tmp_path / "corpus" / "validation")
    assert f"{held_out.num_documents:,}" in shown and "000000.tar" in shown and "median" in shown
    assert shown.count("--- document") == 2
    decoded = shown.split("tokens, ")[-1].split("\n", 1)[1].strip()
    assert any(text.startswith(decoded[:500].removesuffix(" ...")) for text in (text.strip() for text in texts))
    in_json = [
        (inspect_command, [f"{tmp_path}/corpus", "split=validation"]),
        (stats_command, [f"{tmp_path}/corpus"]),
        (verify_command, [f"{tmp_path}/corpus"]),
        (prepare_command, arguments),
        (prepare_command, [*arguments, f"output={tmp_path}/none", "--dry-run"]),
    ]
    inspected, stats, verified, prepared, estimated = [as_json(capsys, command, words) for command, words in in_json]
    assert inspected["samples"][0]["text"] in texts and inspected["splits"] == prepared["splits"]
    assert stats["splits"][0]["tokens"] == prepared["splits"][0]["tokens"] and prepared["reused"]
    assert verified["problems"] == [] and estimated["estimate"]["documents"] > 0
    prepare_command([*arguments, f"output={tmp_path}/none", "--dry-run"])
    shown = capsys.readouterr().out
    assert "Sampled" in shown and "tokens     about" in shown and not list(tmp_path.glob("none*"))
    parts = [*arguments, f"output={tmp_path}/parts"]
    prepare_command([*parts, "--part", "1/2"])
    prepare_command([*parts, "part=2/2"])
    assert f"bigtx data merge {tmp_path}/parts" in capsys.readouterr().out
    merge_command([f"{tmp_path}/parts"])
    assert contents(tmp_path / "parts") == contents(tmp_path / "corpus")
    for wrong in ("3/2", "0/2", "1/1", "one"):
        with pytest.raises(ConfigError, match="I/N"):
            prepare_command([*parts, "--part", wrong])
    with pytest.raises(DataError, match="no split"):
        inspect_command([str(tmp_path)])
    with pytest.raises(DataError, match="does not exist"):
        inspect_command([str(tmp_path / "gone")])
