"""Faults of checkpoints: cut, flipped, missing, renamed, on a full disk, and kills while they are written."""

from __future__ import annotations

import random
import shutil
import signal
from contextlib import suppress
from pathlib import Path

from corpora import cut, flip
from doors import last_step

from drill.catalogue import fault
from drill.scene import INTERVAL, STEPS, Scene, Training, contents, expect

FLIPS = 200


@fault(2, "kill-in-save", "the previous checkpoint is used; nothing is lost", fast=True, matrix=True)
def kill_in_save(scene: Scene) -> str:
    """A rank is killed (SIGKILL) before each operation of a save.

    One run is killed at one operation after the other, and resumed each time. CI tries a quarter of the operations.
    """
    changes = ("train.checkpoint_every=2 steps", "train.max_steps=80")
    run, num_kills = scene.training(*changes), 0
    for rank in (0, 1):
        for label in _operations(scene, changes, rank)[:: 4 if scene.is_fast else 1]:
            reached = last_step(run.run_dir)
            run.injected = {"rank": rank, "at": label, "do": "SIGKILL"}
            end = run.start().stopped()
            expect(end.status == 128 + signal.SIGKILL, f"not killed at `{label}` of rank {rank}; {end.tail()}")
            if reached:
                run.count_lost(reached)
            num_kills += 1
    run.resume()
    # Training continues while a save is written, until the next save, which waits for it.
    run.check_nothing_lost()
    run.check_whole()
    expect(num_kills >= (3 if scene.is_fast else 10), f"only {num_kills} operations")
    return f"{num_kills} kills in one run, nothing lost"


def _operations(scene: Scene, changes: tuple[str, ...], rank: int) -> list[str]:
    """Return the labels of the operations of a save, in their order; see inject.py."""
    run, record = scene.training(*changes, "train.max_steps=8"), scene.folder / f"operations-{rank}"
    run.injected = {"rank": rank, "record": str(record)}
    run.run().succeeded()
    # The start of the run writes there too.
    return list(dict.fromkeys(label for label in record.read_text().splitlines() if "step-N" in label))


@fault(4, "truncated", "named and refused; the previous checkpoint is used; nothing is lost", fast=True, matrix=True)
def truncated(scene: Scene) -> str:
    """A file of the newest checkpoint truncated."""
    for victim in ("rank-00001.safetensors", "manifest.json"):
        run = scene.finished()
        path = run.checkpoints()[-1] / victim
        cut(path.stat().st_size - 100)(path)
        end = run.resume()
        expect(victim in end.out and "is not used" in end.out, f"{victim} is not named; {end.tail()}")
        run.check_nothing_lost()
    return "the file is named, the checkpoint of step 25 is used, nothing lost"


@fault(5, "flipped", "200 of 200 are found, before any of it is used; the previous checkpoint is used", matrix=True)
def flipped(scene: Scene) -> str:
    """One bit flipped at 200 random places of a checkpoint."""
    from bigtx.engine.checkpoint import Checkpoint
    from bigtx.utils.errors import CheckpointError

    run, generator, missed = scene.finished(), random.Random(1), []
    folder = run.checkpoints()[-1]
    files = sorted(path for path in folder.iterdir())
    for _ in range(FLIPS):
        # The manifest is small, so it is chosen more often than by its size.
        path = generator.choices(files, [max(file.stat().st_size, 100_000) for file in files])[0]
        place = generator.randrange(path.stat().st_size)
        flip(place)(path)
        with suppress(CheckpointError):
            if not Checkpoint(folder).verify():
                missed.append(f"{path.name} at {place}")
        flip(place)(path)
    expect(not missed, f"{FLIPS - len(missed)} of {FLIPS} found; not found: {', '.join(missed[:5])}")
    expect(not Checkpoint(folder).verify(), "the whole checkpoint is refused")
    flip(1000)(folder / "rank-00001.safetensors")
    end = run.resume()
    expect("rank-00001.safetensors does not have the sha256" in end.out, f"the file is not named; {end.tail()}")
    run.check_nothing_lost()
    return f"{FLIPS} of {FLIPS} found; the run resumes from the previous checkpoint, nothing lost"


@fault(
    6,
    "latest",
    "it has no effect, since manifests are scanned; the run never starts from step 0 unless the command asks for it",
    matrix=True,
)
def latest(scene: Scene) -> str:
    """A file `latest` that is missing, empty or wrong; the newest checkpoint without its manifest."""
    for content in (None, "", "step-00000005", "global_step999", "\0" * 20):
        run = scene.finished()
        if content is not None:
            (run.run_dir / "checkpoints" / "latest").write_text(content)
        (run.checkpoints()[-1] / "manifest.json").unlink()
        run.resume()
        run.check_nothing_lost()
    for path in run.checkpoints():
        (path / "manifest.json").unlink()
    run.run().refused("checkpoints")
    return "the newest whole checkpoint is used; without one the run is refused"


