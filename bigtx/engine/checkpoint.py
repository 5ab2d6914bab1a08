"""Checkpoints: safetensors fragments and a manifest. No pickle, and no DeepSpeed file.

    checkpoints/step-00001000/
        rank-00000.safetensors     tensors "parameter|start|kind": elements [start, ...) of a flattened parameter
        manifest.json              written last, with a hash of itself; without it the folder is damaged

Kinds are `master` (fp32 weights) and the optimizer's states. Each rank writes what it owns; whoever loads reads
the ranges that it needs, so one checkpoint serves any number of ranks, any ZeRO stage, and programs that know
nothing of DeepSpeed. It is written under another name, made durable, proved complete, then renamed; a checkpoint that
was found damaged is set aside as `step-N.damaged` once a later save needs its place, and never deleted.

This module reads without importing deepspeed; `save` is given an engine.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from bigtx.utils.errors import CheckpointError
from bigtx.utils.files import fsync_dir, sha256_file, write_json

if TYPE_CHECKING:
    from bigtx.engine.engine import Engine
    from bigtx.engine.ranks import Ranks

FORMAT_VERSION = 1
FOLDER = "checkpoints"
MANIFEST = "manifest.json"
_NAME = re.compile(r"step-(\d{8,})")


class Checkpoint:
    """A complete checkpoint, open for reading ranges of it.

    Attributes:
        path: its folder.
        manifest: facts of the run at that step; see `save`.
    """

    def __init__(self, path: Path) -> None:
        """Args:
        path: a folder with a manifest.

        Raises:
            CheckpointError: no manifest, one of another format, or files that are missing or of another size.
        """
        self.path = path
        self.manifest = _read_manifest(path)
        problems = [problem for name in self.manifest["files"] if (problem := self._size_problem(name))]
        if problems:
            raise CheckpointError(f"{path}: {'; '.join(problems)}; use another checkpoint of the run")
        self._index: dict[tuple[str, str], list[tuple[int, int, str, str]]] | None = None
        self._open: dict[str, Any] = {}

    @property
    def manifest_sha256(self) -> str:
        """What the manifest hashes to; it names all files with their hashes, so it stands for all the checkpoint."""
        return _manifest_hash(self.manifest)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each parameter."""
        return {name: tuple(shape) for name, shape in self.manifest["parameters"].items()}

    def kinds(self, name: str) -> list[str]:
        """Kinds stored for a parameter."""
        self._read_headers()
        assert self._index is not None
        return [kind for parameter, kind in self._index if parameter == name]

    def read(self, name: str, kind: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of a flattened parameter or state.

        Returns:
            fp32 [stop - start].

        Raises:
            CheckpointError: the checkpoint does not hold them all.
        """
        self._read_headers()
        assert self._index is not None
        result, covered = torch.empty(stop - start), 0
        for first, last, file, key in self._index.get((name, kind), ()):
            low, high = max(start, first), min(stop, last)
            if low < high:
                result[low - start : high - start] = self._open[file].get_slice(key)[low - first : high - first]
                covered += high - low
        if covered != stop - start:
            raise CheckpointError(
                f"{self.path} holds {covered:,} of the {stop - start:,} elements [{start:,}, {stop:,}) "
                f"of {kind} of {name}; it was written by a run with another model or optimizer"
            )
        return result

    def close(self) -> None:
        """Let go of the files, so that the checkpoint's space is free once it is pruned."""
        self._index = None
        self._open.clear()

    def verify(self, names: Iterable[str] | None = None) -> list[str]:
        """Compare files with the hashes of the manifest.

        Args:
            names: files to read; all by default.

        Returns:
            One sentence for each bad file.
        """
        checked = (self._problem(name) for name in (self.manifest["files"] if names is None else names))
        return [problem for problem in checked if problem]

    def _problem(self, name: str) -> str | None:
        try:
            if problem := self._size_problem(name):
                return problem
            if sha256_file(self.path / name) != self.manifest["files"][name]["sha256"]:
                return f"{name} does not have the sha256 that {MANIFEST} names: its content has changed"
        except OSError as error:
            return f"{name} cannot be read: {error}"
        return None

    def _size_problem(self, name: str) -> str | None:
        expected, file = self.manifest["files"][name]["size"], self.path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != expected:
            return f"{name} has {file.stat().st_size:,} bytes instead of {expected:,}"
        return None

    def _read_headers(self) -> None:
        if self._index is not None:
            return
        index: dict[tuple[str, str], list[tuple[int, int, str, str]]] = {}
        for file in sorted(self.manifest["files"]):
            try:
                handle = self._open[file] = safe_open(self.path / file, framework="pt")
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{self.path / file} cannot be read as safetensors: {error}") from error
            for key in handle.keys():  # noqa: SIM118 - a file, not a dict
                name, start, kind = key.split("|")
                length = handle.get_slice(key).get_shape()[0]
                index.setdefault((name, kind), []).append((int(start), int(start) + length, file, key))
        self._index = index


def list_checkpoints(folder: Path | str) -> list[Path]:
    """Complete checkpoints of a run, newest first; a checkpoint's own folder gives itself."""
    return [path for path in _step_folders(folder) if (path / MANIFEST).is_file()]


def _step_folders(folder: Path | str) -> list[Path]:
    """Everything that has a checkpoint's name, newest first."""
    folder = Path(folder)
    if _NAME.fullmatch(folder.name) and folder.is_dir():
        return [folder]
    found = [path for path in (folder / FOLDER).glob("step-*") if _NAME.fullmatch(path.name)]
    return sorted(found, key=_step, reverse=True)


def newest(folder: Path | str) -> Path:
    """The newest complete checkpoint of a run.

    Raises:
        CheckpointError: there is none.
    """
    checkpoints = list_checkpoints(folder)
    if not checkpoints:
        raise CheckpointError(f"{folder} has no complete checkpoint: is it a run folder, and has the run saved one?")
    return checkpoints[0]


def preferred(folder: Path | str) -> Path:
    """The checkpoint to use a run by: the best one where the run chose by a measurement, else the newest.

    Raises:
        CheckpointError: there is none.
    """
    checkpoints = list_checkpoints(folder)
    if not checkpoints:
        return newest(folder)  # Says so.
    best = _best_step(checkpoints[0])
    return next((path for path in checkpoints if _step(path) == best), checkpoints[0])


def _best_step(checkpoint: Path) -> int | None:
    """The step of the best checkpoint as the run knew it at this one."""
    step: int | None = _read_manifest(checkpoint).get("state", {}).get("best_step")
    return step


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def load_weights(checkpoint: Path | str, kind: str = "master") -> Iterator[tuple[str, Tensor]]:
    """Every parameter of a checkpoint, whole: name and fp32 tensor, one at a time. Hashes are verified first.

    Args:
        kind: master, or ema where the run kept an average.

    Raises:
        CheckpointError: a damaged file, or no such kind.
    """
    opened = Checkpoint(Path(checkpoint))
    problems = opened.verify()
    if problems:
        raise CheckpointError(f"{checkpoint}: {'; '.join(problems)}; use another checkpoint of the run")
    for name, shape in opened.shapes.items():
        if kind not in opened.kinds(name):
            raise CheckpointError(
                f"{checkpoint} holds no {kind} weights (it has {', '.join(opened.kinds(name))}); "
                "an average of the weights is kept by runs with optimizer.ema_decay"
            )
        numel = torch.Size(shape).numel()
        yield name, opened.read(name, kind, 0, numel).view(shape)


def choose(folder: Path, ranks: Ranks, warn: Any) -> Checkpoint | None:
    """The newest checkpoint whose files all have their hashes; each rank checks its share of the files.

    Args:
        warn: called on each rank with a sentence for each checkpoint that was refused.

    Returns:
        None where the run has no checkpoint folder yet.

    Raises:
        CheckpointError: there are checkpoints, but none is whole: starting again from step 0 must be on purpose.
    """
    candidates = ranks.from_first([str(path) for path in _step_folders(folder)])
    for candidate in candidates:
        problems: list[str] = []
        checkpoint = None
        try:
            checkpoint = Checkpoint(Path(candidate))
            problems = checkpoint.verify(sorted(checkpoint.manifest["files"])[ranks.rank :: ranks.world_size])
        except CheckpointError as error:
            problems = [str(error)]
        problems = sorted({problem for found in ranks.gather(problems) for problem in found})
        if not problems:
            return checkpoint
        warn(f"{candidate} is damaged and is not used: {'; '.join(problems)}")
    if candidates:
        raise CheckpointError(
            f"every checkpoint in {folder / FOLDER} is damaged (see above); restore one from a copy, or "
            "start over in another run_dir"
        )
    return None


def save(engine: Engine, ranks: Ranks, run_dir: Path, facts: dict[str, Any], *, keep: int) -> Path:
    """Write a checkpoint of the engine. Every rank must call it.

    Args:
        facts: what the manifest records beside the files: at least `step`.
        keep: newest checkpoints to keep; older ones, but for the best, go once this one is complete.

    Returns:
        Its folder.

    Raises:
        CheckpointError: on every rank, if one could not write; older checkpoints are untouched.
    """
    final = run_dir / FOLDER / f"step-{facts['step']:08d}"
    partial = final.with_name(final.name + ".partial")
    name, failure, entry = f"rank-{ranks.rank:05d}.safetensors", None, None
    if ranks.rank == 0:
        try:
            for leftover in (run_dir / FOLDER).glob("step-*.partial"):
                shutil.rmtree(leftover, ignore_errors=True)
            partial.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            failure = f"could not make {partial}: {error}"
    _raise_first(ranks.gather(failure), partial, ranks)
    try:
        entry = _write_fragments(engine, partial / name)
    except (OSError, SafetensorError) as error:
        failure = f"rank {ranks.rank} could not write {partial / name}: {error}"
    reports = ranks.gather((failure, name, entry, _ranges(engine)))
    _raise_first([report[0] for report in reports], partial, ranks)

    if ranks.rank == 0:
        try:
            manifest = {
                "format": FORMAT_VERSION,
                **facts,
                "world_size": ranks.world_size,
                "zero_stage": engine.stage,
                "precision": engine.config.engine.precision,
                "loss_scale": engine.loss_scale(),
                "num_updates": engine.optimizer.num_updates,
                "parameters": _prove_coverage([report[3] for report in reports], engine),
                "files": {name: entry for _, name, entry, _ in reports if entry},
            }
            write_manifest(partial, manifest)
            fsync_dir(partial)
            _set_aside(run_dir, from_step=facts["step"])
            os.rename(partial, final)
            fsync_dir(final.parent)
        except OSError as error:
            failure = f"could not complete {final}: {error}"
    _raise_first(ranks.gather(failure), partial, ranks)
    if ranks.rank == 0:
        best = facts.get("state", {}).get("best_step")
        for old in [path for path in list_checkpoints(run_dir)[keep:] if _step(path) != best]:
            # Half a checkpoint must not look like a damaged one.
            gone = old.with_name(old.name + ".partial")
            os.rename(old, gone)
            shutil.rmtree(gone, ignore_errors=True)
    return final


def _set_aside(run_dir: Path, *, from_step: int) -> None:
    """Rename the checkpoints of this step and later ones: the run went on from before them, so they were refused."""
    for path in _step_folders(run_dir):
        if _step(path) >= from_step:
            damaged = path.with_name(path.name + ".damaged")
            shutil.rmtree(damaged, ignore_errors=True)
            os.rename(path, damaged)


def _write_fragments(engine: Engine, path: Path) -> dict[str, Any] | None:
    """Write this rank's fragments durably. Returns size and hash, or None where it owns nothing."""
    tensors = {}
    for fragment in engine.owned:
        states = engine.optimizer.state[fragment.flat]
        sources = {"master": fragment.flat} | {
            kind: states[kind] for kind in engine.optimizer.state_kinds(fragment.group)
        }
        for kind, source in sources.items():
            assert source.dtype == torch.float32 and source.numel() == fragment.flat.numel()
            tensors[f"{fragment.name}|{fragment.start}|{kind}"] = _on_host(fragment.view(source))
    if not tensors:
        return None
    save_file(tensors, path)
    with open(path, "rb+") as file:
        os.fsync(file.fileno())
    return {"size": path.stat().st_size, "sha256": sha256_file(path)}


def _on_host(tensor: Tensor) -> Tensor:
    """A copy in host memory."""
    return tensor.clone() if tensor.device.type == "cpu" else tensor.cpu()


def _ranges(engine: Engine) -> list[tuple[str, tuple[int, ...], int, int]]:
    return [(fragment.name, fragment.shape, fragment.start, fragment.stop) for fragment in engine.owned]


def _prove_coverage(
    ranges_by_rank: list[list[tuple[str, tuple[int, ...], int, int]]], engine: Engine
) -> dict[str, list[int]]:
    """Check that every parameter of the module is covered exactly once. Returns the parameters' shapes.

    All kinds of a fragment have the fragment's range (asserted where they are written), so one proof serves all.
    """
    pieces: dict[str, list[tuple[int, int]]] = {}
    shapes: dict[str, list[int]] = {}
    for ranges in ranges_by_rank:
        for name, shape, start, stop in ranges:
            pieces.setdefault(name, []).append((start, stop))
            shapes[name] = list(shape)
    assert set(pieces) == {name for name, _ in engine.module.named_parameters()}
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


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} has no {MANIFEST}: it is not a whole checkpoint of bigtx") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path / MANIFEST} cannot be read: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT_VERSION:
        raise CheckpointError(f"{path / MANIFEST} is not of format {FORMAT_VERSION}, the one that this bigtx reads")
    if manifest.pop("sha256", None) != _manifest_hash(manifest):
        raise CheckpointError(f"{path / MANIFEST} does not have the hash that it names: its content has changed")
    return manifest


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Complete a checkpoint's folder: write the manifest, with a hash of itself."""
    write_json(folder / MANIFEST, manifest | {"sha256": _manifest_hash(manifest)})


def _manifest_hash(manifest: dict[str, Any]) -> str:
    """sha256 of the manifest's canonical JSON, its own hash left out."""
    canonical = json.dumps(manifest, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()
