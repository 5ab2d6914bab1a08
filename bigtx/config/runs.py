"""The places of configs: the recipes that come with bigtx, and the folders of runs.

The recipes are in `configs/` of a clone, or in `bigtx/configs` of an installed wheel. This module reads no large file,
and imports no slow package.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import yaml

from bigtx.config.nodes import SavedLoader
from bigtx.config.settings import walk
from bigtx.utils.errors import CheckpointError
from bigtx.utils.files import MODEL, is_url, kind_of_folder, read_object

CONFIG = "config.yaml"
ENVIRONMENT = "environment.json"
CHECKPOINTS = "checkpoints"
LISTED = "; `bigtx configs list` shows the recipes"
"""The end of a sentence about a recipe that is unknown."""


def run_dir_of(folder: Path | str) -> Path:
    """Return the run of a folder that is the run or one of its checkpoints.

    `checkpoints` in the run may be a link to another disk, and the folder a link to a checkpoint or a run.
    """
    folder = Path(folder).absolute()
    while folder.parent.name != CHECKPOINTS and os.path.islink(folder) and os.path.exists(folder):
        # Follow one link at a time: the final target may be outside the run.
        folder = folder.parent / os.readlink(folder)
    if folder.parent.name != CHECKPOINTS:
        folder = folder.resolve()
    return folder.parent.parent if folder.parent.name == CHECKPOINTS else folder


def checkpoint_named(name: str) -> Path:
    """Return the folder of the checkpoint that RUN@STEP names; any other name is that of a folder."""
    run, at, step = name.rpartition("@")
    if not at or not step.isdecimal() or os.path.lexists(name):
        return Path(name)
    return Path(run) / CHECKPOINTS / f"step-{int(step):08d}"


def has_steps(run_dir: Path) -> bool:
    """Return whether a run's folder has an entry with the name of a checkpoint."""
    return newest_checkpoint(run_dir) is not None


def newest_checkpoint(run_dir: Path) -> Path | None:
    """Return the entry of a run's folder with the name of its last checkpoint, which may be damaged; None without
    one."""
    folder = run_dir / CHECKPOINTS
    entries = folder.glob("step-*[0-9]") if os.path.isdir(folder) else ()
    return max(entries, default=None, key=lambda path: (len(path.name), path.name))


def is_run(folder: Path) -> bool:
    """Return whether bigtx made a folder as a run: it has checkpoints, or the description that every start writes
    with.
    """
    packages = read_object(folder / ENVIRONMENT).get("packages")
    return has_steps(folder) or (isinstance(packages, dict) and "bigtx" in packages)


def runs_near(folder: Path, most: int = 3) -> list[Path]:
    """Return the runs that a user may mean by another folder: that of its checkpoints, or the newest ones inside it."""
    if folder.name == CHECKPOINTS and is_run(folder.parent):
        return [folder.parent]
    configs = folder.glob(f"*/{CONFIG}") if os.path.isdir(folder) else ()
    inside = [path.parent for path in configs if is_run(path.parent)]
    return sorted(inside, key=lambda path: path.stat().st_mtime, reverse=True)[:most]


def gives_config(run_dir: Path, files: Iterable[Path]) -> bool:
    """Return whether a command names the file that is at the path of the run's config."""
    own = run_dir / CONFIG
    return own.is_file() and any(own.samefile(file) for file in files)


def read_values(folder: Path | str) -> dict[str, Any]:
    """Return the config of a run, or of the run of a checkpoint.

    Raises:
        CheckpointError: the folder does not exist, is not a run, or has a damaged config.
    """
    if not os.path.isdir(folder):
        checkpoint = checkpoint_named(str(folder))
        advice = "name a run's folder (its run_dir) or one of its checkpoints"
        raise CheckpointError(
            f"{folder} is not a folder; " + (f"did you mean {checkpoint}?" if os.path.isdir(checkpoint) else advice)
        )
    path = run_dir_of(folder) / CONFIG
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=SavedLoader)
    except FileNotFoundError:
        kind = kind_of_folder(folder)
        advice = "`bigtx import` converts it to a run" if kind == MODEL else "name the run_dir of a training"
        if runs := runs_near(Path(folder)):
            advice = f"did you mean {' or '.join(map(str, runs))}?"
        what = f"it is {kind}" if kind else f"it has no {CONFIG}"
        raise CheckpointError(f"{folder} is not a run: {what}; {advice}") from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{path} cannot be read: {reason}; restore it from a copy") from error
    if not isinstance(values, dict) or not isinstance(values.get("model", {}), dict):
        raise CheckpointError(f"{path} is not a run's config; restore it from a copy")
    return values


