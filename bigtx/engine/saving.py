"""Save the state of an engine, in the format of checkpoint.py.

A checkpoint is written under another name, made durable, checked to be complete, then renamed. A damaged checkpoint is
renamed to `step-N.damaged` when a later save needs its name, and is never deleted. While steps are being skipped, only
suspect checkpoints are deleted; the next good one replaces them all. The parameters that the run does not train are
written once, before the first checkpoint.

A checkpoint that cannot be deleted causes a warning, and is tried again at the next checkpoint. A checkpoint may be a
link. Then its target is deleted with it only if it is in the run's folder, where no other run uses it.

This module does not import deepspeed itself; it is given an engine.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bigtx.engine.checkpoint import (
    FOLDER,
    FORMAT_VERSION,
    FROZEN,
    is_suspect,
    list_checkpoints,
    read_manifest,
    step_folders,
    step_of,
    write_manifest,
)
from bigtx.engine.write_weights import PART_BYTES, SafetensorsWriter, groups, write_part
from bigtx.utils.errors import CheckpointError
from bigtx.utils.files import fsync_dir, json_hash
from bigtx.utils.log import say

if TYPE_CHECKING:
    from bigtx.engine.engine import Engine, ReadRange
    from bigtx.engine.ranks import Ranks


def save_frozen(engine: Engine, ranks: Ranks, run_dir: Path, read: ReadRange) -> None:
    """Write the parameters that the engine does not train, from their source: an engine in 16 bits has them rounded.

    Every rank must call it before the run's first checkpoint; each writes its share.

    Args:
        engine: the engine of the run.
        ranks: all ranks of the run.
        run_dir: the run's folder.
        read: reads from the source that the engine was filled from.

    Raises:
        CheckpointError: on every rank, if one could not write.
    """
    assert not step_folders(run_dir), "existing checkpoints need the frozen weights that are there"
    final = run_dir / FROZEN
    partial = final.with_name(final.name + ".partial")
    shapes = {name: shape for name, shape in engine.shapes().items() if name in engine.frozen}
    sizes = {name: 4 * math.prod(shape) for name, shape in shapes.items()}
    most = min(PART_BYTES, -(-sum(sizes.values()) // ranks.world_size))
    files, failure = {}, _begin(partial, [partial, final], run_dir, ranks)
    _raise_first(ranks.gather(failure), partial, ranks)
    try:
        for number, names in list(enumerate(groups(sizes, most)))[ranks.rank :: ranks.world_size]:
            weights = (read(name, "master", 0, sizes[name] // 4) for name in names)
            file = f"part-{number:05d}.safetensors"
            files[file] = write_part(partial / file, {name: shapes[name] for name in names}, weights)
    except OSError as error:
        failure = f"rank {ranks.rank} could not write {partial}: {error}"
    reports = ranks.gather((failure, files))
    _raise_first([report[0] for report in reports], partial, ranks)
    if ranks.rank == 0:
        try:
            manifest = {
                "format": FORMAT_VERSION,
                "parameters": {name: list(shape) for name, shape in shapes.items()},
                "files": {name: entry for _, written in reports for name, entry in written.items()},
            }
            write_manifest(partial, manifest)
            fsync_dir(partial)
            os.rename(partial, final)
            fsync_dir(final.parent)
        except OSError as error:
            failure = f"could not complete {final}: {error}"
    _raise_first(ranks.gather(failure), partial, ranks)


def save(
    engine: Engine, ranks: Ranks, run_dir: Path, facts: dict[str, Any], *, keep: int, is_skipping: bool = False
) -> Path:
    """Write a checkpoint of the engine. Every rank must call it.

    Args:
        engine: the engine to save.
        ranks: all ranks of the run.
        run_dir: the run's folder.
        facts: further content of the manifest: at least `step`, and `suspect` for a suspect checkpoint.
        keep: the number of newest checkpoints to keep; older ones except the best are deleted once this one is
            complete.
        is_skipping: whether this step was skipped; then no good checkpoint is deleted.

    Returns:
        The checkpoint's folder.

    Raises:
        CheckpointError: on every rank, if one could not write; older checkpoints are untouched.
    """
    final = run_dir / FOLDER / f"step-{facts['step']:08d}"
    partial = final.with_name(final.name + ".partial")
    name, entry = f"rank-{ranks.rank:05d}.safetensors", None
    failure = _begin(partial, [*(run_dir / FOLDER).glob("step-*.partial")], run_dir, ranks)
    _raise_first(ranks.gather(failure), partial, ranks)
    try:
        entry = _write_fragments(engine, partial / name)
    except OSError as error:
        failure = f"rank {ranks.rank} could not write {partial / name}: {error}"
    reports = ranks.gather((failure, name, entry, _ranges(engine)))
    _raise_first([report[0] for report in reports], partial, ranks)

    if ranks.rank == 0:
        try:
            manifest = {
                "format": FORMAT_VERSION,
                **facts,
                **_facts_of_whole_model(engine, run_dir),
                "world_size": ranks.world_size,
                "zero_stage": engine.stage,
                "precision": engine.config.engine.precision,
                "loss_scale": engine.loss_scale(),
                "expert_counts": None if engine.expert_counts is None else engine.expert_counts.tolist(),
                "num_updates": engine.optimizer.num_updates,
                "parameters": _prove_coverage([report[3] for report in reports], engine),
                "files": {name: entry for _, name, entry, _ in reports if entry},
            }
            write_manifest(partial, manifest)
            fsync_dir(partial)
            _set_aside(run_dir, from_step=facts["step"])
            os.rename(partial, final)
            fsync_dir(final.parent)
        except (OSError, CheckpointError) as error:
            failure = f"could not complete {final}: {error}"
    _raise_first(ranks.gather(failure), partial, ranks)
    if ranks.rank == 0:
        best = facts.get("state", {}).get("best_step")
        _prune(run_dir, keep=keep, best=best, is_skipping=is_skipping)
    return final


def _prune(run_dir: Path, *, keep: int, best: int | None, is_skipping: bool) -> None:
    """Delete the checkpoints that are not needed after the one just written. Damaged ones are kept."""
    good, suspects = list[Path](), list[Path]()
    for path in list_checkpoints(run_dir):
        with contextlib.suppress(CheckpointError):
            (suspects if is_suspect(read_manifest(path)) else good).append(path)
    needless = suspects[keep:] if is_skipping else [*good[keep:], *suspects]
    for path in needless:
        if step_of(path) != best:
            _try_to(_delete, path, run_dir)


def _try_to(free: Callable[[Path, Path], None], path: Path, run_dir: Path) -> None:
    """Delete a path that is not needed. Where that fails, print a warning; the space is freed later."""
    try:
        free(path, run_dir)
    except OSError as error:
        say(
            f"warning: {path} is not needed any more and cannot be deleted ({error.strerror or error}); it is tried "
            "again at the next checkpoint"
        )


def _delete(checkpoint: Path, run_dir: Path) -> None:
    """Rename a checkpoint, then delete it, so that a half deleted one does not look damaged."""
    gone = checkpoint.with_name(checkpoint.name + ".partial")
    os.rename(checkpoint, gone)
    _try_to(_remove, gone, run_dir)


def _remove(gone: Path, run_dir: Path) -> None:
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
            f"warning: {gone.name.removesuffix('.partial')} is not needed any more and was a link to {target}, which "
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


def _facts_of_whole_model(engine: Engine, run_dir: Path) -> dict[str, Any]:
    """Return what a reader needs for the whole model: the hash of the frozen weights, and the factor of adapters."""
    facts: dict[str, Any] = {}
    if engine.frozen:
        facts["frozen_sha256"] = json_hash(read_manifest(run_dir / FROZEN))
    lora = engine.config.model.lora
    if lora.rank:
        facts["adapter_scale"] = lora.alpha / lora.rank
    return facts


def _begin(partial: Path, leftovers: list[Path], run_dir: Path, ranks: Ranks) -> str | None:
    """Make an empty folder on rank 0. Returns a message if that failed."""
    if ranks.rank != 0:
        return None
    try:
        for leftover in filter(os.path.lexists, leftovers):
            _try_to(_remove, leftover, run_dir)
        partial.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return f"could not make {partial}: {error}"
    return None


def _set_aside(run_dir: Path, *, from_step: int) -> None:
    """Rename the damaged and delete the suspect checkpoints of this step and of later ones.

    They were refused when the run resumed from an earlier one.
    """
    for path in step_folders(run_dir):
        if step_of(path) < from_step:
            continue
        with contextlib.suppress(CheckpointError):
            if is_suspect(read_manifest(path)):
                _delete(path, run_dir)
                continue
        damaged = path.with_name(path.name + ".damaged")
        if damaged.is_symlink():
            damaged.unlink()
        shutil.rmtree(damaged, ignore_errors=True)
        os.rename(path, damaged)


def _write_fragments(engine: Engine, path: Path) -> dict[str, Any] | None:
    """Write this rank's fragments durably. Returns size and hash of the file; None where this rank owns no fragment."""
    pieces: dict[str, Tensor] = {}
    for fragment in engine.owned:
        states = engine.optimizer.state[fragment.flat]
        sources = {"master": fragment.flat} | {
            kind: states[kind] for kind in engine.optimizer.state_kinds(fragment.group)
        }
        for kind, source in sources.items():
            assert source.dtype == torch.float32 and source.numel() == fragment.flat.numel()
            pieces[f"{fragment.name}|{fragment.start}|{kind}"] = fragment.view(source)
    if not pieces:
        return None
    entries = [(name, tuple(piece.shape), piece.dtype) for name, piece in pieces.items()]
    # safetensors' save_file is not used: it makes files that only their owner may read, and ignores the umask.
    with SafetensorsWriter(path, entries) as writer:
        for piece in pieces.values():
            writer.write(piece.cpu())
        return writer.finish()


