"""Checkpoints of safetensors fragments and a manifest, without pickle and without files of DeepSpeed.

    checkpoints/step-00001000/
        rank-00000.safetensors     tensors "parameter|start|kind": elements [start, ...) of a flattened parameter
        manifest.json              written last, with a hash of itself; without it the folder is damaged
    frozen/                        the same for parameters that the run does not train, once for all its checkpoints

Kinds are `master` (fp32 weights) and the optimizer's states. Each rank writes the fragments that it owns. A reader
reads the ranges that it needs, so a checkpoint can be read by any number of ranks, at any ZeRO stage, and by programs
that do not use DeepSpeed. The manifest says which file has which range (see manifest.py), so a reader opens only the
files that it reads. Where it does not, as in older checkpoints, the reader opens all files and reads their headers.

The frozen parameters are read through each checkpoint of the run, whose manifest has their hash, so a reader sees a
whole model.

A checkpoint that was written while steps were being skipped is *suspect*, and its manifest says so: its weights are
those of the last step that was not skipped, which may have broken them. It is used only if the run has no other one.

This module reads checkpoints, and saving.py writes them. It does not import deepspeed, and imports torch only when it
reads a tensor.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from bigtx.config.runs import run_dir_of
from bigtx.engine.manifest import content_problem, overlapping
from bigtx.engine.trainable import is_adapter
from bigtx.utils.errors import CheckpointError
from bigtx.utils.files import json_hash, json_value, sha256_file, unsealed, write_sealed

if TYPE_CHECKING:
    from torch import Tensor


FORMAT_VERSION = 1
FOLDER = "checkpoints"
FROZEN = "frozen"
WEIGHT_KINDS = ("master", "ema")
"""Kinds that are weights; a frozen parameter has one value for both."""
MANIFEST = "manifest.json"
ANOTHER = "; use another checkpoint of the run"
"""The end of a sentence about a damaged checkpoint."""
EVERY = slice(None)
"""All files of a checkpoint."""
_NAME = re.compile(r"step-(\d{8,})")


class Checkpoint:
    """A complete checkpoint, open for reading ranges of it.

    Attributes:
        path: its folder.
        manifest: the facts of the run at that step; see saving.py.
        frozen: the parameters that the run does not train, if there are any.
        files: path, size and hash of each file by name, including those of `frozen`.
    """

    def __init__(self, path: Path, *, share: slice = EVERY) -> None:
        """Open a checkpoint.

        Args:
            path: a folder with a manifest.
            share: which of the files, in the order of their names, to check. Ranks that open a checkpoint together
                check each file once.

        Raises:
            CheckpointError: the manifest is missing or has another format, or a file is missing or has another size.
        """
        self.path = path
        self.manifest = read_manifest(path)
        self._names = sorted(self.manifest["files"])
        self.files: dict[str, tuple[Path, dict[str, Any]]] = {
            name: (path / name, self.manifest["files"][name]) for name in self._names
        }
        problems = [problem for name in self._names[share] if (problem := self._size_problem(name))]
        if problems:
            raise CheckpointError(f"{path}: {'; '.join(problems)}{ANOTHER}")
        self.frozen = self._open_frozen(share)
        if self.frozen is not None:
            self.files |= {f"{FROZEN}/{name}": file for name, file in self.frozen.files.items()}
        self._index: dict[tuple[str, str], list[tuple[int, int, str]]] | None = None
        self._open: dict[str, Any] = {}

    @property
    def manifest_sha256(self) -> str:
        """Return the hash of the manifest. It identifies the checkpoint, since the manifest has the files' hashes."""
        return json_hash(self.manifest)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of each parameter."""
        own = {name: tuple(shape) for name, shape in self.manifest["parameters"].items()}
        return own if self.frozen is None else own | self.frozen.shapes

    def kinds(self, name: str) -> list[str]:
        """Return the kinds that can be read of a parameter."""
        if self._is_frozen(name):
            own = {kind for trained in self.manifest["parameters"] for kind in self._own_kinds(trained)}
            return [kind for kind in WEIGHT_KINDS if kind in own]
        return self._own_kinds(name)

    def read(self, name: str, kind: str, start: int, stop: int) -> Tensor:
        """Read the elements [start, stop) of a flattened parameter or state.

        Returns:
            fp32 [stop - start].

        Raises:
            CheckpointError: the checkpoint does not have all of them.
        """
        if self.frozen is not None and self._is_frozen(name) and kind in WEIGHT_KINDS:
            try:
                return self.frozen.read(name, "master", start, stop)
            except CheckpointError as error:
                raise self._frozen_error(error) from None
        import torch

        places = [place for place in self._places(name, kind, start, stop) if place[0] < stop and place[1] > start]
        covered = sum(min(stop, last) - max(start, first) for first, last, _ in places)
        if covered != stop - start:
            raise CheckpointError(
                f"{self.path} holds {covered:,} of the {stop - start:,} elements [{start:,}, {stop:,}) "
                f"of {kind} of {name}; it was written by a run with another model or optimizer"
            )
        parts = [self._part(file, f"{name}|{first}|{kind}", last - first) for first, last, file in places]
        result = torch.empty(stop - start)
        for (first, last, _), part in zip(places, parts, strict=True):
            low, high = max(start, first), min(stop, last)
            result[low - start : high - start] = part[low - first : high - first]
        return result

    def close(self) -> None:
        """Close the files, so that the checkpoint's disk space is free once it is pruned."""
        self._index = None
        self._open.clear()
        if self.frozen is not None:
            self.frozen.close()

    def verify(self, share: slice = EVERY) -> list[str]:
        """Compare files with the hashes of the manifest.

        Args:
            share: which of `files`, in the order of their names, to read.

        Returns:
            One sentence for each bad file.
        """
        checked = (self._problem(name) for name in sorted(self.files)[share])
        return [problem for problem in checked if problem]

    def refuse_damaged(self) -> None:
        """Raise a CheckpointError with advice if a file does not have the hash of the manifest."""
        problems = self.verify()
        if any(problem.startswith(f"{FROZEN}/") for problem in problems):
            raise self._frozen_error("; ".join(problems))
        if problems:
            raise CheckpointError(f"{self.path}: {'; '.join(problems)}{ANOTHER}")

    def _problem(self, name: str) -> str | None:
        try:
            if problem := self._size_problem(name):
                return problem
            file, entry = self.files[name]
            if sha256_file(file) != entry["sha256"]:
                return f"{name} does not have the sha256 that {MANIFEST} names: its content has changed"
        except OSError as error:
            return f"{name} cannot be read: {error}"
        return None

    def _size_problem(self, name: str) -> str | None:
        file, entry = self.files[name]
        try:
            if not file.is_file():
                return f"{name} is missing"
            size = file.stat().st_size
        except OSError as error:
            return f"{name} cannot be read: {error}"
        return None if size == entry["size"] else f"{name} has {size:,} bytes instead of {entry['size']:,}"

    def _open_frozen(self, share: slice) -> Checkpoint | None:
        expected = self.manifest.get("frozen_sha256")
        if expected is None:
            return None
        folder = run_dir_of(self.path) / FROZEN
        try:
            frozen = Checkpoint(folder, share=share)
        except CheckpointError as error:
            raise self._frozen_error(error) from None
        if frozen.manifest_sha256 != expected:
            raise CheckpointError(
                f"{folder} does not hold the weights that {self.path} was trained with; restore it from a copy"
            )
        return frozen

    def _frozen_error(self, problem: object) -> CheckpointError:
        """Return the error for damaged frozen weights. All checkpoints of the run share them, so no other one helps."""
        return CheckpointError(
            f"{self.path} holds only what its run trains, and the other weights are damaged: "
            f"{str(problem).removesuffix(ANOTHER)}; restore {run_dir_of(self.path) / FROZEN} from a copy"
        )

    def _is_frozen(self, name: str) -> bool:
        return self.frozen is not None and name in self.frozen.manifest["parameters"]

    def _own_kinds(self, name: str) -> list[str]:
        if (ranges := self.manifest.get("ranges")) is not None:
            return ranges[name]["kinds"] if name in ranges else []
        return [kind for parameter, kind in self._read_headers() if parameter == name]

    def _places(self, name: str, kind: str, start: int, stop: int) -> Iterable[tuple[int, int, str]]:
        """Return the ranges [first, last) of a parameter with elements of [start, stop), and the file of each."""
        if (ranges := self.manifest.get("ranges")) is None:
            return self._read_headers().get((name, kind), ())
        if kind not in self._own_kinds(name):
            return ()
        numel = math.prod(self.manifest["parameters"][name])
        found = overlapping(ranges[name]["files"], numel, start, stop)
        return ((first, last, self._names[number]) for first, last, number in found)

    def _part(self, file: str, key: str, length: int) -> Any:
        """Return a tensor of a file, without reading it."""
        try:
            part = self._opened(file).get_slice(key)
        except SafetensorError as error:
            raise CheckpointError(
                f"{self.path / file} does not have the range {key[:100]!r}, which {MANIFEST} names: {error}{ANOTHER}"
            ) from error
        if part.get_shape() != [length]:
            raise CheckpointError(
                f"{self.path / file}: {key[:100]!r} has the shape {part.get_shape()} instead of [{length}], which "
                f"{MANIFEST} says{ANOTHER}"
            )
        return part

    def _opened(self, file: str) -> Any:
        if file not in self._open:
            try:
                self._open[file] = safe_open(self.path / file, framework="pt")
            except (SafetensorError, OSError) as error:
                what = f"{self.path / file} cannot be read as safetensors: {error}"
                raise CheckpointError(f"{what}{ANOTHER}") from error
        return self._open[file]

    def _read_headers(self) -> dict[tuple[str, str], list[tuple[int, int, str]]]:
        if self._index is not None:
            return self._index
        index: dict[tuple[str, str], list[tuple[int, int, str]]] = {}
        for file in self._names:
            handle = self._opened(file)
            for key in handle.keys():  # noqa: SIM118 - a file, not a dict
                try:
                    name, start, kind = key.split("|")
                    (length,) = handle.get_slice(key).get_shape()
                    index.setdefault((name, kind), []).append((int(start), int(start) + length, file))
                except ValueError:
                    raise CheckpointError(
                        f"{self.path / file} holds {key[:100]!r}, which is not a range of a parameter: bigtx did not "
                        f"write this file{ANOTHER}"
                    ) from None
        self._index = index
        return index


