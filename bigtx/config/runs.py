"""What a run's folder says about itself: its config.yaml, as plain values. Reads nothing else of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from bigtx.utils.errors import CheckpointError

CONFIG = "config.yaml"


def run_dir_of(folder: Path | str) -> Path:
    """The run of a folder that is the run or one of its checkpoints."""
    folder = Path(folder).resolve()
    return folder.parent.parent if folder.parent.name == "checkpoints" else folder


def read_values(folder: Path | str) -> dict[str, Any]:
    """The config of a run, or of the run of a checkpoint.

    Raises:
        CheckpointError: no such folder, or it is no run.
    """
    if not Path(folder).is_dir():
        raise CheckpointError(f"{folder} is not a folder; name a run's folder (its run_dir) or one of its checkpoints")
    path = run_dir_of(folder) / CONFIG
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        advice = (
            "it is a Hugging Face model; `bigtx import` makes a run of it"
            if (Path(folder) / "config.json").is_file()
            else "name the run_dir of a training"
        )
        raise CheckpointError(f"{folder} is not a run: it has no {CONFIG}; {advice}") from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} is not a run's config; restore it from a copy")
    return values