@fault(
    7,
    "disk-full-save",
    "a checkpoint that does not fit is left out once with a warning; then one clear error and a status that is not 0; "
    "the previous checkpoint stays whole; nothing is lost once there is space",
)
def disk_full_save(scene: Scene) -> str:
    """The disk fills before a checkpoint is written, and while it is written."""
    size = sum(path.stat().st_size for path in scene.finished().checkpoints()[-1].iterdir())
    run = scene.training()
    checkpoints = run.run_dir / "checkpoints"
    scene.mount(checkpoints, f"size={int(1.5 * size)}")  # Space for one checkpoint and a half.
    _check_full(run, "free")
    scene.remount(checkpoints, f"size={20 * size}")
    run.resume()
    run.check_nothing_lost(2 * INTERVAL)  # One checkpoint is left out with a warning before the run ends.
    run = scene.training()
    run.run().succeeded()
    for path in run.checkpoints()[-1:]:
        shutil.rmtree(path)
    run.injected = {"rank": 1, "at": "os.fsync step-N.partial/rank-00001.safetensors", "do": "ENOSPC"}
    _check_full(run, "No space left on device")
    run.resume()
    run.check_nothing_lost()
    return "one CheckpointError, status 2; the checkpoint before is whole; nothing lost"


def _check_full(run: Training, words: str) -> None:
    end = run.start().stopped().refused("CheckpointError", words)
    expect(end.err.count("CheckpointError") == 1, end.tail())
    expect(run.checkpoints(), "no checkpoint is left")
    run.check_whole()


@fault(37, "checkpoints-gone", "refused before anything is touched", fast=True)
def checkpoints_gone(scene: Scene) -> str:
    """The folder checkpoints/ is missing, empty, a dangling link, a file, or an empty read-only file system."""
    tried = 0
    for harm in ("missing", "empty", "dangling", "file", "read-only"):
        run = scene.finished()
        folder = run.run_dir / "checkpoints"
        shutil.rmtree(folder)
        if harm == "empty":
            folder.mkdir()
        elif harm == "dangling":
            folder.symlink_to("/nowhere/disk")
        elif harm == "file":
            folder.write_text("")
        elif harm == "read-only" and not scene.can_mount(folder, "ro"):
            continue
        before = contents(run.run_dir)
        run.run().refused("/nowhere/disk" if harm == "dangling" else str(folder))
        expect(contents(run.run_dir) == before, f"{harm}: files have changed")
        tried += 1
    return f"{tried} of {tried} refused, no file has changed"


@fault(39, "prune-error", "a warning; training continues; the space is freed later; nothing is lost")
def prune_error(scene: Scene) -> str:
    """An error at the rename or the unlink of pruning."""
    for at in ("os.rename step-N", "os.remove step-N.partial/manifest.json"):
        run = scene.training()
        run.injected = {"at": at, "do": "EIO"}
        end = run.run().succeeded()
        expect("Traceback" not in end.text and "warning: " in end.out, f"no warning after `{at}`; {end.tail()}")
        run.check_whole()
        kept = len(run.checkpoints())
        expect(kept == 2, f"{kept} checkpoints are left")
        run.check_nothing_lost()
    return "one warning, the space is freed at the next checkpoint, nothing lost"


@fault(50, "copied-checkpoint", "refused, because the name and the manifest disagree; the right one is used")
def copied_checkpoint(scene: Scene) -> str:
    """A checkpoint folder copied under another step's name."""
    run = scene.finished()
    first, last = run.checkpoints()[0], run.checkpoints()[-1]
    shutil.copytree(first, first.with_name("step-00000099"))
    end = run.run().succeeded()
    expect("step-00000099" in end.out and "is not used" in end.out, f"the copy is not named; {end.tail()}")
    shutil.rmtree(last)
    end = run.resume()
    expect(f"resumed from {first}" in end.out, end.tail())
    run.check_nothing_lost()
    return "the copy is named and not used; nothing lost"


@fault(28, "malicious-pickle", "its code never runs")
def malicious_pickle(scene: Scene) -> str:
    """A malicious pickle as a checkpoint."""
    run = scene.finished()
    canary = scene.folder / "canary"
    folder = run.run_dir / "checkpoints" / f"step-{STEPS + INTERVAL:08d}"
    _plant(folder, canary, "manifest.json", "mp_rank_00_model_states.pt", "rank-00000.safetensors")
    (folder.parent / "latest").write_text(folder.name)
    end = run.run().succeeded()
    expect("is not used" in end.out, f"the checkpoint is not named; {end.tail()}")
    for words in (["generate", str(folder), "prompt=ba"], ["export", str(folder), f"output={scene.folder / 'out'}"]):
        scene.run(*words).refused()
    new = scene.training(f"init_from={folder}")
    new.run().refused()
    _plant(whole := run.checkpoints()[0], canary, "pytorch_model.bin", "optimizer.pt", "__init__.py", "model.pkl")
    scene.run("generate", str(whole), "prompt=ba", "max_new_tokens=2").succeeded()
    expect(not canary.exists(), "the code in the pickle ran")
    return "refused by pretrain, generate, export and init_from; the code did not run"


def _plant(folder: Path, canary: Path, *names: str) -> None:
    """Write files that make the canary if they are unpickled or executed."""
    folder.mkdir(exist_ok=True)
    for name in names:
        text = f"open({str(canary)!r}, 'w')" if name.endswith(".py") else f"cos\nsystem\n(S'touch {canary}'\ntR."
        (folder / name).write_text(text)