def list_checkpoints(folder: Path | str) -> list[Path]:
    """Return the complete checkpoints of a run, also suspect ones, newest first; for a checkpoint's folder only it."""
    return [path for path in step_folders(folder) if (path / MANIFEST).is_file()]


def step_folders(folder: Path | str) -> list[Path]:
    """Return all folders that have a checkpoint's name, newest first."""
    folder = Path(folder)
    if _NAME.fullmatch(folder.name) and folder.is_dir():
        return [folder]
    found = [path for path in (folder / FOLDER).glob("step-*") if _NAME.fullmatch(path.name)]
    return sorted(found, key=step_of, reverse=True)


def newest(folder: Path | str) -> Path:
    """Return the newest complete checkpoint of a run that is not suspect; the newest of all where every one is suspect.

    Raises:
        CheckpointError: the run has no complete checkpoint, or one that was read is damaged.
    """
    checkpoints = list_checkpoints(folder)
    place = Path(folder) / FOLDER
    if place.is_symlink() and not place.exists():
        raise CheckpointError(f"{place} is a link to {os.readlink(place)}, which is missing; mount that disk")
    if not checkpoints:
        raise CheckpointError(f"{folder} has no complete checkpoint; name a run that has saved one")
    return next((path for path in checkpoints if not is_suspect(read_manifest(path))), checkpoints[0])


