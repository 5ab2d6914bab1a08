"""How a checkpoint is written: what ranks own, the order of what is made durable, and what failures leave behind."""

from __future__ import annotations

import dataclasses
import itertools
import os
import shutil
import signal
import threading
import time
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engine.together import Together
from torch import Tensor

from bigtx.engine import checkpoint, host_copy, retention, saving, write_weights
from bigtx.engine.fragments import Fragment, owned_fragments, ranges_of
from bigtx.engine.manifest import table_of
from bigtx.engine.retention import Policy
from bigtx.engine.saving import Saver
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
        optimizer=SimpleNamespace(state=state, state_kinds=lambda group: ["momentum"], num_updates=7, copied=None),
        shapes=lambda: SHAPES,
        frozen=list(frozen),
        stage=0,
        config=SimpleNamespace(
            engine=SimpleNamespace(precision="bf16"), model=SimpleNamespace(lora=SimpleNamespace(rank=2, alpha=16.0))
        ),
        loss_scale=lambda: {"cur_scale": 4.0},
        expert_counts=torch.tensor([[1.0, 3.0]]),
    )


def save(
    run_dir: Path,
    step: int,
    *,
    world_size: int = 1,
    keep: int = 9,
    in_background: bool = True,
    timeout_seconds: float = 60.0,
    **facts: Any,
) -> list[Any]:
    """Each rank's checkpoint, or its error."""
    run_dir.mkdir(exist_ok=True)

    def one(ranks: Any) -> Path:
        saver = Saver(engine_of(ranks.rank, world_size), ranks, run_dir, Policy(keep), in_background=in_background)
        saver.save({"step": step, **facts})
        saver.wait()
        return path_of(run_dir, step)

    return Together(world_size, timeout_seconds=timeout_seconds).run(one)


