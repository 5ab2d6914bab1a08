"""The reference model's numbers for each example, from before the first step, in a file of the run folder.

All ranks compute them once, and every later start of the run reads them; if the file is missing, they are computed
again from the base. They are valid only for the same records, settings and base.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from bigtx.utils.errors import LaunchError
from bigtx.utils.files import write_atomic

if TYPE_CHECKING:
    from bigtx.engine.engine import Engine
    from bigtx.engine.ranks import Ranks
    from bigtx.finetuning.tasks.task import RecordTask

FILE = "reference.safetensors"

Reference = dict[str, np.ndarray]
"""fp64 [examples, numbers] by split."""


def make(
    engine: Engine, ranks: Ranks, task: RecordTask, splits: Mapping[str, Sequence[Any]], batch_size: int
) -> Reference:
    """Compute the numbers of all examples with the current model, on every rank; every rank must call it."""
    from bigtx.finetuning.measure import by_all_ranks

    engine.deepspeed.eval()
    return {
        name: np.array(by_all_ranks(engine, ranks, examples, task.refer, batch_size=batch_size), np.float64)
        for name, examples in splits.items()
        if examples
    }


def key(**facts: Any) -> str:
    """Return a hash of everything that determines a reference."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def read(folder: Path, wanted: str) -> Reference | None:
    """Return the reference of a run folder, or None if it is missing, damaged or of another key.

    Args:
        wanted: the result of `key`.
    """
    path = folder / FILE
    try:
        with safe_open(path, framework="numpy") as file:
            facts = file.metadata() or {}
            values = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - a file, not a dict
    except (OSError, SafetensorError):
        return None
    return values if facts.get("key") == wanted and facts.get("sha256") == _digest(values) else None


def write(folder: Path, wanted: str, values: Reference) -> None:
    """Write a reference into the run folder.

    Raises:
        LaunchError: the folder cannot be written.
    """
    path = folder / FILE
    try:
        write_atomic(path, save(values, metadata={"key": wanted, "sha256": _digest(values)}))
    except OSError as error:
        raise LaunchError(f"{path} cannot be written: {error}") from error


def _digest(values: Reference) -> str:
    digest = hashlib.sha256()
    for name in sorted(values):
        digest.update(name.encode() + values[name].tobytes())
    return digest.hexdigest()
