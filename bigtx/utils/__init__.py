"""Helpers for every other part: errors, files, units, processes, hardware. Imports nothing of bigtx outside itself."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"
"""The version of bigtx, where every layer can import it; a test compares it with pyproject.toml."""


def imported(name: str) -> Any:
    """Import the module of a name, `module:attribute`, and return the attribute."""
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)
