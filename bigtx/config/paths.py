"""The paths among a config's settings, so that a run finds its data from any working folder."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bigtx.config.settings import members
from bigtx.utils.paths import is_url


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
    found = dict(values)
    for name, setting in members(schema).items():
        value = values.get(name)
        if setting.section and isinstance(value, dict):
            found[name] = _mapped(setting.section, value, change)
        elif setting.named_section and isinstance(value, dict):
            section = setting.named_section
            found[name] = {
                entry: _mapped(section, inner, change) if isinstance(inner, dict) else inner
                for entry, inner in value.items()
            }
        elif setting.kind == "path" and name in values:
            found[name] = _changed(value, change)
    return found


def _changed(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, list):
        return [_changed(member, change) for member in value]
    return change(value) if isinstance(value, str) and value and not is_url(value) else value
