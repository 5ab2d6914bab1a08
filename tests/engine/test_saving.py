"""How a checkpoint is written: what ranks own, the order of what is made durable, and what failures leave behind."""

from __future__ import annotations

import dataclasses
import itertools
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engine.together import Together
from torch import Tensor

from bigtx.engine import checkpoint, saving
from bigtx.engine.fragments import Fragment, owned_fragments
from bigtx.engine.write_weights import save_weights
from bigtx.utils.errors import CheckpointError

SHAPES: dict[str, tuple[int, ...]] = {"a": (3, 4), "b": (5,), "c": (1,)}


def engine_of(rank: int, world_size: int, *, frozen: tuple[str, ...] = (), offset: float = 0.0) -> Any:
    """What saving asks of an engine at ZeRO 0, whose weights count up from an offset."""
    fragments, state = [], {}
    for number, (name, shape) in enumerate(SHAPES.items()):
        if name in frozen:
            continue
        numel = torch.Size(shape).numel()
        flat = torch.arange(numel, dtype=torch.float32) + 100 * number + offset
        state[flat] = {"momentum": -flat}
        fragments.append(Fragment(name, shape, 0, numel, 0, flat, 0))
    return SimpleNamespace(
        owned=owned_fragments(fragments, replicated=True, rank=rank, world_size=world_size),
        optimizer=SimpleNamespace(state=state, state_kinds=lambda group: ["momentum"], num_updates=7),
        shapes=lambda: SHAPES,
        frozen=list(frozen),
        stage=0,
        config=SimpleNamespace(
            engine=SimpleNamespace(precision="bf16"), model=SimpleNamespace(lora=SimpleNamespace(rank=2, alpha=16.0))
        ),
        loss_scale=lambda: {"cur_scale": 4.0},
        expert_counts=torch.tensor([[1.0, 3.0]]),
    )


def save(run_dir: Path, step: int, *, world_size: int = 1, keep: int = 9, **facts: Any) -> list[Any]:
    def one(ranks: Any) -> Path:
        engine = engine_of(ranks.rank, world_size)
        return saving.save(engine, ranks, run_dir, {"step": step, **facts}, keep=keep)

    return Together(world_size).run(one)


def names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 11, 12, 20])
def test_replicated_weights_are_owned_once_whatever_the_number_of_ranks(world_size: int) -> None:
    flat = torch.arange(20.0)
    whole = Fragment("a", (4, 3), 0, 12, 0, flat, 5)
    owned = [owned_fragments([whole], replicated=True, rank=rank, world_size=world_size) for rank in range(world_size)]
    parts = [part for of_rank in owned for part in of_rank]
    assert torch.cat([part.view(flat) for part in parts]).tolist() == list(range(5, 17))
    assert parts[0].start == 0 and parts[-1].stop == 12
    assert all(first.stop == second.start for first, second in itertools.pairwise(parts))
    assert owned_fragments([whole], replicated=False, rank=0, world_size=world_size) == [whole]


@pytest.mark.parametrize("world_size", [1, 3])
def test_what_is_saved_is_read_whatever_the_number_of_ranks(tmp_path: Path, world_size: int) -> None:
    (final, *others) = save(tmp_path, 30, world_size=world_size, best="x")
    assert final == tmp_path / "checkpoints" / "step-00000030" and set(others) <= {final}
    opened = checkpoint.Checkpoint(final)
    assert opened.shapes == SHAPES and opened.verify() == []
    for number, (name, shape) in enumerate(SHAPES.items()):
        numel = torch.Size(shape).numel()
        expected = torch.arange(numel) + 100.0 * number
        assert torch.equal(opened.read(name, "master", 0, numel), expected)
        assert torch.equal(opened.read(name, "momentum", 0, numel), -expected)
        assert opened.kinds(name) == ["master", "momentum"]
    assert torch.equal(opened.read("a", "master", 3, 9), torch.arange(3.0, 9.0))
    manifest = {key: opened.manifest[key] for key in ("step", "best", "world_size", "zero_stage", "precision")}
    assert manifest == {"step": 30, "best": "x", "world_size": world_size, "zero_stage": 0, "precision": "bf16"}
    assert opened.manifest["loss_scale"] == {"cur_scale": 4.0} and opened.manifest["num_updates"] == 7
    assert opened.manifest["expert_counts"] == [[1.0, 3.0]] and opened.manifest["adapter_scale"] == 8.0


