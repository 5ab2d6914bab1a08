"""Which checkpoints of a run are used, which are kept, and how the others are deleted.

A damaged checkpoint is renamed to `step-N.damaged` when a later save needs its name, and is never deleted. While steps
are being skipped, only suspect checkpoints are deleted; the next good one replaces them all.

A checkpoint that cannot be deleted causes a warning, and is tried again at the next checkpoint. A checkpoint may be a
link. Then its target is deleted with it only if it is in the run's folder, where no other run uses it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bigtx.config.runs import run_dir_of
from bigtx.engine.checkpoint import (
    ANOTHER,
    FOLDER,
    FROZEN,
    Checkpoint,
    is_suspect,
    list_checkpoints,
    read_manifest,
    step_folders,
    step_of,
)
from bigtx.utils.errors import CheckpointError
from bigtx.utils.log import say
from bigtx.utils.units import format_size, parse_duration

if TYPE_CHECKING:
    from bigtx.engine.ranks import Ranks

SPARE_BYTES = 2**20
"""Space for the manifest and the headers of a checkpoint."""
GONE = ".old.partial"
"""The end of the name of a checkpoint that is being deleted. A new one of the same step may be written as .partial."""


@dataclass(frozen=True)
class Policy:
    """The rule by which checkpoints are kept, besides the best one.

    Attributes:
        newest: the number of newest checkpoints to keep.
        every: an interval of steps or tokens, e.g. "10000 steps"; the first checkpoint at or after each multiple of it
            is permanent. None: none is.
    """

    newest: int
    every: str | None = None

    def permanent(self, good: Mapping[Path, dict[str, Any]]) -> set[Path]:
        """Return the permanent ones of a run's good checkpoints, given with their manifests."""
        if self.every is None:
            return set()
        duration, first = parse_duration(self.every), dict[int, Path]()
        for path in sorted(good, key=step_of):
            manifest = good[path]
            done = manifest.get("state", {}).get("tokens", 0) if duration.unit == "tokens" else manifest["step"]
            first.setdefault(int(done // duration.value), path)
        return {path for multiple, path in first.items() if multiple > 0}

    def needless(
        self, run_dir: Path, *, best: int | None, is_skipping: bool = False, before_save: bool = False
    ) -> list[Path]:
        """Return the checkpoints that are not needed, newest first. Damaged ones are not among them.

        Args:
            best: the step of the best checkpoint, if there is one.
            is_skipping: whether steps are being skipped; then every good checkpoint is needed.
            before_save: whether the newest checkpoint is still to be written.
        """
        good, suspects = read_good_and_suspect(run_dir)
        keep = max(1, self.newest - before_save)
        if is_skipping:
            needless = list(suspects)[keep:]
        else:
            is_replaced = bool(good) or not before_save
            needless = [*list(good)[keep:], *list(suspects)[0 if is_replaced else 1 :]]
        needed = self.permanent(good)
        return [path for path in needless if step_of(path) != best and path not in needed]


def read_good_and_suspect(run_dir: Path) -> tuple[dict[Path, dict[str, Any]], dict[Path, dict[str, Any]]]:
    """Return the manifests of a run's good and suspect checkpoints, newest first. Damaged manifests are left out."""
    good, suspects = dict[Path, dict[str, Any]](), dict[Path, dict[str, Any]]()
    for path in list_checkpoints(run_dir):
        with contextlib.suppress(CheckpointError):
            manifest = read_manifest(path)
            (suspects if is_suspect(manifest) else good)[path] = manifest
    return good, suspects


def prune(run_dir: Path, policy: Policy, *, best: int | None, is_skipping: bool = False) -> None:
    """Delete the checkpoints that are not needed after the one just written; see `Policy.needless`."""
    for path in policy.needless(run_dir, best=best, is_skipping=is_skipping):
        try_to(delete, path, run_dir)


def free_space(run_dir: Path, num_bytes: int, policy: Policy, *, best: int | None, is_skipping: bool) -> str | None:
    """Delete the oldest checkpoints that will not be needed, until another one fits on the disk.

    Args:
        num_bytes: the size of the next checkpoint.
        best, is_skipping: see `Policy.needless`.

    Returns:
        Why it does not fit, in words; None if it does.
    """
    folder, needed = run_dir / FOLDER, num_bytes + SPARE_BYTES
    needless = policy.needless(run_dir, best=best, is_skipping=is_skipping, before_save=True)
    try:
        while (free := shutil.disk_usage(folder).free) < needed and needless:
            try_to(delete, needless.pop(), run_dir)
    except OSError as error:
        return f"the free space of {folder} is not known: {error}"
    if free >= needed:
        return None
    return f"a checkpoint needs {format_size(needed)}, and the disk of {folder} has {format_size(free)} free"


def try_to(free: Callable[[Path, Path], None], path: Path, run_dir: Path) -> None:
    """Delete a path that is not needed. Where that fails, print a warning; the space is freed later."""
    try:
        free(path, run_dir)
    except OSError as error:
        say(
            f"warning: {path} is not needed any more and cannot be deleted ({error.strerror or error}); it is tried "
            "again at the next checkpoint"
        )


def delete(checkpoint: Path, run_dir: Path) -> None:
    """Rename a checkpoint, then delete it, so that a half deleted one does not look damaged."""
    gone = checkpoint.with_name(checkpoint.name + GONE)
    os.rename(checkpoint, gone)
    try_to(remove, gone, run_dir)


def remove(gone: Path, run_dir: Path) -> None:
    """Remove a folder, or a link with its target if that is in the run's folder.

    Raises:
        OSError: it cannot be removed.
    """
    if not gone.is_symlink():
        shutil.rmtree(gone)
        return
    target = gone.resolve()
    if _is_unused_checkpoint(target, run_dir):
        shutil.rmtree(target)
    elif target.exists():
        say(
            f"warning: {gone.name.partition('.')[0]} is not needed any more and was a link to {target}, which "
            "is not a checkpoint in the run's own folder: the link is deleted, and its target is kept"
        )
    gone.unlink()


def _is_unused_checkpoint(folder: Path, run_dir: Path) -> bool:
    """Return whether a folder in the run has files of a checkpoint, but is not a checkpoint of the run by its name."""
    in_run = {run_dir.resolve(), (run_dir / FOLDER).resolve()}.intersection(folder.parents)
    used = {path.resolve() for path in (run_dir / FROZEN, *step_folders(run_dir))}
    return bool(
        in_run
        and folder not in used
        and folder.is_dir()
        and all(path.is_file() and path.suffix in (".safetensors", ".json") for path in folder.iterdir())
    )


def begin_folder(partial: Path, leftovers: list[Path], run_dir: Path, ranks: Ranks) -> str | None:
    """Make an empty folder on rank 0. Returns a message if that failed."""
    if ranks.rank != 0:
        return None
    try:
        for leftover in filter(os.path.lexists, leftovers):
            try_to(remove, leftover, run_dir)
        # Not the run's folder, which may have been moved away.
        partial.parent.mkdir(exist_ok=True)
        partial.mkdir(exist_ok=True)
    except OSError as error:
        return f"could not make {partial}: {error}"
    return None


def raise_first(failures: list[str | None], partial: Path, ranks: Ranks) -> None:
    """Clean up and raise an error on every rank if any rank failed."""
    failure = next((failure for failure in failures if failure), None)
    if failure:
        if ranks.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise unwritten(failure)


def unwritten(failure: str) -> CheckpointError:
    """Return the error of a save that failed, for the reason given in words."""
    return CheckpointError(f"the checkpoint was not written, earlier ones are unchanged: {failure}")


def set_aside(run_dir: Path, *, from_step: int) -> None:
    """Rename the damaged and delete the suspect checkpoints of this step and of later ones.

    They were refused when the run resumed from an earlier one.
    """
    for path in step_folders(run_dir):
        if step_of(path) < from_step:
            continue
        with contextlib.suppress(CheckpointError):
            if is_suspect(read_manifest(path)):
                delete(path, run_dir)
                continue
        damaged = path.with_name(path.name + ".damaged")
        if damaged.is_symlink():
            damaged.unlink()
        shutil.rmtree(damaged, ignore_errors=True)
        os.rename(path, damaged)


def choose(folder: Path, ranks: Ranks, warn: Any) -> Checkpoint | None:
    """Return the newest checkpoint whose files have the right hashes, a suspect one only if there is no other.

    Each rank checks its share of the files.

    Args:
        folder: the run's folder, or a checkpoint's.
        ranks: all ranks of the run.
        warn: called on each rank with a sentence for each checkpoint that was refused or skipped.

    Returns:
        The checkpoint; None where the run has no checkpoint folder yet.

    Raises:
        CheckpointError: there are checkpoints, but all are damaged: the user must decide to start from step 0.
    """
    candidates, suspects = ranks.from_first(_candidates(folder))
    share, frozen, is_shared = slice(ranks.rank, None, ranks.world_size), run_dir_of(folder) / FROZEN, False
    for candidate in candidates:
        problems: list[str] = []
        checkpoint = None
        try:
            checkpoint = Checkpoint(candidate, share=share)
            problems = checkpoint.verify(share)
        except CheckpointError as error:
            problems = [str(error).removesuffix(ANOTHER)]
        problems = sorted({problem for found in ranks.gather(problems) for problem in found})
        if not problems:
            if suspects:
                names = ", ".join(path.name for path in suspects)
                others = "there is no other one" if candidate in suspects else f"{candidate.name} is used"
                warn(f"{folder}: {names}: written while steps were being skipped (not finite); {others}")
            return checkpoint
        warn(f"{candidate} is damaged and is not used: {'; '.join(problems)}")
        is_shared = any(problem.startswith(f"{FROZEN}/") or str(frozen) in problem for problem in problems)
    if is_shared:
        raise CheckpointError(
            f"{frozen} is damaged (see above), and every checkpoint of its run needs it; restore it from a copy, or "
            "use another run"
        )
    if candidates == [folder]:
        raise CheckpointError(f"{folder} is damaged (see above); restore it from a copy, or use another checkpoint")
    if candidates:
        raise CheckpointError(
            f"every checkpoint in {folder / FOLDER} is damaged (see above); restore one from a copy, or "
            "start over in another run_dir"
        )
    return None


def _candidates(folder: Path) -> tuple[list[Path], list[Path]]:
    """Return the folders to try in order, and the suspect ones among them, which come last."""
    suspects = list(read_good_and_suspect(folder)[1])  # Damaged ones are reported when they are tried.
    return [path for path in step_folders(folder) if path not in suspects] + suspects, suspects
