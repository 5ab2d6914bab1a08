"""Which checkpoints are chosen, kept and set aside: folders and manifests without an engine."""

from __future__ import annotations

import errno
import itertools
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from engine.together import Together
from safetensors.torch import save_file

from bigtx.engine import checkpoint, retention
from bigtx.engine.checkpoint import load_weights, read_manifest, write_manifest
from bigtx.engine.manifest import content_problem, overlapping, table_of
from bigtx.engine.ranks import Ranks
from bigtx.engine.retention import Policy
from bigtx.engine.write_weights import save_weights
from bigtx.utils.errors import CheckpointError
from bigtx.utils.files import sha256_file


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
    found = retention.choose(folder, cast(Ranks, Alone()), said.append)
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
        retention.delete(tmp_path / "checkpoints" / f"step-{good:08d}", tmp_path)
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
    retention.prune(tmp_path, Policy(2), best=5, is_skipping=True)
    steps = (5, 10, 15, 20, 30, 35)
    assert names(tmp_path) == [f"step-{step:08d}" for step in steps]
    write(tmp_path, 40)
    retention.prune(tmp_path, Policy(2), best=5, is_skipping=False)
    assert names(tmp_path) == ["step-00000005", "step-00000020", "step-00000040"]


@pytest.mark.parametrize(
    ("every", "kept"),
    [(None, (40, 45)), ("20 steps", (20, 40, 45)), ("15 steps", (15, 30, 40, 45)), ("1000 steps", (40, 45)),
     ("7k tokens", (10, 15, 25, 30, 35, 40, 45))],
)  # fmt: skip
def test_the_first_checkpoint_of_each_interval_is_permanent(
    tmp_path: Path, every: str | None, kept: tuple[int, ...]
) -> None:
    """At each save of a run that keeps two and saves every 5 steps, of 1,000 tokens each."""
    for step in range(5, 50, 5):
        write(tmp_path, step, state={"tokens": 1000 * step})
        retention.prune(tmp_path, Policy(2, every), best=None)
    assert names(tmp_path) == [f"step-{step:08d}" for step in kept]


@pytest.mark.parametrize(
    ("free", "left", "fits"),
    [(9, (5, 10, 15, 20), True), (2, (5, 15, 20), True), (1, (5, 20), True), (0, (5, 20), False)],
)
def test_room_is_made_of_what_is_not_needed_the_oldest_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, left: tuple[int, ...], fits: bool
) -> None:
    """A disk on which `free` checkpoints of 1 MB and those that are deleted fit, for one that takes 3."""
    write(tmp_path, 5, 10, 15, 20)

    def usage(folder: Path) -> Any:
        return SimpleNamespace(free=10**6 * (free + 4 - len(names(tmp_path))))

    monkeypatch.setattr(shutil, "disk_usage", usage)
    monkeypatch.setattr(retention, "SPARE_BYTES", 0)
    problem = retention.free_space(tmp_path, 3 * 10**6, Policy(1), best=5, is_skipping=False)
    assert (problem is None) is fits and names(tmp_path) == [f"step-{step:08d}" for step in left]
    assert fits or ("needs" in str(problem) and "free" in str(problem))


def test_before_a_save_the_newest_stays_whatever_it_is(tmp_path: Path) -> None:
    write(tmp_path, 5, 10, suspect=True)
    assert [path.name for path in Policy(1).needless(tmp_path, best=None, before_save=True)] == ["step-00000005"]
    assert len(Policy(1).needless(tmp_path, best=None)) == 2
    write(tmp_path, 15)
    assert len(Policy(1).needless(tmp_path, best=None, before_save=True)) == 2


def test_what_was_refused_makes_room(tmp_path: Path) -> None:
    write(tmp_path, 10, 25, 30)
    write(tmp_path, 35, suspect=True)
    retention.set_aside(tmp_path, from_step=20)
    assert names(tmp_path) == ["step-00000010", "step-00000025.damaged", "step-00000030.damaged"]