def why_no_run(folder: str) -> str | None:
    """Return why a folder is neither a run nor one of its checkpoints, as the end of a sentence about it; None if it
    is a run or a checkpoint.
    """
    if not os.path.isdir(folder):
        return "no such folder; name a run or one of its checkpoints"
    try:
        read_values(folder)
    except CheckpointError as error:
        return str(error)
    return None


def why_no_checkpoint(name: str) -> str | None:
    """Return why RUN, RUN@STEP or the folder of a checkpoint does not name a saved one, as the end of a sentence; None
    if it does.
    """
    folder = checkpoint_named(name)
    run = run_dir_of(folder)
    if problem := why_no_run(str(run)):
        return problem
    steps = sorted(int(path.name.removeprefix("step-")) for path in (run / CHECKPOINTS).glob("step-*[0-9]"))
    if not steps:
        return "the run has saved no checkpoint; name a run that has saved one"
    if os.path.isdir(folder):
        return None
    return f"the run has no checkpoint of that step; it has those of steps {', '.join(map(str, steps))}"


def with_absolute_paths(schema: type, values: dict[str, Any]) -> dict[str, Any]:
    """Return a config's values with every path absolute; URLs stay as they are."""
    return _mapped(schema, values, os.path.abspath)


def with_moved_paths(schema: type, values: dict[str, Any], old: Path, new: Path) -> dict[str, Any]:
    """Return the values of a run that was moved. For a missing path, try the same place relative to the run:
    the whole project may have been moved.

    Args:
        old, new: the run's folder before the move and now.
    """

    def moved(place: str) -> str:
        if os.path.lexists(place):
            return place
        candidate = os.path.normpath(new / os.path.relpath(place, old))
        return candidate if os.path.lexists(candidate) else place

    return _mapped(schema, values, moved)


def _mapped(schema: type, values: dict[str, Any], change: Callable[[str], str]) -> dict[str, Any]:
    found = copy.deepcopy(values)
    with contextlib.suppress(TypeError):  # A damaged section; the conversion of the values reports it.
        for setting, held in walk(schema, found):
            if setting.kind == "path" and setting.name in held:
                held[setting.name] = _changed(held[setting.name], change)
    return found


def _changed(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, list):
        return [_changed(member, change) for member in value]
    return change(value) if isinstance(value, str) and value and not is_url(value) else value


def shipped_folder() -> Path:
    """Return the folder of the recipes."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def shipped_configs() -> list[str]:
    """Return the recipes' names, relative to their folder: `pretrain/python-stdlib.yaml`."""
    folder = shipped_folder()
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.yaml"))


def similar_configs(name: str) -> list[str]:
    """Return the recipes that a user may have meant, most likely first: those of the same file name or a similar one,
    in any folder and with or without `.yaml`; if there are none, those whose names begin with the name.
    """
    folder, stem = Path(name).parent.name, Path(name).name.removesuffix(".yaml").removesuffix(".yml")
    stems = {recipe: Path(recipe).stem for recipe in shipped_configs()}
    close = [stem, *difflib.get_close_matches(stem, sorted(set(stems.values())), 3, 0.75)]
    found = [recipe for one in dict.fromkeys(close) for recipe in stems if stems[recipe] == one]
    found = found or [recipe for recipe in stems if stem and stems[recipe].startswith(stem)]
    return sorted(found, key=lambda recipe: Path(recipe).parent.name != folder)[:3]


def find_config(name: str) -> Path | None:
    """Return the file that a user means: an own path, or a recipe by name, with or without `configs/` in
    front.
    """
    path = Path(name)
    if os.path.isfile(path):
        return path
    recipe = name.removeprefix("./").removeprefix("configs/")
    return shipped_folder() / recipe if recipe in shipped_configs() else None
