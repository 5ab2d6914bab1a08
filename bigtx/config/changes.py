"""Differences between a run's saved config and the config that it is resumed with, and whether they are allowed."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bigtx.config.schema import RunConfig
from bigtx.config.settings import Change as Rule
from bigtx.config.settings import Setting, find, members
from bigtx.utils import shell
from bigtx.utils.errors import ConfigError
from bigtx.utils.paths import is_url
from bigtx.utils.units import parse_duration

ABSENT = "(absent)"


@dataclass(frozen=True)
class Change:
    """One setting whose value differs.

    Attributes:
        old, new: the values; `(absent)` for an entry that one of the configs does not have.
        rule: "free", "by_name" or "never", as the schema marks the setting.
    """

    key: str
    old: Any
    new: Any
    rule: Rule


def compare(old: dict[str, Any], new: Any) -> list[Change]:
    """Return the differences, in the schema's order.

    Args:
        old: a saved config (`to_dict`). A setting that it lacks, because the schema has a new one, had its default.
        new: the config to resume with.
    """
    schema = type(new)
    before = _flatten(schema, old)
    after = _flatten(schema, dataclasses.asdict(new))
    found = []
    for key in dict.fromkeys((*after, *before)):
        values = before.get(key, ABSENT), after.get(key, ABSENT)
        setting = find(schema, key)
        assert setting is not None
        if not _same(setting, *values):
            found.append(Change(key, *values, setting.change))
    return found


def refuse(changes: Sequence[Change], config: RunConfig) -> None:
    """Accept changes that are free or allowed by name.

    Args:
        config: the config to resume with; its `allow_changes` names what is allowed.

    Raises:
        ConfigError: other settings differ; the message shows them as a diff, with the `allow_changes` that allows them.
    """
    allowed, begins_with = config.allow_changes, config.begins_with
    never = [change for change in changes if change.rule == "never"]
    by_name = [change for change in changes if change.rule == "by_name" and change.key not in allowed]
    if not never and not by_name:
        return
    lines = ["the run was started with other settings."]
    if by_name:
        names = dict.fromkeys([*allowed, *(change.key for change in by_name)])
        lines.append("These may change if you name them:")
        lines += [_diff_line(change) for change in by_name]
        lines.append(f"  To change them, add: {shell.setting('allow_changes', list(names))}")
    if never:
        lines.append("These cannot change within one run:")
        lines += [_diff_line(change) for change in never]
        lines.append(
            f"  Set them back, or start a new run from this one's weights: another run_dir, and {begins_with}=THIS_RUN"
        )
    raise ConfigError("\n".join(lines))


def _flatten(schema: type, values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values by dotted key; settings that the schema does not know (any more) are left out."""
    flat: dict[str, Any] = {}
    for name, setting in members(schema, prefix).items():
        value = values.get(name, setting.default)
        if setting.section:
            inner = (
                dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value
            )
            flat |= _flatten(setting.section, inner, f"{prefix}{name}.")
        elif setting.named_section:
            for entry, inner in value.items():
                flat |= _flatten(setting.named_section, inner, f"{prefix}{name}.{entry}.")
        else:
            flat[prefix + name] = value
    return flat


def _same(setting: Setting, old: Any, new: Any) -> bool:
    if old == new:
        return True
    if setting.kind == "duration" and ABSENT not in (old, new):
        return parse_duration(old) == parse_duration(new)
    if setting.kind == "path" and isinstance(old, list) and isinstance(new, list):
        return [_place(member) for member in old] == [_place(member) for member in new]
    if setting.kind == "path" and isinstance(old, str) and isinstance(new, str) and ABSENT not in (old, new):
        return _place(old) == _place(new)
    return False


def _place(path: str) -> str:
    """Return the resolved path of any spelling; a pattern of names remains a pattern."""
    return path.rstrip("/") if is_url(path) or not path else os.path.realpath(path)


def _diff_line(change: Change) -> str:
    return f"    {change.key}: {shell.written(change.old)} -> {shell.written(change.new)}"