def test_what_was_refused_at_the_same_step_makes_room_too_each_time(tmp_path: Path) -> None:
    for value in ("first", "second"):
        write(tmp_path, 10, 20, 30, note=value)
        (tmp_path / "checkpoints" / "step-00000030" / "manifest.json").write_text("damaged")
        retention.set_aside(tmp_path, from_step=20)
        assert names(tmp_path) == ["step-00000010", "step-00000020.damaged", "step-00000030.damaged"]
        set_aside = tmp_path / "checkpoints" / "step-00000020.damaged" / "manifest.json"
        assert f'"note": "{value}"' in set_aside.read_text()
        retention.delete(tmp_path / "checkpoints" / "step-00000010", tmp_path)


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
        found = retention.choose(tmp_path, ranks, said.append)
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
    retention.prune(run, Policy(1), best=None, is_skipping=False)
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
        retention.remove(link, tmp_path)
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
        broken.setattr(os if call == "rename" else shutil, call, fail)
        retention.prune(tmp_path, Policy(1), best=None, is_skipping=False)
    said = capsys.readouterr().out
    assert said.count("cannot be deleted (Input/output error); it is tried again at the next checkpoint") == 2
    assert "step-00000030" in names(tmp_path)
    leftovers = [*(tmp_path / "checkpoints").glob("*.partial")]
    assert len(leftovers) == (0 if call == "rename" else 2)
    retention.begin_folder(
        tmp_path / "checkpoints" / "step-00000040.partial", leftovers, tmp_path, cast(Ranks, Alone())
    )
    retention.prune(tmp_path, Policy(1), best=None, is_skipping=False)
    assert names(tmp_path) == ["step-00000030", "step-00000040.partial"]
    assert capsys.readouterr().out == ""


@pytest.fixture
def renamed(tmp_path: Path) -> Iterator[Path]:
    """A run whose newest checkpoint is a copy of another one under another name."""
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
    retention.prune(tmp_path, Policy(2), best=None, is_skipping=False)
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


ENTRY = {"size": 1, "sha256": "0"}


def test_a_file_that_the_system_does_not_show_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, 10)
    file = next((tmp_path / "checkpoints" / "step-00000010").glob("*.safetensors"))
    stat = Path.stat

    def refuses(path: Path, **settings: Any) -> Any:
        if path == file:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return stat(path, **settings)

    monkeypatch.setattr(Path, "stat", refuses)
    with pytest.raises(CheckpointError, match=f"{file.name} cannot be read: .*Permission denied"):
        checkpoint.Checkpoint(file.parent)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"step": True}, "step is of the type bool"),
        ({"step": "30"}, "step is of the type str"),
        ({"state": [1]}, "state is of the type list"),
        ({"files": None}, "files is missing"),
        ({"parameters": None}, "parameters is missing"),
        ({"files": {"../../other/rank-00000.safetensors": ENTRY}}, "files has the name '../../other/rank"),
        ({"files": {"rank-00000.bin": ENTRY}}, "files has the name 'rank-00000.bin'"),
        ({"files": {"rank-00000.safetensors": [1, 2]}}, "not the size and the sha256 of a file"),
        ({"files": {"rank-00000.safetensors": ENTRY | {"size": 1.5}}}, "not the size and the sha256 of a file"),
        ({"files": {"rank-00000.safetensors": {"size": 1}}}, "not the size and the sha256 of a file"),
        ({"parameters": {"x": [2, [3, 4]]}}, "parameters.x is not a shape"),
        ({"parameters": {"x": [2, -3]}}, "parameters.x is not a shape"),
        ({"parameters": {"x": 2}}, "parameters.x is not a shape"),
        ({"ranges": []}, "ranges is of the type list"),
        ({"ranges": {}}, "ranges has other names than parameters"),
        ({"ranges": {"x": [0, 1, 6]}}, "ranges.x has no list of kinds"),
        ({"ranges": {"x": {"kinds": [1], "files": [[0, 1, 6]]}}}, "ranges.x has no list of kinds"),
        *(
            ({"ranges": {"x": {"kinds": ["master"], "files": files}}}, "ranges.x does not cover the parameter")
            for files in (
                None,
                [],
                6,
                [6],
                [[0, 1]],
                [[0, 1, 6.0]],
                [[0, 1, True]],
                [[0, 1, 5]],
                [[0, 1, 6], [0, 1, 6]],
                [[0, 2, 3]],
                [[1, 1, 6]],
                [[-1, 1, 6]],
                [[0, 0, 6]],
                [[0, 1, 0], [0, 1, 6]],
                [[0, -1, -6]],
                [[0, 1, 10**40], [0, 1, 6]],
                [[0, 1, -1], [0, 1, 7]],
            )
        ),
    ],
)
def test_a_manifest_with_the_right_hash_and_wrong_content_is_refused(
    tmp_path: Path, change: dict[str, Any], problem: str
) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    ranges = {"x": {"kinds": ["master"], "files": [[0, 1, 6]]}}
    content = {"format": 1, "step": 30, "parameters": {"x": [2, 3]}, "files": {"rank-00000.safetensors": ENTRY}}
    content |= {"ranges": ranges}
    write_manifest(folder, content)
    assert read_manifest(folder) == content
    write_manifest(folder, content | change)
    with pytest.raises(CheckpointError, match=re.escape(problem)):
        read_manifest(folder)