def preferred(folder: Path | str) -> Path:
    """Return the checkpoint that represents a run: the best one by the run's measurement, else the `newest`.

    Raises:
        CheckpointError: the run has no complete checkpoint, or one that was read is damaged.
    """
    default = newest(folder)
    # A measurement of suspect weights is never the best, so the newest checkpoint that is not suspect has it.
    best = read_manifest(default).get("state", {}).get("best_step")
    return next((path for path in list_checkpoints(folder) if step_of(path) == best), default)


def is_suspect(manifest: Mapping[str, Any]) -> bool:
    """Return whether a checkpoint was written while steps were being skipped; see the top of this module."""
    return bool(manifest.get("suspect"))


def step_of(path: Path) -> int:
    """Return the step in a checkpoint's name."""
    return int(path.name.removeprefix("step-"))


def load_weights(checkpoint: Path | str, kind: str = "master") -> Iterator[tuple[str, Tensor]]:
    """Yield every parameter of a checkpoint, whole: name and fp32 tensor, one at a time. Hashes are verified first.

    Args:
        checkpoint: the checkpoint's folder.
        kind: master, or ema where the run kept an average.

    Raises:
        CheckpointError: a file is damaged, or the checkpoint has no weights of this kind.
    """
    opened = Checkpoint(Path(checkpoint))
    opened.refuse_damaged()
    for name, shape in opened.shapes.items():
        if kind not in opened.kinds(name):
            raise CheckpointError(
                f"{checkpoint} holds no {kind} weights (it has {', '.join(opened.kinds(name))}); "
                "an average of the weights is kept by runs with optimizer.ema_decay"
            )
        yield name, opened.read(name, kind, 0, math.prod(shape)).view(shape)


