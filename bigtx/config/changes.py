"""Differences between a run's saved config and the config that it is resumed with, and whether they are allowed."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bigtx.config.schema import RunConfig
from bigtx.config.settings import Change as Rule
from bigtx.config.settings import Setting, walk
from bigtx.utils import shell
from bigtx.utils.errors import ConfigError
from bigtx.utils.files import is_url
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
    before, after = _by_key(schema, old), _by_key(schema, dataclasses.asdict(new))
    found = []
    for key, (setting, _) in (after | before).items():
        was, now = (side[key][1] if key in side else ABSENT for side in (before, after))
        if not _same(setting, was, now):
            found.append(Change(key, was, now, setting.change))
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


def refuse_other_origin(changes: Sequence[Change], config: RunConfig) -> None:
    """Refuse a fork whose settings of model, data or batches differ from those of the run that it continues.

    Args:
        changes: the differences from that run's config.
        config: the config of the fork.

    Raises:
        ConfigError: some settings must be the same; the message shows them as a diff.
    """
    fork = shell.setting("fork_from", config.fork_from)
    free = ("run_dir", "fork_from", *config.free_in_fork)
    never = [change for change in changes if change.rule == "never" and change.key not in free]
    if never:
        lines = [f"{fork}: a fork continues that run, so these settings must be the same:"]
        lines += [_diff_line(change) for change in never]
        weights = f"{config.begins_with}=THAT_RUN instead of fork_from"
        lines.append(f"  Set them back, or start a new run from that one's weights: {weights}")
        raise ConfigError("\n".join(lines))
    if any(change.key == "train.global_batch_size" for change in changes) and config.train.max_steps is None:
        length = shell.settings({"train.max_steps": "N", "train.max_tokens": None})
        raise ConfigError(
            f"{fork}: with another train.global_batch_size the length of the run must be given in steps, those of the "
            f"other run included; write {length}"
        )


def _by_key(schema: type, values: dict[str, Any]) -> dict[str, tuple[Setting, Any]]:
    """Return the settings with their values; entries that the schema does not know (any more) are left out."""
    return {own.key: (own, held.get(own.name, own.default)) for own, held in walk(schema, values)}


def _same(setting: Setting, old: Any, new: Any) -> bool:
    if old == new:
        return True
    if setting.kind == "duration" and not {None, ABSENT}.intersection((old, new)):
        return parse_duration(old) == parse_duration(new)
    if setting.kind == "path" and isinstance(old, list) and isinstance(new, list):
        return list(map(_place, old)) == list(map(_place, new))
    if setting.kind == "path" and isinstance(old, str) and isinstance(new, str) and ABSENT not in (old, new):
        return _place(old) == _place(new)
    return False


def _place(path: str) -> str:
    """Return the resolved path of any spelling; a pattern of names remains a pattern."""
    return path.rstrip("/") if is_url(path) or not path else os.path.realpath(path)


def _diff_line(change: Change) -> str:
    return f"    {change.key}: {shell.written(change.old)} -> {shell.written(change.new)}"
