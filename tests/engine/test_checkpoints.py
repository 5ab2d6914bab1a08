"""Which checkpoints are chosen, kept and set aside: folders and manifests without an engine."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from engine.together import Together

from bigtx.engine import checkpoint, saving
from bigtx.engine.ranks import Ranks
from bigtx.engine.write_weights import save_weights
from bigtx.utils.errors import CheckpointError


class Alone:
    """What `choose` wants of the ranks, of a process that is the only one."""

    rank, world_size = 0, 1

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def from_first(self, value: Any) -> Any:
        return value


def write(run_dir: Path, *steps: int, **facts: Any) -> None:
    """Checkpoints of one weight."""
    for step in steps:
        weights = [("x", torch.full((2,), float(step)))]
        save_weights(run_dir, {"step": step, **facts}, {"x": (2,)}, weights)


def names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def chosen(folder: Path) -> tuple[int, list[str]]:
    """The step that a run resumes from, and what was said."""
    said: list[str] = []
    found = checkpoint.choose(folder, cast(Ranks, Alone()), said.append)
    assert found is not None
    return found.manifest["step"], said


def test_a_suspect_checkpoint_is_used_only_where_there_is_no_other(tmp_path: Path) -> None:
    write(tmp_path, 15, 20)
    write(tmp_path, 25, 30, suspect=True)
    step, (said,) = chosen(tmp_path)
    assert step == 20 and "step-00000030, step-00000025" in said and "skipped" in said
    assert checkpoint.newest(tmp_path).name == checkpoint.preferred(tmp_path).name == "step-00000020"
    # A folder that is named is meant.
    named = tmp_path / "checkpoints" / "step-00000030"
    assert checkpoint.preferred(named) == named
    for good in (15, 20):
        saving._delete(tmp_path / "checkpoints" / f"step-{good:08d}", tmp_path)
    step, (said,) = chosen(tmp_path)
    assert step == 30 and "no other" in said
    assert checkpoint.preferred(tmp_path).name == "step-00000030"


def test_the_best_of_a_run_is_found_behind_suspect_ones(tmp_path: Path) -> None:
    write(tmp_path, 5)
    write(tmp_path, 20, state={"best_step": 5})
    write(tmp_path, 30, suspect=True, state={"best_step": 5})
    assert checkpoint.newest(tmp_path).name == "step-00000020"
    assert checkpoint.preferred(tmp_path).name == "step-00000005"


def test_nothing_good_is_pruned_while_steps_are_skipped(tmp_path: Path) -> None:
    write(tmp_path, 5, 10, 15, 20)
    write(tmp_path, 25, 30, 35, suspect=True)
    saving._prune(tmp_path, keep=2, best=5, is_skipping=True)
    steps = (5, 10, 15, 20, 30, 35)
    assert names(tmp_path) == [f"step-{step:08d}" for step in steps]
    write(tmp_path, 40)
    saving._prune(tmp_path, keep=2, best=5, is_skipping=False)
    assert names(tmp_path) == ["step-00000005", "step-00000020", "step-00000040"]


def test_what_was_refused_makes_room(tmp_path: Path) -> None:
    write(tmp_path, 10, 25, 30)
    write(tmp_path, 35, suspect=True)
    saving._set_aside(tmp_path, from_step=20)
    assert names(tmp_path) == ["step-00000010", "step-00000025.damaged", "step-00000030.damaged"]


def test_what_was_refused_at_the_same_step_makes_room_too_each_time(tmp_path: Path) -> None:
    for value in ("first", "second"):
        write(tmp_path, 10, 20, 30, note=value)
        (tmp_path / "checkpoints" / "step-00000030" / "manifest.json").write_text("damaged")
        saving._set_aside(tmp_path, from_step=20)
        assert names(tmp_path) == ["step-00000010", "step-00000020.damaged", "step-00000030.damaged"]
        set_aside = tmp_path / "checkpoints" / "step-00000020.damaged" / "manifest.json"
        assert f'"note": "{value}"' in set_aside.read_text()
        saving._delete(tmp_path / "checkpoints" / "step-00000010", tmp_path)


def several_files(run_dir: Path, *steps: int) -> None:
    """Checkpoints of five weights, each in a file of its own."""
    shapes = {name: (2,) for name in "abcde"}
    for step in steps:
        weights = [(name, torch.full((2,), float(step))) for name in shapes]
        save_weights(run_dir, {"step": step}, shapes, weights, part_bytes=8)


def flip(path: Path) -> None:
    """Change the last byte, and no size."""
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
@pytest.mark.parametrize("number", range(5))
def test_whichever_file_is_damaged_it_is_found_whatever_the_number_of_ranks(
    tmp_path: Path, world_size: int, number: int
) -> None:
    several_files(tmp_path, 10, 20)
    flip(tmp_path / "checkpoints" / "step-00000020" / f"rank-{number:05d}.safetensors")
    said: list[str] = []

    def choose(ranks: Any) -> int:
        found = checkpoint.choose(tmp_path, ranks, said.append)
        assert found is not None
        return found.manifest["step"]

    assert Together(world_size).run(choose) == [10] * world_size
    assert len(said) == world_size and all(f"rank-{number:05d}.safetensors" in text for text in said)


def test_of_several_damaged_checkpoints_the_newest_whole_one_is_chosen(tmp_path: Path) -> None:
    several_files(tmp_path, 10, 20, 30, 40, 50)
    folder = tmp_path / "checkpoints"
    flip(folder / "step-00000050" / "rank-00004.safetensors")
    (folder / "step-00000040" / "rank-00002.safetensors").unlink()
    (folder / "step-00000030" / "manifest.json").unlink()
    with open(folder / "step-00000020" / "rank-00001.safetensors", "ab") as file:
        file.write(b" ")
    step, said = chosen(tmp_path)
    assert step == 10
    reasons = ["sha256", "rank-00002.safetensors is missing", "no manifest.json", "bytes instead of"]
    assert len(said) == 4 and all(reason in text for reason, text in zip(reasons, said, strict=True))
    flip(folder / "step-00000010" / "rank-00000.safetensors")
    with pytest.raises(CheckpointError, match=r"every checkpoint in .* is damaged"):
        chosen(tmp_path)


def link_elsewhere(run_dir: Path, step: int, elsewhere: Path) -> Path:
    """Move a checkpoint, and put a link in its place."""
    checkpoint = run_dir / "checkpoints" / f"step-{step:08d}"
    elsewhere.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.rename(elsewhere)
    checkpoint.symlink_to(elsewhere)
    return elsewhere


@pytest.mark.parametrize("is_linked", [False, True], ids=["checkpoints", "checkpoints-on-another-disk"])
def test_a_pruned_link_frees_the_space_that_it_takes_in_the_run(
    tmp_path: Path, is_linked: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    if is_linked:
        (tmp_path / "disk").mkdir()
        run.mkdir()
        (run / "checkpoints").symlink_to(tmp_path / "disk")
    write(run, 10, 20, 30, 40)
    in_run = link_elsewhere(run, 10, run / "kept" / "step-00000010")
    beside = link_elsewhere(run, 20, run / "checkpoints" / "old" / "step-00000020")
    outside = link_elsewhere(run, 30, tmp_path / "other" / "step-00000030")
    saving._prune(run, keep=1, best=None, is_skipping=False)
    assert names(run) == ["old", "step-00000040"]
    assert not in_run.exists() and not beside.exists()
    assert (outside / "manifest.json").is_file()
    [line] = capsys.readouterr().out.splitlines()
    assert line.startswith(f"warning: step-00000030 is not needed any more and was a link to {outside}")


def test_a_link_to_what_is_needed_frees_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, 10, 20)
    folder = tmp_path / "checkpoints"
    (tmp_path / "frozen").mkdir()
    (tmp_path / "frozen" / "manifest.json").write_text("{}")
    for number, target in enumerate(("step-00000020", "../frozen", ".", "..", "../gone")):
        link = folder / f"step-0000000{number}.partial"
        link.symlink_to(target)
        saving._remove(link, tmp_path)
    assert names(tmp_path) == ["step-00000010", "step-00000020"]
    assert (folder / "step-00000020" / "manifest.json").is_file() and (tmp_path / "frozen" / "manifest.json").is_file()
    assert len(capsys.readouterr().out.splitlines()) == 4


@pytest.mark.parametrize("call", ["rename", "rmtree"])
def test_an_error_while_pruning_is_a_warning_and_space_is_freed_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], call: str
) -> None:
    write(tmp_path, 10, 20, 30)

    def fail(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as broken:
        broken.setattr(saving.os if call == "rename" else saving.shutil, call, fail)
        saving._prune(tmp_path, keep=1, best=None, is_skipping=False)
    said = capsys.readouterr().out
    assert said.count("cannot be deleted (Input/output error); it is tried again at the next checkpoint") == 2
    assert "step-00000030" in names(tmp_path)
    leftovers = [*(tmp_path / "checkpoints").glob("*.partial")]
    assert len(leftovers) == (0 if call == "rename" else 2)
    saving._begin(tmp_path / "checkpoints" / "step-00000040.partial", leftovers, tmp_path, cast(Ranks, Alone()))
    saving._prune(tmp_path, keep=1, best=None, is_skipping=False)
    assert names(tmp_path) == ["step-00000030", "step-00000040.partial"]
    assert capsys.readouterr().out == ""


@pytest.fixture
def renamed(tmp_path: Path) -> Iterator[Path]:
    """A run whose newest checkpoint is a copy of another one under another name."""
    import shutil

    write(tmp_path, 10, 20)
    folder = tmp_path / "checkpoints"
    shutil.copytree(folder / "step-00000010", folder / "step-00000030")
    yield folder / "step-00000030"
    assert (folder / "step-00000030").is_dir()


def test_a_checkpoint_under_another_name_is_refused(renamed: Path, tmp_path: Path) -> None:
    step, (said,) = chosen(tmp_path)
    assert step == 20 and f"{renamed} holds the checkpoint of step 10" in said
    readers = (
        checkpoint.Checkpoint,
        checkpoint.preferred,
        checkpoint.newest,
        lambda path: next(checkpoint.load_weights(path)),
        chosen,
    )
    for read in readers:
        with pytest.raises(CheckpointError, match=r"step 10|is damaged"):
            read(renamed)
    with pytest.raises(CheckpointError, match="remove it"):
        checkpoint.preferred(tmp_path)
    saving._prune(tmp_path, keep=2, best=None, is_skipping=False)
    assert names(tmp_path) == ["step-00000010", "step-00000020", "step-00000030"]


def test_files_are_as_the_umask_has_them(corpus: Path, decoder_base: Path) -> None:
    """A colleague must be able to read a corpus, its tokenizer and a run."""
    umask = os.umask(0)
    os.umask(umask)
    for folder in (corpus, corpus.parent / "tokenizer", decoder_base):
        found = [path for path in folder.rglob("*") if not path.is_symlink()]
        assert found
        expected = {path: (0o777 if path.is_dir() else 0o666) & ~umask for path in found}
        wrong = {path: oct(path.stat().st_mode) for path in found if path.stat().st_mode & 0o777 != expected[path]}
        assert not wrong