def path_of(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step-{step:08d}"


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


def ranks_apart(rank: int, world_size: int) -> Any:
    """A rank that meets no others: only its own findings are known."""
    return SimpleNamespace(
        rank=rank, world_size=world_size, from_first=lambda value: value, gather=lambda value: [value]
    )


@pytest.mark.parametrize("rank", range(3))
def test_a_rank_resumes_with_its_own_file_alone(tmp_path: Path, rank: int) -> None:
    """The other files are gone: whoever looks at them, or opens them, fails."""
    (path, *_) = save(tmp_path, 10, world_size=3)
    for other in set(path.glob("*.safetensors")) - {path / f"rank-{rank:05d}.safetensors"}:
        other.unlink()
    opened = retention.choose(tmp_path, ranks_apart(rank, 3), print)
    assert opened is not None
    engine = engine_of(rank, 3)
    assert engine.owned
    for fragment in engine.owned:
        master = fragment.view(fragment.flat)
        assert torch.equal(opened.read(fragment.name, "master", fragment.start, fragment.stop), master)
        assert torch.equal(opened.read(fragment.name, "momentum", fragment.start, fragment.stop), -master)
    with pytest.raises(CheckpointError, match=r"rank-0000\d.safetensors cannot be read"):
        opened.read("a", "master", 0, 12)


def test_frozen_weights_are_read_from_the_files_that_have_them_alone(tmp_path: Path) -> None:
    assert save_frozen(tmp_path, 2, ("a", "b", "c")) == [None, None]
    names = sorted(path.name for path in (tmp_path / "frozen").glob("part-*"))
    assert len(names) == 2
    (tmp_path / "frozen" / names[1]).unlink()
    opened = checkpoint.Checkpoint(tmp_path / "frozen", share=slice(0, None, 2))
    assert torch.equal(opened.read("a", "master", 0, 12), torch.arange(12.0))


@pytest.mark.parametrize("world_size", [1, 3])
def test_a_checkpoint_whose_manifest_has_no_ranges_is_read_by_its_headers(tmp_path: Path, world_size: int) -> None:
    (path, *_) = save(tmp_path, 30, world_size=world_size)
    whole = checkpoint.Checkpoint(path)
    manifest = {key: value for key, value in whole.manifest.items() if key != "ranges"}
    assert len(manifest) == len(whole.manifest) - 1
    checkpoint.write_manifest(path, manifest)
    older = checkpoint.Checkpoint(path)
    for name, shape in SHAPES.items():
        numel = torch.Size(shape).numel()
        assert older.kinds(name) == whole.kinds(name) == ["master", "momentum"]
        for kind in whole.kinds(name):
            assert torch.equal(older.read(name, kind, 0, numel), whole.read(name, kind, 0, numel))
    with pytest.raises(CheckpointError, match="holds 5 of the 6 elements"):
        older.read("b", "master", 0, 6)
    with pytest.raises(CheckpointError, match="holds 5 of the 6 elements"):
        whole.read("b", "master", 0, 6)


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
        f"rename to {old}.old.partial",  # The one before goes when this one is safe.
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

    def one(ranks: Any) -> None:
        saver = Saver(engine_of(ranks.rank, world_size, frozen=("a", "c")), ranks, tmp_path, Policy(1))
        saver.save({"step": 5})
        saver.wait()

    assert Together(world_size).run(one) == [None] * world_size
    opened = checkpoint.Checkpoint(path_of(tmp_path, 5))
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
    write = write_weights.write_file

    def full(path: Path, *content: Any) -> Any:
        if path.name == f"rank-{failing:05d}.safetensors":
            raise OSError(28, "No space left on device")
        return write(path, *content)

    monkeypatch.setattr(write_weights, "write_file", full)
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

    def listed() -> Any:
        ranges = {
            f"rank-{rank:05d}.safetensors": ranges_of(engine.owned, engine.optimizer.state_kinds)
            for rank, engine in enumerate(engines)
        }
        return table_of(ranges, SHAPES.keys())

    shapes, table = listed()
    assert shapes == {name: list(shape) for name, shape in SHAPES.items()}
    assert table["b"] == {"kinds": ["master", "momentum"], "files": [[0, 2, 3]]}
    assert table["c"] == {"kinds": ["master", "momentum"], "files": [[0, 1, 1]]}
    engines[1].owned[0] = dataclasses.replace(engines[1].owned[0], **second)
    with pytest.raises(AssertionError):
        listed()
    engines[:] = [engine_of(0, 1)]
    engines[0].owned.pop()
    with pytest.raises(AssertionError):
        listed()


def test_a_checkpoint_in_the_background_has_the_bytes_of_one_that_is_waited_for(tmp_path: Path) -> None:
    manifests = []
    for name, in_background in (("a", True), ("b", False)):
        path = save(tmp_path / name, 10, world_size=3, in_background=in_background)[0]
        manifests.append(checkpoint.read_manifest(path))
    assert manifests[0] == manifests[1]


class Held:
    """A disk that writes a rank's file only once it is let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.free, self.reached, self.failing = threading.Event(), threading.Event(), False
        write = write_weights.write_file

        def held(*arguments: Any) -> Any:
            self.reached.set()
            assert self.free.wait(30)
            if self.failing:
                raise OSError(5, "Input/output error")
            return write(*arguments)

        monkeypatch.setattr(write_weights, "write_file", held)


def alone(run_dir: Path, engine: Any, **settings: Any) -> Saver:
    """The saver of a run of one rank."""
    single: Any = SimpleNamespace(rank=0, world_size=1, gather=lambda value: [value], from_first=lambda value: value)
    posted: list[Any] = []
    single.timeout_seconds, single.sum, single.post = 60.0, list, lambda name, value: posted.append(value)
    single.posted = lambda name: [posted.pop()]
    return Saver(engine, single, run_dir, Policy(9), **settings)


def test_weights_may_change_while_their_copy_is_written_into_the_same_buffer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, engine = Held(monkeypatch), engine_of(0, 1)
    saver = alone(tmp_path, engine)
    buffers = set()
    for step in (1, 2, 3):
        saver.save({"step": step})
        assert names(tmp_path)[-1].endswith(".partial")
        for fragment in engine.owned:
            fragment.flat.add_(1000)
        held.free.set()
        saver.wait()
        expected = torch.arange(12) + 1000.0 * (step - 1)
        assert torch.equal(checkpoint.Checkpoint(path_of(tmp_path, step)).read("a", "master", 0, 12), expected)
        buffers.add(saver._copy._buffer.data_ptr())
        held.free.clear()
    assert len(buffers) == 1


def test_nothing_is_asked_of_the_engine_while_its_copy_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At most stages DeepSpeed's optimizer has one parameter group, not all, while it makes a step."""
    held, engine = Held(monkeypatch), engine_of(0, 1)
    saver = alone(tmp_path, engine)
    saver.save({"step": 1})
    for name in vars(engine):
        setattr(engine, name, None)
    held.free.set()
    saver.wait()
    assert checkpoint.Checkpoint(path_of(tmp_path, 1)).kinds("a") == ["master", "momentum"]


@pytest.mark.parametrize(("status", "num_kernels"), [(0, 0), (2, 1)])
def test_memory_that_cannot_be_locked_fails_no_later_kernel(
    monkeypatch: pytest.MonkeyPatch, status: int, num_kernels: int
) -> None:
    """CUDA keeps an error until it is read: by one kernel, whose error is ignored."""
    kernels = []

    def raises(size: int, device: str) -> None:
        kernels.append(device)
        raise RuntimeError("CUDA error: out of memory")

    runtime = SimpleNamespace(cudaHostRegister=lambda *arguments: status, cudaError=SimpleNamespace(success=0))
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(host_copy.torch, "ones", raises)
    host_copy._pin(torch.empty(8))
    assert kernels == ["cuda"] * num_kernels


def test_the_end_of_a_checkpoint_counts_as_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks wait as long as the count rises, and old checkpoints may take long to delete."""
    noted: list[int] = []
    monkeypatch.setattr(saving._Save, "note", lambda save, num_bytes: noted.append(num_bytes))
    monkeypatch.setattr(saving, "prune", lambda *given, **named: noted.append(-1))
    saver = alone(tmp_path, engine_of(0, 1))
    saver.save({"step": 1})
    saver.wait()
    assert noted[-2:] == [1, -1] and all(num_bytes > 1 for num_bytes in noted[:-2])


def test_a_thread_waits_for_a_copy_on_the_gpu_of_its_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    told, buffer = list[str](), torch.ones(2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: told.append(f"GPU {device}"))
    event: Any = SimpleNamespace(synchronize=lambda: told.append("wait"))
    assert [tensor is buffer for tensor in host_copy._after(event, buffer, 3)] == [True]
    assert told == ["GPU 3", "wait"]


def test_a_save_waits_for_the_previous_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = Held(monkeypatch)
    saver = alone(tmp_path, engine_of(0, 1))
    saver.save({"step": 1})
    second = threading.Thread(target=saver.save, args=({"step": 2},))
    second.start()
    second.join(0.2)
    assert second.is_alive() and names(tmp_path) == ["step-00000001.partial"]
    held.free.set()
    second.join()
    saver.wait()
    assert names(tmp_path) == ["step-00000001", "step-00000002"]
    first, saved = saver.take_saved(), saver.take_saved()
    assert first and first.path.name == "step-00000001"
    assert saved and saved.path.name == "step-00000002" and saver.take_saved() is None
    assert saved.wait_seconds <= saved.stall_seconds < saved.durable_seconds
    assert saved.num_bytes == (saved.path / "rank-00000.safetensors").stat().st_size


@pytest.mark.parametrize("in_background", [False, True])
def test_a_step_that_is_saved_again_replaces_its_suspect_checkpoint(tmp_path: Path, in_background: bool) -> None:
    """As after a roll back, or a resume, past a streak of skipped steps that a save fell into."""
    save(tmp_path, 10)
    saver = alone(tmp_path, engine_of(0, 1), in_background=in_background)
    saver.save({"step": 20, "suspect": True}, is_skipping=True)
    saver.wait()
    assert names(tmp_path) == ["step-00000010", "step-00000020"]
    saver = alone(tmp_path, engine_of(0, 1, offset=7.0), in_background=in_background)
    saver.save({"step": 20})
    saver.wait()
    assert names(tmp_path) == ["step-00000010", "step-00000020"]
    assert not checkpoint.is_suspect(checkpoint.read_manifest(path_of(tmp_path, 20)))
    assert checkpoint.Checkpoint(path_of(tmp_path, 20)).verify() == []


def test_a_suspect_checkpoint_makes_space_for_its_own_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 10)
    saver = alone(tmp_path, engine_of(0, 1))
    saver.save({"step": 20, "suspect": True}, is_skipping=True)
    saver.wait()
    free = [0, 2**40, 2**40]
    monkeypatch.setattr(retention.shutil, "disk_usage", lambda folder: SimpleNamespace(free=free.pop(0)))
    monkeypatch.setattr(Policy, "needless", lambda policy, *_, **__: [path_of(tmp_path, 20)])
    saver.save({"step": 20})
    monkeypatch.setattr(Policy, "needless", lambda policy, *_, **__: [])
    saver.wait()
    assert names(tmp_path) == ["step-00000010", "step-00000020"]
    assert not checkpoint.is_suspect(checkpoint.read_manifest(path_of(tmp_path, 20)))


def test_free_space_that_is_not_known_is_said_on_all_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(folder: Path) -> Any:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(retention.shutil, "disk_usage", fails)
    for error in save(tmp_path, 10, world_size=2):
        assert isinstance(error, CheckpointError) and "is not known" in str(error) and "Input/output" in str(error)
    assert names(tmp_path) == []


@pytest.mark.parametrize("hanging", [0, 1])
def test_a_disk_that_does_not_answer_ends_the_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hanging: int
) -> None:
    """The wait is no collective call that could reach its time-out, and each of its turns is progress to others."""
    free, write = threading.Event(), write_weights.write_file

    def held(path: Path, *content: Any) -> Any:
        if path.name == f"rank-{hanging:05d}.safetensors":
            free.wait(60)
        return write(path, *content)

    monkeypatch.setattr(write_weights, "write_file", held)
    errors = save(tmp_path, 10, world_size=2, timeout_seconds=0.3)
    free.set()
    for error in errors:
        assert isinstance(error, CheckpointError), error
        assert f"within 0.3 s (engine.timeout), and rank {hanging} on here did not finish" in str(error)


def test_a_slow_disk_that_writes_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Longer in all than the time-out; each block is progress."""
    put = write_weights.SafetensorsWriter._put

    def slow(writer: Any, data: Any) -> None:
        time.sleep(0.15)
        put(writer, data)

    monkeypatch.setattr(write_weights.SafetensorsWriter, "_put", slow)
    monkeypatch.setattr(write_weights, "BLOCK_BYTES", 8)
    began = time.monotonic()
    assert save(tmp_path, 10, timeout_seconds=2.0) == [path_of(tmp_path, 10)]
    assert time.monotonic() - began > 2.0, "the test tests nothing"


@pytest.mark.parametrize("lost", [1, 2])
def test_a_rank_that_cannot_report_its_file_ends_the_save_of_all(tmp_path: Path, lost: int) -> None:
    def one(ranks: Any) -> None:
        if ranks.rank == lost:
            ranks.post = refuses
        saver = Saver(engine_of(ranks.rank, 3), ranks, tmp_path, Policy(9))
        saver.save({"step": 5})
        saver.wait()

    def refuses(name: str, value: Any) -> None:
        raise RuntimeError("connection reset")

    for error in Together(3).run(one):
        assert isinstance(error, CheckpointError), error
        assert f"rank {lost} could not complete" in str(error) and "connection reset" in str(error)
    assert names(tmp_path) == []


def test_a_failure_in_the_background_is_known_before_the_next_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = Held(monkeypatch)
    saver = alone(tmp_path, engine_of(0, 1))
    saver.save({"step": 1})
    assert not saver.has_failed
    held.failing = True
    held.free.set()
    saver._thread.join()
    assert saver.has_failed
    with pytest.raises(CheckpointError, match=r"rank 0 could not write .*Input/output error"):
        saver.wait()
    assert names(tmp_path) == []


def test_an_error_of_the_program_in_the_background_is_no_silence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any) -> None:
        raise ZeroDivisionError("of the program")

    monkeypatch.setattr(write_weights, "write_file", broken)
    assert all("ZeroDivisionError: of the program" in str(error) for error in save(tmp_path, 20, world_size=2))
    assert "Traceback" in caplog.text
    monkeypatch.undo()
    monkeypatch.setattr(saving, "table_of", broken)
    assert all("ZeroDivisionError" in str(error) for error in save(tmp_path, 20, world_size=2))
    assert names(tmp_path) == []


