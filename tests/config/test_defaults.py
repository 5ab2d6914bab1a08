"""What a config means that leaves a setting out, and what each setting may be, changes only on purpose.

defaults.yaml has a line for each setting: the allowed values, the default, and what a resumed run may change.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from bigtx.config.schema import FinetuneConfig, PrepareConfig, PretrainConfig, TokenizerTrainConfig
from bigtx.config.settings import Setting, leaves

KNOWN: dict[str, dict[str, str]] = yaml.safe_load(Path(__file__).with_name("defaults.yaml").read_text(encoding="utf-8"))
SCHEMAS = (TokenizerTrainConfig, PrepareConfig, PretrainConfig, FinetuneConfig)


def described(setting: Setting) -> str:
    """The line of a setting."""
    annotation: Any = setting.type
    values = "|".join(setting.choices) or setting.kind or getattr(annotation, "__name__", str(annotation))
    if setting.kind == "duration":
        values = "duration in " + ", ".join(setting.units)
    bounds = f" from {setting.minimum} to {setting.maximum}" if setting.number else ""
    none = " or null" if setting.optional else ""
    return f"{values}{bounds}{none}, default {setting.default!r}, change {setting.change}"


@pytest.mark.parametrize("schema", SCHEMAS)
def test_the_defaults_and_the_bounds_of_each_setting(schema: type) -> None:
    """A change of one of them is a line in the changelog, and here."""
    found = {setting.key: described(setting) for setting in leaves(schema)}
    assert len(found) > 10
    assert found == KNOWN[schema.__name__]
