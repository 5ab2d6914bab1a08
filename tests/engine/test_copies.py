"""Copies of checkpoints elsewhere: what is copied and in which order, and what an error there does."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import fsspec
import pytest
from engine.test_checkpoints import write
from engine.test_saving import alone, engine_of

from bigtx.config.schema import PretrainConfig, TrainConfig
from bigtx.data.storage import buckets, remote
from bigtx.engine import checkpoint, copies
from bigtx.engine.copies import CheckpointCopier
from bigtx.train.execute import _end_copies, open_saver


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with two checkpoints."""
    run_dir = tmp_path / "run"
    write(run_dir, 10, 20)
    (run_dir / "config.yaml").write_text("seed: 1\n")
    (run_dir / "tokenizer").mkdir()
    (run_dir / "tokenizer" / "model").write_bytes(b"abc")
    return run_dir


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """An object store in memory."""
    system = fsspec.filesystem("memory", skip_instance_cache=True)
    system.store.clear()

    class Store:
        def __init__(self) -> None:
            self.names, self.lost = list[str](), 0

        def put_file(self, file: str, url: str) -> None:
            self.names.append(url.removeprefix("s3://bucket/copy/"))
            system.put_file(file, url.removeprefix("s3:/"))
            if self.lost:
                self.lost -= 1
                system.pipe_file(url.removeprefix("s3:/"), b"")

        def info(self, url: str) -> Any:
            return system.info(url.removeprefix("s3:/"))

    store = Store()
    monkeypatch.setattr(buckets, "file_system", lambda scheme: store)
    monkeypatch.setattr(remote, "BACK_OFF_SECONDS", (0.0, 0.0))
    yield store
    system.store.clear()


def step(run_dir: Path, number: int) -> Path:
    return run_dir / "checkpoints" / f"step-{number:08d}"


def test_a_copy_is_a_run(run: Path, tmp_path: Path) -> None:
    config = PretrainConfig(train=TrainConfig(copy_checkpoints_to=str(tmp_path / "copy")))
    closing: list[Any] = []
    context: Any = SimpleNamespace(folder=run, dry_run=False, status="finished", resources=SimpleNamespace())
    context.ranks = SimpleNamespace(rank=0, sum=list)
    context.resources.callback = closing.append
    saver = open_saver(context, config, engine=cast(Any, None))
    saver.when_saved(step(run, 20))
    (close,) = closing
    close()
    copy = tmp_path / "copy"
    assert checkpoint.list_checkpoints(copy) == [step(copy, 20)]
    assert checkpoint.Checkpoint(step(copy, 20)).verify() == []
    assert (copy / "tokenizer" / "model").read_bytes() == b"abc" and (copy / "config.yaml").is_file()
    assert not [*copy.rglob("*.partial")]