def test_killed_at_each_point_of_a_save_the_previous_checkpoint_is_used(tmp_path: Path) -> None:
    """Each point at which names or durable content change: the process is killed there, and the next one goes on."""
    for point in itertools.count():
        run_dir = tmp_path / str(point)
        save(run_dir, 10, world_size=2, state={"best_step": None})
        save(run_dir, 20, world_size=2)
        child = os.fork()
        if child == 0:
            _kill_at(point)
            save(run_dir, 30, world_size=2, keep=1)
            os._exit(7)
        status = os.waitpid(child, 0)[1]
        good = [path for path in checkpoint.list_checkpoints(run_dir) if not checkpoint.Checkpoint(path).verify()]
        assert good == checkpoint.list_checkpoints(run_dir) and good[0].name >= "step-00000020"
        save(run_dir, 40, world_size=2, keep=2)
        assert names(run_dir)[-1] == "step-00000040" and not [*run_dir.rglob("*.partial")]
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 7 and good[0].name == "step-00000030"
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
    assert point > 15


def _kill_at(point: int) -> None:
    """Kill this process just before the call of this number that changes files."""
    calls = itertools.count()

    def counted(call: Any) -> Any:
        def counting(*arguments: Any, **settings: Any) -> Any:
            if next(calls) == point:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **settings)

        return counting

    for name in ("fsync", "rename", "replace", "mkdir", "unlink", "rmdir", "open"):
        setattr(os, name, counted(getattr(os, name)))


