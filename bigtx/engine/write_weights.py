"""Write weights without an engine: safetensors files one tensor at a time, and a checkpoint of such files.

The header of a safetensors file has the offset of each tensor. Since the shapes are known beforehand, a file of any
size is written with only one tensor in memory. This module does not import deepspeed.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bigtx.engine.checkpoint import FOLDER, FORMAT_VERSION, write_manifest
from bigtx.engine.manifest import table_of
from bigtx.utils.files import publish

DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
"""Names in safetensors files of the types that are written here."""

PART_BYTES = 4 * 2**30
"""The approximate size of the files of a written checkpoint."""

BLOCK_BYTES = 16 * 2**20
"""The bytes that are written and then hashed at once, while they are in the processor's cache or near it."""

Entry = tuple[str, tuple[int, ...], torch.dtype]
"""Name, shape and type of a tensor."""

Note = Callable[[int], None]
"""A function that is called with the number of bytes of each block that was written."""

Part = Mapping[str, tuple[int, ...]]
"""The shapes of the parameters of one file, in their order."""


class SafetensorsWriter:
    """A safetensors file that is written one tensor at a time, in the order given at the start."""

    def __init__(self, path: Path, entries: Sequence[Entry], metadata: Mapping[str, str] | None = None) -> None:
        """Begin the file.

        Args:
            path: the file to create.
            entries: all tensors that will be written, in order.
            metadata: texts for the header.
        """
        header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
        end = 0
        for name, shape, dtype in entries:
            start, end = end, end + math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        content = json.dumps(header, separators=(",", ":")).encode()
        content += b" " * (-len(content) % 8)  # So that tensors begin at a multiple of 8.
        self._left = list(reversed(entries))
        self._file = open(path, "xb")  # noqa: SIM115 - `__exit__` closes it
        self._hash, self._size = hashlib.sha256(), 0
        self.note: Note = lambda num_bytes: None
        self._put(len(content).to_bytes(8, "little"))
        self._put(content)

    def write(self, tensor: Tensor) -> None:
        """Write the next tensor; its shape and type must be those of its entry."""
        name, shape, dtype = self._left.pop()
        assert (tuple(tensor.shape), tensor.dtype) == (shape, dtype), name
        self._put_content(tensor)

    def write_joined(self, tensors: Tensor) -> None:
        """Write the next tensors, which follow each other in one of the same type."""
        left = tensors.numel()
        while left > 0:
            _, shape, dtype = self._left.pop()
            assert dtype == tensors.dtype
            left -= math.prod(shape)
        assert left == 0, "the tensors end within an entry"
        self._put_content(tensors)

    def finish(self) -> dict[str, Any]:
        """Make the file durable. Returns its `size` and `sha256`."""
        assert not self._left, "a tensor of the entries was not written"
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return {"size": self._size, "sha256": self._hash.hexdigest()}

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def _put_content(self, tensor: Tensor) -> None:
        data = tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().data
        for start in range(0, len(data), BLOCK_BYTES):
            self._put(data[start : start + BLOCK_BYTES])

    def _put(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self._hash.update(data)
        self._size += len(data)
        self.note(len(data))


def save_weights(
    run_dir: Path,
    facts: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    weights: Iterable[tuple[str, Tensor]],
    *,
    part_bytes: int = PART_BYTES,
) -> Path:
    """Write a checkpoint with only weights, one tensor in memory at a time. It gets its name once it is complete.

    Args:
        run_dir: the run's folder.
        facts: further content of the manifest: at least `step`.
        shapes: the shape of every parameter.
        weights: name and fp32 tensor of every parameter, in the same order.
        part_bytes: the size at which the next file begins.

    Returns:
        The checkpoint's folder.

    Raises:
        OSError: it could not be written, and all its files are removed; or its name may be lost at a power failure.
    """
    final = run_dir / FOLDER / f"step-{facts['step']:08d}"
    partial = final.with_name(final.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        parts, given = parts_of("rank", shapes, part_bytes), iter(weights)
        files = {file: write_part(partial / file, part, _expected(given, part)) for file, part in parts.items()}
        assert next(given, None) is None, "there are more weights than shapes"
        write_manifest(partial, {"format": FORMAT_VERSION, **facts, **description_of(parts, files)})
        publish(partial, final)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return final


def _expected(given: Iterator[tuple[str, Tensor]], part: Part) -> Iterator[Tensor]:
    """Yield the next weights, which must be those of a part, in its order."""
    for name, shape in part.items():
        came, weight = next(given)
        assert came == name and tuple(weight.shape) == tuple(shape), (came, name)
        yield weight


def write_part(path: Path, shapes: Part, weights: Iterable[Tensor]) -> dict[str, Any]:
    """Write whole fp32 weights as one file of a checkpoint, durably.

    Args:
        path: the file to create.
        shapes: the shape of each parameter.
        weights: the weights of each parameter of `shapes`, in the same order.

    Returns:
        The file's `size` and `sha256`.
    """
    entries = [(f"{name}|0|master", (math.prod(shape),), torch.float32) for name, shape in shapes.items()]
    return write_file(path, entries, (weight.reshape(-1) for weight in weights))


def write_file(
    path: Path, entries: Sequence[Entry], content: Iterable[Tensor], note: Note = lambda num_bytes: None
) -> dict[str, Any]:
    """Write tensors as one file, durably.

    Args:
        path: the file to create.
        entries: all tensors of the file.
        content: their content in the same order, each piece one tensor or several.
        note: called with the number of bytes of each block that was written.

    Returns:
        The file's `size` and `sha256`.
    """
    # safetensors' save_file is not used: it makes files that only their owner may read, and ignores the umask.
    with SafetensorsWriter(path, entries) as writer:
        writer.note = note
        for piece in content:
            writer.write_joined(piece.cpu())
        return writer.finish()


def parts_of(prefix: str, shapes: Mapping[str, tuple[int, ...]], part_bytes: int) -> dict[str, Part]:
    """Divide fp32 parameters into files, in their order.

    Args:
        prefix: the beginning of the files' names.
        shapes: the shape of each parameter.
        part_bytes: the most bytes of a file that has several parameters.

    Returns:
        The shapes of the parameters of each file, by the file's name.
    """
    sizes = {name: 4 * math.prod(shape) for name, shape in shapes.items()}
    return {
        f"{prefix}-{number:05d}.safetensors": {name: shapes[name] for name in names}
        for number, names in enumerate(groups(sizes, part_bytes))
    }


def description_of(parts: Mapping[str, Part], files: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """Return what a manifest says about files of whole weights: `parameters`, `files` and `ranges`.

    Args:
        parts: the result of `parts_of`.
        files: the result of `write_part` for each file.
    """
    ranges = {
        file: [(name, shape, ("master",), 0, math.prod(shape)) for name, shape in part.items()]
        for file, part in parts.items()
    }
    parameters, table = table_of(ranges, {name for part in parts.values() for name in part})
    return {"parameters": parameters, "files": dict(files), "ranges": table}


def groups(sizes: Mapping[str, int], most: int) -> Iterator[list[str]]:
    """Yield the names in their order, in groups whose sizes sum to at most `most`, or of one name."""
    group: list[str] = []
    size = 0
    for name, own in sizes.items():
        if group and size + own > most:
            yield group
            group, size = [], 0
        group.append(name)
        size += own
    if group:
        yield group