def read_manifest(path: Path) -> dict[str, Any]:
    """Read the manifest of a checkpoint, and check its hash and the folder's name.

    Raises:
        CheckpointError: it is missing, damaged, of another format, or of another step than the folder's name says.
    """
    try:
        manifest = json_value((path / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} has no {MANIFEST}: it is not a whole checkpoint of bigtx") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path / MANIFEST} cannot be read: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT_VERSION:
        raise CheckpointError(f"{path / MANIFEST} is not of format {FORMAT_VERSION}, the one that this bigtx reads")
    content = unsealed(manifest)
    if content is None:
        raise CheckpointError(f"{path / MANIFEST} does not have the hash that it names: its content has changed")
    if _NAME.fullmatch(path.name) and content.get("step") != step_of(path):
        raise CheckpointError(
            f"{path} holds the checkpoint of step {content.get('step')}, but its name is that of step "
            f"{step_of(path)}: it is a copy under another name, or was renamed; remove it, or restore its name"
        )
    if problem := content_problem(content):
        raise CheckpointError(f"{path / MANIFEST}: {problem}; bigtx does not write such a manifest{ANOTHER}")
    return content


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Complete a checkpoint's folder: write the manifest, with a hash of itself."""
    write_sealed(folder / MANIFEST, manifest)


class MergedCheckpoint(Checkpoint):
    """A checkpoint, read as if its adapters had been added to their matrices. One without adapters is read as it is."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of each parameter, without the adapters."""
        return {name: shape for name, shape in super().shapes.items() if not is_adapter(name)}

    def read(self, name: str, kind: str, start: int, stop: int) -> Tensor:
        """Read the elements [start, stop) of a flattened parameter or state, as `Checkpoint.read`."""
        value = super().read(name, kind, start, stop)
        module, _, which = name.rpartition(".")
        a, b = f"{module}.adapter.a", f"{module}.adapter.b"
        shapes = super().shapes
        if which != "weight" or a not in shapes or kind not in WEIGHT_KINDS:
            return value
        read_own = super().read
        left, right = (read_own(part, kind, 0, math.prod(shapes[part])).view(shapes[part]) for part in (b, a))
        # Compute the whole product for any range: with other shapes the sums may have another order, and an engine
        # would get other last bits than the files.
        product = (left @ right).view(-1)
        return value.add_(product[start:stop], alpha=self.manifest["adapter_scale"])