def test_the_names_of_copied_files_survive_a_power_failure(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy, flushed = tmp_path / "copy", list[Path]()
    monkeypatch.setattr(copies, "fsync_dir", flushed.append)
    copier = CheckpointCopier(run, str(copy))
    copier.submit(step(run, 20))
    assert copier.finish(30)
    copier.close(warn=True)
    assert flushed == [copy, copy / "tokenizer", step(copy, 20), step(copy, 20)]


def test_the_manifest_is_uploaded_last_and_what_is_there_only_once(run: Path, store: Any) -> None:
    copier = CheckpointCopier(run, "s3://bucket/copy/")
    for number in (10, 20):
        copier.submit(step(run, number))
        assert copier.finish(30)
    copier.close(warn=True)
    files = ["rank-00000.safetensors", "manifest.json"]
    uploaded = [f"checkpoints/step-000000{number}/{file}" for number in (10, 20) for file in files]
    assert store.names == ["config.yaml", "tokenizer/model", *uploaded]


def test_what_arrives_incomplete_is_sent_again(run: Path, store: Any, capsys: pytest.CaptureFixture[str]) -> None:
    store.lost = 2
    copier = CheckpointCopier(run, "s3://bucket/copy")
    copier.submit(step(run, 20))
    assert copier.finish(30)
    copier.close(warn=True)
    assert store.names[:4] == ["config.yaml"] * 3 + ["tokenizer/model"] and store.names[-1].endswith("manifest.json")
    assert capsys.readouterr().out == ""


def test_a_step_that_was_written_again_is_copied_again(tmp_path: Path) -> None:
    """A run that returned to an earlier checkpoint writes a step again, with files of the same sizes."""
    run_dir, copy = tmp_path / "run", tmp_path / "copy"
    run_dir.mkdir()
    copier = CheckpointCopier(run_dir, str(copy))
    for offset in (0.0, 7.0):
        saver = alone(run_dir, engine_of(0, 1, offset=offset))
        saver.save({"step": 20, "suspect": offset == 0.0})
        saver.wait()
        copier.submit(step(run_dir, 20))
        assert copier.finish(30)
    copier.close(warn=True)
    assert checkpoint.Checkpoint(step(copy, 20)).verify() == []
    for file in step(run_dir, 20).iterdir():
        assert (step(copy, 20) / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize(("status", "is_awaited"), [("finished", True), ("stopped", True), ("failed", False)])
def test_the_other_ranks_wait_for_the_last_copy_in_turns(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: str, is_awaited: bool
) -> None:
    free, copyfile, turns = threading.Event(), shutil.copyfile, list[bool]()

    def held(*arguments: Any) -> Any:
        assert free.wait(30)
        return copyfile(*arguments)

    def counted(numbers: list[int]) -> list[int]:
        turns.append(bool(numbers[0]))
        if len(turns) == 2:
            free.set()
        return numbers

    monkeypatch.setattr(copies.shutil, "copyfile", held)
    copier = CheckpointCopier(run, str(tmp_path / "copy"))
    copier.submit(step(run, 20))
    context: Any = SimpleNamespace(status=status, ranks=SimpleNamespace(sum=counted))
    _end_copies(context, copier)
    free.set()
    assert turns[:2] == [True, True] * is_awaited and turns[-1:] == [False] * is_awaited
    other: Any = SimpleNamespace(status=status, ranks=SimpleNamespace(sum=lambda numbers: [0]))
    _end_copies(other, None)


def test_an_error_is_a_warning_without_secrets(run: Path, store: Any, capsys: pytest.CaptureFixture[str]) -> None:
    store.lost = 100
    copier = CheckpointCopier(run, "s3://bucket/copy")
    copier.submit(step(run, 20))
    assert copier.finish(30)
    copier.close(warn=True)
    said = capsys.readouterr().out
    assert said.count("warning: step-00000020 could not be copied to s3://bucket/copy") == 1
    assert "0 bytes arrived instead of 8" in said and "the run continues" in said
    store.put_file = lambda *_: (_ for _ in ()).throw(
        OSError("AWS_SECRET_ACCESS_KEY=abcdefghijklmnop1234567890abcdefghijklmn")
    )
    copier = CheckpointCopier(run, "s3://bucket/copy")
    copier.submit(step(run, 20))
    assert copier.finish(30)
    copier.close(warn=True)
    said = capsys.readouterr().out
    assert "could not be copied" in said and "abcdefghijklmnop" not in said


def test_a_checkpoint_that_was_deleted_in_time_is_left_out(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reached, free = threading.Event(), threading.Event()
    copyfile = shutil.copyfile

    def held(*arguments: Any) -> Any:
        reached.set()
        assert free.wait(30)
        return copyfile(*arguments)

    monkeypatch.setattr(copies.shutil, "copyfile", held)
    copier = CheckpointCopier(run, str(tmp_path / "copy"))
    copier.submit(step(run, 10))
    assert reached.wait(30)
    shutil.rmtree(step(run, 10))
    write(run, 30)
    copier.submit(step(run, 20))
    copier.submit(step(run, 30))
    free.set()
    assert copier.finish(30)
    copier.close(warn=True)
    assert [path.name for path in checkpoint.list_checkpoints(tmp_path / "copy")] == ["step-00000030"]
    assert capsys.readouterr().out == ""