@pytest.mark.parametrize(
    "tensors", [{"x": torch.ones(2)}, {"x|a|master": torch.ones(2)}, {"x|0|master": torch.ones(1, 2)}]
)
def test_tensors_that_are_no_ranges_of_parameters_are_refused(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, tmp_path / "rank-00000.safetensors")
    path = tmp_path / "rank-00000.safetensors"
    files = {path.name: {"size": path.stat().st_size, "sha256": sha256_file(path)}}
    write_manifest(tmp_path, {"format": 1, "step": 1, "parameters": {"x": [2]}, "files": files})
    with pytest.raises(CheckpointError, match=r"rank-00000\.safetensors holds 'x.*', which is not a range"):
        next(load_weights(tmp_path))


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"x": {"kinds": ["master", "momentum"], "files": [[0, 1, 2]]}}, "does not have the range 'x|0|momentum'"),
        (
            {"x": {"kinds": ["master"], "files": [[1, 1, 2]]}},
            "rank-00001.safetensors does not have the range 'x|0|master",
        ),
        ({"x": {"kinds": ["master"], "files": [[0, 2, 1]]}}, "has the shape [2] instead of [1]"),
    ],
)
def test_ranges_that_the_files_do_not_have_are_refused(tmp_path: Path, changed: dict[str, Any], problem: str) -> None:
    shapes = {"x": (2,), "y": (2,)}
    path = save_weights(tmp_path, {"step": 1}, shapes, [(name, torch.ones(2)) for name in shapes], part_bytes=8)
    manifest = read_manifest(path)
    assert manifest["ranges"]["y"] == {"kinds": ["master"], "files": [[1, 1, 2]]}
    write_manifest(path, manifest | {"ranges": manifest["ranges"] | changed})
    opened = checkpoint.Checkpoint(path)
    with pytest.raises(CheckpointError, match=re.escape(problem)):
        opened.read("x", opened.kinds("x")[-1], 0, 2)


@pytest.mark.parametrize("seed", range(20))
def test_the_files_of_a_range_are_found_by_the_table(seed: int) -> None:
    """A parameter cut at random into the files of some ranks, some of them by equal parts."""
    random = Random(seed)
    numel = random.randrange(1, 60)
    if seed % 2:
        cuts = sorted({0, numel, *(random.randrange(numel) for _ in range(random.randrange(9)))})
    else:
        cuts = [*range(0, numel, random.randrange(1, 9)), numel]
    pieces = [(low, high, number) for number, (low, high) in enumerate(itertools.pairwise(cuts))]
    files = {f"rank-{number:05d}": [("x", (numel,), ("master",), low, high)] for low, high, number in pieces}
    shapes, table = table_of(files, {"x"})
    runs = table["x"]["files"]
    assert shapes == {"x": [numel]} and (seed % 2 or len(runs) == 1)
    entry = {"size": 1, "sha256": "0"}
    content = {"parameters": shapes, "ranges": table, "files": {f"{name}.safetensors": entry for name in files}}
    assert content_problem(content) is None
    for start, stop in itertools.combinations(range(numel + 1), 2):
        expected = [(low, high, number) for low, high, number in pieces if low < stop and high > start]
        assert list(overlapping(runs, numel, start, stop)) == expected


def test_equal_parts_of_many_ranks_are_one_entry() -> None:
    def ranges(rank: int) -> list[Any]:
        start = 196 * rank
        return [("x", (200, 1000), ("master",), start, min(start + 196, 200_000))] if start < 200_000 else []

    _, table = table_of({f"rank-{rank:05d}": ranges(rank) for rank in range(1024)}, {"x"})
    assert table == {"x": {"kinds": ["master"], "files": [[0, 1021, 196]]}}
    assert list(overlapping(table["x"]["files"], 200_000, 196 * 700, 196 * 701)) == [(196 * 700, 196 * 701, 700)]
    assert list(overlapping(table["x"]["files"], 200_000, 199_999, 200_000)) == [(196 * 1020, 200_000, 1020)]