class Calls:
    """The calls that make files durable or give them their names, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
        self.found: list[str] = []
        fsync, rename, replace = os.fsync, os.rename, os.replace

        def path_of(descriptor: int) -> str:
            path = Path(os.readlink(f"/proc/self/fd/{descriptor}")).relative_to(root)
            # The manifest has another name until it is whole.
            return str(path.with_name("manifest")) if path.name.startswith(".manifest") else str(path)

        def record(call: Any, text: str, *arguments: Any) -> None:
            call(*arguments)
            self.found.append(text)

        monkeypatch.setattr(os, "fsync", lambda fd: record(fsync, f"fsync {path_of(fd)}", fd))
        monkeypatch.setattr(os, "rename", lambda a, b: record(rename, f"rename to {Path(b).relative_to(root)}", a, b))
        monkeypatch.setattr(os, "replace", lambda a, b: record(replace, f"rename to {Path(b).relative_to(root)}", a, b))


def durable(folder: str, partial: str, final: str, *files: str) -> list[str]:
    """Every byte is on the disk before the name under which it counts is, and the name before anybody relies on it."""
    return [
        *(f"fsync {partial}/{file}" for file in files),
        f"fsync {partial}/manifest",
        f"rename to {partial}/manifest.json",
        f"fsync {partial}",  # By the manifest.
        f"fsync {partial}",
        f"rename to {final}",
        f"fsync {folder}",
    ]


def test_a_checkpoint_is_durable_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 10)
    calls = Calls(monkeypatch, tmp_path)
    save(tmp_path, 20, keep=1)
    new, old = "checkpoints/step-00000020", "checkpoints/step-00000010"
    assert calls.found == [
        *durable("checkpoints", f"{new}.partial", new, "rank-00000.safetensors"),
        f"rename to {old}.partial",  # The one before goes when this one is safe.
    ]
    assert names(tmp_path) == ["step-00000020"]


def test_other_weights_are_durable_before_they_have_their_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "checkpoints").mkdir()
    calls = Calls(monkeypatch, tmp_path)
    weights = [(name, torch.zeros(shape)) for name, shape in SHAPES.items()]
    save_weights(tmp_path, {"step": 1}, SHAPES, weights, part_bytes=48)
    new = "checkpoints/step-00000001"
    files = ("rank-00000.safetensors", "rank-00001.safetensors")
    assert calls.found == durable("checkpoints", f"{new}.partial", new, *files)
    calls.found = []
    save_frozen(tmp_path / "other", 1, ("a", "c"))
    files = ("part-00000.safetensors",)
    assert calls.found == durable("other", "other/frozen.partial", "other/frozen", *files)


def read_counting(name: str, kind: str, start: int, stop: int) -> Tensor:
    return torch.arange(start, stop, dtype=torch.float32) + 100 * list(SHAPES).index(name)


def save_frozen(run_dir: Path, world_size: int, frozen: tuple[str, ...]) -> list[Any]:
    def one(ranks: Any) -> None:
        engine = engine_of(ranks.rank, world_size, frozen=frozen)
        saving.save_frozen(engine, ranks, run_dir, read_counting)

    return Together(world_size).run(one)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_what_is_frozen_is_written_once_and_read_through_every_checkpoint(tmp_path: Path, world_size: int) -> None:
    assert save_frozen(tmp_path, world_size, ("a", "c")) == [None] * world_size

    def one(ranks: Any) -> Path:
        engine = engine_of(ranks.rank, world_size, frozen=("a", "c"))
        return saving.save(engine, ranks, tmp_path, {"step": 5}, keep=1)

    opened = checkpoint.Checkpoint(Together(world_size).run(one)[0])
    assert opened.shapes == SHAPES and opened.verify() == []
    assert opened.kinds("a") == ["master"] and opened.kinds("b") == ["master", "momentum"]
    assert torch.equal(opened.read("a", "master", 2, 12), torch.arange(2.0, 12.0))
    assert opened.read("c", "master", 0, 1).tolist() == [200.0]
    assert torch.equal(opened.read("b", "master", 0, 5), torch.arange(5) + 100.0)


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_where_one_rank_cannot_write_all_say_so_and_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    save(tmp_path, 10, world_size=3)
    write = saving._write_fragments

    def full(engine: Any, path: Path) -> Any:
        if path.name == f"rank-{failing:05d}.safetensors":
            raise OSError(28, "No space left on device")
        return write(engine, path)

    monkeypatch.setattr(saving, "_write_fragments", full)
    for error in save(tmp_path, 20, world_size=3, keep=1):
        assert isinstance(error, CheckpointError)
        assert f"rank {failing} could not write" in str(error) and "No space left" in str(error)
    assert names(tmp_path) == ["step-00000010"]


def test_where_the_name_cannot_be_given_all_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(saving, "write_manifest", fail)
    assert all("could not complete" in str(error) for error in save(tmp_path, 20, world_size=2))
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    "second",
    [
        {"start": 7, "numel": 5},
        {"start": 5, "numel": 7},
        {"numel": 5},
        {"name": "b"},
    ],
    ids=["a gap", "an overlap", "a missing end", "a missing part"],
)
def test_elements_that_are_not_covered_once_are_no_checkpoint(second: dict[str, Any]) -> None:
    engines = [engine_of(rank, 2) for rank in range(2)]
    assert saving._prove_coverage([saving._ranges(engine) for engine in engines], engines[0]) == {
        name: list(shape) for name, shape in SHAPES.items()
    }
    engines[1].owned[0] = dataclasses.replace(engines[1].owned[0], **second)
    with pytest.raises(AssertionError):
        saving._prove_coverage([saving._ranges(engine) for engine in engines], engines[0])
    with pytest.raises(AssertionError):
        saving._prove_coverage([saving._ranges(engine_of(0, 1))[:-1]], engines[0])
