"""The run folder: opened by one run at a time, it says all about the run.

config.yaml        the resolved config            tokenizer/       copied from the data
deepspeed.json     as given to DeepSpeed          environment.json versions, commit, hardware
metrics.jsonl, samples.jsonl, events.jsonl, wandb/, logs/ and checkpoints/ grow as the run goes on
frozen/            the weights that the run does not train, where there are any; every checkpoint is read with them
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from bigtx.config import changes
from bigtx.config.load import to_dict, to_yaml
from bigtx.config.runs import CONFIG
from bigtx.config.schema import RunConfig
from bigtx.tokenizer.tokenizer import Tokenizer
from bigtx.utils.errors import CheckpointError, LaunchError
from bigtx.utils.files import write_atomic, write_json
from bigtx.utils.locks import FolderLock
from bigtx.utils.secrets import scrub

UNTOLD = ("run_dir", "allow_changes")
"""Settings whose change says nothing about the training."""


@dataclass(frozen=True)
class Opened:
    """What opening the folder found.

    Attributes:
        lock: held until the run ends.
        changed: settings that differ from the run's earlier part, allowed by name.
    """

    lock: FolderLock
    changed: list[dict[str, Any]]


def open_run_folder(config: RunConfig) -> Opened:
    """Make the folder or come back to it, and compare settings where the run has made steps. Only rank 0 calls this.

    Raises:
        LaunchError: it cannot be written, or another run holds it.
        ConfigError: the config differs from the run's own in a way that resume does not allow.
        CheckpointError: the folder holds something else, or lost its config.
    """
    run_dir = Path(config.run_dir)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = FolderLock(run_dir)
    except OSError as error:
        raise LaunchError(f"run_dir={config.run_dir!r} cannot be written: {error}; name another folder") from error
    try:
        return Opened(lock, _changed_settings(run_dir, config))
    except BaseException:
        lock.release()
        raise


def _changed_settings(run_dir: Path, config: RunConfig) -> list[dict[str, Any]]:
    """What differs from the run so far, all of it allowed; nothing where no step has been saved."""
    if not any((run_dir / "checkpoints").glob("step-*[0-9]")):
        return []
    saved = read_config(run_dir)
    if saved is None:
        raise CheckpointError(
            f"{run_dir} holds checkpoints but no {CONFIG}: restore that file from a copy, or name another run_dir"
        )
    found = changes.compare(saved, config)
    changes.refuse(found, config.allow_changes)
    return [{"key": change.key, "old": change.old, "new": change.new} for change in found if change.key not in UNTOLD]


def read_config(run_dir: Path) -> dict[str, Any] | None:
    """The run's config as plain data, or None in a new folder."""
    path = run_dir / CONFIG
    if not path.is_file():
        return None
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def describe_run(
    config: RunConfig, *, tokenizer: Tokenizer, deepspeed: dict[str, Any], environment: dict[str, Any]
) -> None:
    """Write what is known once the engine stands. Rank 0 only.

    Raises:
        LaunchError: the folder cannot be written.
    """
    run_dir = Path(config.run_dir)
    try:
        write_atomic(run_dir / CONFIG, to_yaml(config))
        write_json(run_dir / "deepspeed.json", deepspeed)
        write_json(run_dir / "environment.json", scrub(environment))
        tokenizer.save(run_dir / "tokenizer")
    except OSError as error:
        raise LaunchError(f"run_dir={config.run_dir!r} cannot be written: {error}") from error


def dump(config: RunConfig) -> dict[str, Any]:
    """The resolved config as JSON-ready data."""
    return json.loads(json.dumps(to_dict(config)))
