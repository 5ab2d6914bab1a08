"""Settings of a fine-tuning that must fit its task."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from bigtx.config.nodes import Problem
from bigtx.config.schema import FinetuneConfig

TASK_SECTIONS = ("classify",)
"""Sections that one task alone reads, of its own name."""


def task_problems(config: FinetuneConfig) -> Iterator[Problem]:
    """Settings of another task, and those that do not fit each other."""
    for name in TASK_SECTIONS:
        if name == config.task:
            continue
        section = getattr(config, name)
        for field in dataclasses.fields(section):
            value = getattr(section, field.name)
            if value != getattr(type(section)(), field.name):
                yield Problem(f"{name}.{field.name}", str(value), f"says nothing without task={name}; leave it out")
