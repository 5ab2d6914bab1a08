"""Commands and settings as a message shows them: bash and zsh read each of them unchanged. And paths that a shell has
not completed."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_PLAIN = re.compile(r"[\w./-]+", re.ASCII)


def command(*words: str | Path) -> str:
    """Return words as a command line. A placeholder is in capitals (FILE), which need no quotes."""
    return " ".join(shlex.quote(str(word)) for word in words)


def setting(key: str, value: Any) -> str:
    """Write `key=value` as one word: brackets are patterns for a shell, so lists are quoted."""
    return shlex.quote(f"{key}={written(value)}")


def settings(values: Mapping[str, Any]) -> str:
    """Write several settings as words."""
    return " ".join(setting(key, value) for key, value in values.items())


def written(value: Any) -> str:
    """Return a setting's value as it is written in a config."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"[{','.join(_member(member) for member in value)}]"
    return str(value)


def _member(value: Any) -> str:
    text = written(value)
    return text if _PLAIN.fullmatch(text) else json.dumps(text, ensure_ascii=False)


def at_home(path: str) -> str:
    """Return a path with `~/` replaced by the home folder. A shell does this only at the start of a word, so not in
    `input.paths=~/texts`.
    """
    return os.path.expanduser(path) if path.startswith("~/") else path
