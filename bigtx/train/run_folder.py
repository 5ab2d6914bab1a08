"""The run folder: one run at a time opens it, and it holds everything about the run.

config.yaml        the resolved config            tokenizer/       copied from the data
deepspeed.json     as given to DeepSpeed          environment.json versions, commit, hardware
config.given.yaml  the user's own config.yaml, if there was one
metrics.jsonl, samples.jsonl, events.jsonl, wandb/, logs/ and checkpoints/ grow during the run
frozen/            the weights that the run does not train, if there are any; they belong to every checkpoint
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bigtx.config import changes
from bigtx.config.load import to_dict, yaml_of
from bigtx.config.runs import CHECKPOINTS, CONFIG, ENVIRONMENT, gives_config, is_run, with_absolute_paths
from bigtx.config.schema import RunConfig
from bigtx.engine.trained import find_with_tokenizer
from bigtx.train.run_dir import (
    GIVEN_CONFIG,
    HISTORY,
    MARK,
    METRICS,
    are_checkpoints_gone,
    check_run_dir,
    saved_values,
)
from bigtx.utils import processes
from bigtx.utils.errors import CheckpointError, LaunchError
from bigtx.utils.files import write_atomic, write_json
from bigtx.utils.locks import FolderLock, refuse_if_held
from bigtx.utils.secrets import scrub

if TYPE_CHECKING:
    from bigtx.tokenizer.tokenizer import Tokenizer

NOT_COMPARED = ("run_dir", "allow_changes")
"""Settings that have no effect on the training."""
COMPLETED = (
    "model.vocab_size",
    "model.num_classes",
    "model.class_head",
    "classify.classes",
    "classify.pooling",
    "chat.format",
)
"""Settings that a run completes from its data or its teacher, so that its config has more settings than the command."""
BASE_FACTS = ("checkpoint", "manifest_sha256", "step", "wandb_run_id")
"""Keys that identify the run whose weights another run started from."""
README = """The checkpoints of a run of bigtx. The run folder is the parent of this folder, or of a link to it.

bigtx writes this file when the run starts. A run that has made steps and finds neither this file nor a checkpoint
does not start again at step 0, since its checkpoints must have been moved or deleted.
"""


@dataclass(frozen=True)
class Opened:
    """The state of the folder when it was opened.

    Attributes:
        lock: the lock of the folder, held until the run ends.
        changed: settings that differ from the run so far, each allowed by name.
        aside: the folder of the earlier history, where a run without its checkpoints starts again.
    """

    lock: FolderLock
    changed: list[dict[str, Any]]
    aside: Path | None


def open_run_folder(config: RunConfig, *, files: Iterable[Path], environment: dict[str, Any]) -> Opened:
    """Create or reopen the folder, and compare settings if the run has made steps. Only rank 0 calls this, after
    `check_run_dir`.

    Args:
        files: the config files of the command.
        environment: versions, commit, hardware.

    Raises:
        LaunchError: the folder cannot be written, or another run holds it.
        ConfigError: the config differs from the run's in a way that resume does not allow.
        CheckpointError: the folder holds something else, or its config is missing.
    """
    run_dir = Path(config.run_dir)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = FolderLock(run_dir)
    except OSError as error:
        raise LaunchError(f"run_dir={config.run_dir!r} cannot be written: {error}; name another folder") from error
    try:
        changed = _changed_settings(run_dir, config)
        if not is_run(run_dir):
            if gives_config(run_dir, files):
                write_atomic(run_dir / GIVEN_CONFIG, (run_dir / CONFIG).read_bytes())
            # After this line the folder counts as a run, even if this start fails.
            write_json(run_dir / ENVIRONMENT, scrub(environment))
        begins_again = CHECKPOINTS in config.allow_changes and are_checkpoints_gone(run_dir)
        return Opened(lock, changed, _set_history_aside(run_dir) if begins_again else None)
    except OSError as error:
        lock.release()
        raise LaunchError(f"run_dir={config.run_dir!r} cannot be written: {error}") from error
    except BaseException:
        lock.release()
        raise


def _set_history_aside(run_dir: Path) -> Path:
    """Move the files of a run that lost its checkpoints into a new folder inside the run folder."""
    number = 1
    while (aside := run_dir / f"history-{number}").exists():
        number += 1
    aside.mkdir()
    if (run_dir / CONFIG).is_file():
        shutil.copy2(run_dir / CONFIG, aside / CONFIG)
    # The metrics are moved last: while they are in place, the next start does this again.
    for name in sorted(HISTORY, key=METRICS.__eq__):
        if (run_dir / name).is_file():
            (run_dir / name).rename(aside / name)
    return aside


def check_folder(config: RunConfig, files: Iterable[Path]) -> None:
    """Refuse a run folder that another run holds, or in which the run would overwrite something.

    It is called before anything is written there, and before the ranks could fail at a port that the other run uses.

    Raises:
        LaunchError, ConfigError, CheckpointError: see `refuse_if_held` and `check_run_dir`.
    """
    refuse_if_held(config.run_dir)
    if processes.rank() == 0:
        check_run_dir(config, files)


def check_teacher(config: RunConfig) -> None:
    """Refuse a teacher that is not a run or has no checkpoint, before torch is imported to read it.

    Raises:
        BigtxError: see `find_with_tokenizer`.
    """
    if config.distill.teacher:
        find_with_tokenizer(config.distill.teacher)


def check_settings(config: RunConfig) -> None:
    """Refuse changes of settings that resume does not allow, before the data are read.

    Settings that follow from the data are compared when the folder is opened.

    Raises:
        ConfigError: as `open_run_folder`.
        CheckpointError: the run's config is missing or damaged.
    """
    _changed_settings(Path(config.run_dir), config, but=COMPLETED)


def _changed_settings(run_dir: Path, config: RunConfig, but: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Return the settings that differ from the run so far, all of them allowed; empty if no step was saved.

    Args:
        but: settings that are not compared.
    """
    saved = saved_values(run_dir)
    if saved is None:
        return []
    try:
        found = [change for change in changes.compare(saved, config) if change.key not in but]
    except (AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{run_dir / CONFIG} is damaged; restore it from a copy") from error
    changes.refuse(found, config)
    return [
        {"key": change.key, "old": change.old, "new": change.new} for change in found if change.key not in NOT_COMPARED
    ]


def describe_run(
    config: RunConfig, *, tokenizer: Tokenizer, deepspeed: dict[str, Any], environment: dict[str, Any]
) -> None:
    """Write the files that describe the run, once the engine is built. Only rank 0 calls this.

    Raises:
        LaunchError: the folder cannot be written.
    """
    run_dir = Path(config.run_dir)
    try:
        (run_dir / CHECKPOINTS).mkdir(exist_ok=True)
        write_atomic(run_dir / CHECKPOINTS / MARK, README)
        write_atomic(run_dir / CONFIG, yaml_of(with_absolute_paths(type(config), to_dict(config))))
        write_json(run_dir / "deepspeed.json", deepspeed)
        write_json(run_dir / ENVIRONMENT, scrub(environment))
        tokenizer.save(run_dir / "tokenizer")
    except OSError as error:
        raise LaunchError(f"run_dir={config.run_dir!r} cannot be written: {error}") from error


def dump(config: RunConfig) -> dict[str, Any]:
    """Return the resolved config as JSON-ready data."""
    return json.loads(json.dumps(to_dict(config)))