def _ranges(engine: Engine) -> list[tuple[str, tuple[int, ...], int, int]]:
    return [(fragment.name, fragment.shape, fragment.start, fragment.stop) for fragment in engine.owned]


def _prove_coverage(
    ranges_by_rank: list[list[tuple[str, tuple[int, ...], int, int]]], engine: Engine
) -> dict[str, list[int]]:
    """Check that every trained parameter is covered exactly once. Returns the parameters' shapes.

    All kinds of a fragment have the fragment's range (asserted where they are written), so one check is enough.
    """
    pieces: dict[str, list[tuple[int, int]]] = {}
    shapes: dict[str, list[int]] = {}
    for ranges in ranges_by_rank:
        for name, shape, start, stop in ranges:
            pieces.setdefault(name, []).append((start, stop))
            shapes[name] = list(shape)
    assert set(pieces) == set(engine.shapes()) - set(engine.frozen)
    for name, parts in pieces.items():
        end = 0
        for start, stop in sorted(parts):
            assert start == end, f"{name}: elements {end} to {start} are missing or written twice"
            end = stop
        assert end == torch.Size(shapes[name]).numel(), f"{name}: only {end} elements written"
    return shapes


def _raise_first(failures: list[str | None], partial: Path, ranks: Ranks) -> None:
    """Clean up and raise an error on every rank if any rank failed."""
    failure = next((failure for failure in failures if failure), None)
    if failure:
        if ranks.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(f"the checkpoint was not written, earlier ones are unchanged: {failure}")
