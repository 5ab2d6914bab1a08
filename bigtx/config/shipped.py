"""The recipes that come with bigtx: `configs/` of a clone, `bigtx/configs` of an installed wheel."""

from __future__ import annotations

import difflib
from pathlib import Path

LISTED = "; `bigtx configs list` shows the recipes"
"""The end of a sentence about a recipe that is unknown."""


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
    if path.is_file():
        return path
    recipe = name.removeprefix("./").removeprefix("configs/")
    return shipped_folder() / recipe if recipe in shipped_configs() else None
