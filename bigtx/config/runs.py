"""The facts in a run's folder: its config.yaml as plain values, and whether it is a run.

Reads no large file, and imports no slow package.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from bigtx.utils.errors import CheckpointError
from bigtx.utils.files import read_object
from bigtx.utils.paths import MODEL, kind_of_folder

CONFIG = "config.yaml"
ENVIRONMENT = "environment.json"
CHECKPOINTS = "checkpoints"


def run_dir_of(folder: Path | str) -> Path:
    """Return the run of a folder that is the run or one of its checkpoints.

    `checkpoints` in the run may be a link to another disk, and the folder a link to a checkpoint or a run.
    """
    folder = Path(folder).absolute()
    while folder.parent.name != CHECKPOINTS and folder.is_symlink() and folder.exists():
        # Follow one link at a time: the final target may be outside the run.
        folder = folder.parent / os.readlink(folder)
    if folder.parent.name != CHECKPOINTS:
        folder = folder.resolve()
    return folder.parent.parent if folder.parent.name == CHECKPOINTS else folder


def has_steps(run_dir: Path) -> bool:
    """Return whether a run's folder has an entry with the name of a checkpoint."""
    return any((run_dir / CHECKPOINTS).glob("step-*[0-9]"))


def is_run(folder: Path) -> bool:
    """Return whether bigtx made a folder as a run: it has checkpoints, or the description that every start writes
    with.
    """
    packages = read_object(folder / ENVIRONMENT).get("packages")
    return has_steps(folder) or (isinstance(packages, dict) and "bigtx" in packages)


def gives_config(run_dir: Path, files: Iterable[Path]) -> bool:
    """Return whether a command names the file that is at the path of the run's config."""
    own = run_dir / CONFIG
    return own.is_file() and any(own.samefile(file) for file in files)


def read_values(folder: Path | str) -> dict[str, Any]:
    """Return the config of a run, or of the run of a checkpoint.

    Raises:
        CheckpointError: the folder does not exist, is not a run, or has a damaged config.
    """
    if not Path(folder).is_dir():
        raise CheckpointError(f"{folder} is not a folder; name a run's folder (its run_dir) or one of its checkpoints")
    path = run_dir_of(folder) / CONFIG
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        kind = kind_of_folder(folder)
        advice = "`bigtx import` converts it to a run" if kind == MODEL else "name the run_dir of a training"
        what = f"it is {kind}" if kind else f"it has no {CONFIG}"
        raise CheckpointError(f"{folder} is not a run: {what}; {advice}") from None
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{path} cannot be read: {reason}; restore it from a copy") from error
    if not isinstance(values, dict) or not isinstance(values.get("model", {}), dict):
        raise CheckpointError(f"{path} is not a run's config; restore it from a copy")
    return values


def why_no_run(folder: str) -> str | None:
    """Return why a folder is neither a run nor one of its checkpoints, as the end of a sentence about it; None if it
    is a run or a checkpoint.
    """
    if not Path(folder).is_dir():
        return "no such folder; name a run or one of its checkpoints"
    try:
        read_values(folder)
    except CheckpointError as error:
        return str(error)
    return None
