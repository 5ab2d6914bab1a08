"""The recipes that come with bigtx: `configs/` of a clone, `bigtx/configs` of an installed wheel."""

from __future__ import annotations

from pathlib import Path


def shipped_folder() -> Path:
    """Where the recipes are."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def shipped_configs() -> list[str]:
    """The recipes' names, relative to their folder: `pretrain/python-stdlib.yaml`."""
    folder = shipped_folder()
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.yaml"))


def find_config(name: str) -> Path | None:
    """The file that a user means: a path of their own, or a recipe by name, with or without `configs/` in front."""
    path = Path(name)
    if path.is_file():
        return path
    recipe = name.removeprefix("./").removeprefix("configs/")
    return shipped_folder() / recipe if recipe in shipped_configs() else None
