"""Saving what an engine holds, in the format of checkpoint.py.

A checkpoint is written under another name, made durable, proved complete, then renamed. One that was found damaged is
set aside as `step-N.damaged` once a later save needs its place, and never deleted. While steps are being skipped, only
suspect checkpoints are deleted; the next good one replaces them all. What the run does not train is written once,
before the first checkpoint.

What cannot be deleted is a warning and is tried again at the next checkpoint. A checkpoint may be a link: then what it
leads to is deleted with it only where that is in the run's folder, since nobody else can need it there.

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
    """Write the parameters that the engine does not train, as a source gives them: an engine in 16 bits has but
    roundings of them. Every rank must call it, before the run's first checkpoint; it writes its share.

    Args:
        read: what the engine was filled from.

    Raises:
        CheckpointError: on every rank, if one could not write.
    """
    assert not step_folders(run_dir), "checkpoints hold on to the frozen weights that are there"
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
        facts: what the manifest records beside the files: at least `step`, and `suspect` where it is.
        keep: newest checkpoints to keep; older ones, but for the best, go once this one is complete.
        is_skipping: this step was skipped, so that no good checkpoint goes.

    Returns:
        Its folder.

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
                **_besides(engine, run_dir),
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
    """Delete what the checkpoint just written makes needless; a damaged one is left where it is."""
    good, suspects = list[Path](), list[Path]()
    for path in list_checkpoints(run_dir):
        with contextlib.suppress(CheckpointError):
            (suspects if is_suspect(read_manifest(path)) else good).append(path)
    needless = suspects[keep:] if is_skipping else [*good[keep:], *suspects]
    for path in needless:
        if step_of(path) != best:
            _try_to(_delete, path, run_dir)


def _try_to(free: Callable[[Path, Path], None], path: Path, run_dir: Path) -> None:
    """Delete what is not needed; where that fails, the space is freed later."""
    try:
        free(path, run_dir)
    except OSError as error:
        say(
            f"warning: {path} is not needed any more and cannot be deleted ({error.strerror or error}); it is tried "
            "again at the next checkpoint"
        )


def _delete(checkpoint: Path, run_dir: Path) -> None:
    """Half a checkpoint must not look like a damaged one."""
    gone = checkpoint.with_name(checkpoint.name + ".partial")
    os.rename(checkpoint, gone)
    _try_to(_remove, gone, run_dir)


def _remove(gone: Path, run_dir: Path) -> None:
    """Remove a folder, or a link and what it leads to in the run.

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
            "is no checkpoint in the run's own folder: the link is deleted, and what it leads to is left"
        )
    gone.unlink()


def _is_unused_checkpoint(folder: Path, run_dir: Path) -> bool:
    """Whether a folder is in the run, holds a checkpoint or what is left of one, and is no checkpoint by its place."""
    in_run = {run_dir.resolve(), (run_dir / FOLDER).resolve()}.intersection(folder.parents)
    used = {path.resolve() for path in (run_dir / FROZEN, *step_folders(run_dir))}
    return bool(
        in_run
        and folder not in used
        and folder.is_dir()
        and all(path.is_file() and path.suffix in (".safetensors", ".json") for path in folder.iterdir())
    )


def _besides(engine: Engine, run_dir: Path) -> dict[str, Any]:
    """What a reader must know to have a whole model: where the frozen weights are from, and what adapters weigh."""
    facts: dict[str, Any] = {}
    if engine.frozen:
        facts["frozen_sha256"] = json_hash(read_manifest(run_dir / FROZEN))
    lora = engine.config.model.lora
    if lora.rank:
        facts["adapter_scale"] = lora.alpha / lora.rank
    return facts


def _begin(partial: Path, leftovers: list[Path], run_dir: Path, ranks: Ranks) -> str | None:
    """Let rank 0 make an empty folder; returns what went wrong."""
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
    """Make room for this step. The run resumed from before the checkpoints of it and of later ones, so they were
    refused: damaged ones are renamed, suspect ones deleted."""
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
    """Write this rank's fragments durably. Returns size and hash, or None where it owns nothing."""
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
    # Not by safetensors' save_file: it makes files that their owner alone may read, whatever the umask.
    with SafetensorsWriter(path, entries) as writer:
        for piece in pieces.values():
            writer.write(piece.cpu())
        return writer.finish()


def _ranges(engine: Engine) -> list[tuple[str, tuple[int, ...], int, int]]:
    return [(fragment.name, fragment.shape, fragment.start, fragment.stop) for fragment in engine.owned]


def _prove_coverage(
    ranges_by_rank: list[list[tuple[str, tuple[int, ...], int, int]]], engine: Engine
) -> dict[str, list[int]]:
    """Check that every parameter that is trained is covered exactly once. Returns their shapes.

    All kinds of a fragment have the fragment's range (asserted where they are written), so one proof serves all.
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
    """If any rank failed, clean up and fail on all."""
    failure = next((failure for failure in failures if failure), None)
    if failure:
        if ranks.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(f"the checkpoint was not written, earlier ones are whole: {failure}")