def test_each_of_200_flipped_bytes_is_found_before_anything_is_used(tmp_path: Path) -> None:
    (path, *_) = save(tmp_path, 10, world_size=2, data="abc")
    files = sorted(path.iterdir())
    assert len(files) == 3
    random = Random(1)
    for _ in range(200):
        file = random.choice(files)
        content = bytearray(file.read_bytes())
        content[random.randrange(len(content))] ^= 1 << random.randrange(8)
        before = file.read_bytes()
        file.write_bytes(content)
        with pytest.raises(CheckpointError):
            next(checkpoint.load_weights(path))
        file.write_bytes(before)
    assert next(checkpoint.load_weights(path))[0] == "a"


def test_a_checkpoint_without_space_is_left_out_once_but_not_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    saver, free = alone(tmp_path, engine_of(0, 1)), 0
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=free))
    saver.save({"step": 1}, may_wait=True)
    assert "the checkpoint of step 1 was not written: a checkpoint needs" in capsys.readouterr().out
    assert names(tmp_path) == []
    with pytest.raises(CheckpointError, match="earlier ones are unchanged: a checkpoint needs"):
        saver.save({"step": 2}, may_wait=True)
    free = 2**30
    saver.save({"step": 3}, may_wait=True)
    free = 0
    saver.save({"step": 4}, may_wait=True)
    with pytest.raises(CheckpointError, match="free"):
        saver.save({"step": 5})
    assert names(tmp_path) == ["step-00000003"]
