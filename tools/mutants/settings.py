"""Find settings without an effect: a setting keeps its default for any value that is written, and its test should fail.

tests/settings.yaml names that test. As a program this module prints the settings, so that callers need not import
bigtx.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from operators import Mutant

SCHEMA = "bigtx/config/schema/__init__.py"
REGISTRY = "tests/settings.yaml"
RESET = """

def _keep_default(owner: type, name: str) -> None:
    import functools

    for schema in {{value for value in globals().values() if isinstance(value, type) and issubclass(value, owner)}}:
        def keep(self, *, _init=schema.__init__, **values):
            values.pop(name, None)
            _init(self, **values)

        schema.__init__ = functools.wraps(schema.__init__)(keep)


_keep_default({owner}, {name!r})
"""
"""Code that is added at the end of SCHEMA."""


def all_settings() -> dict[str, tuple[str, str]]:
    """Return each key of each schema: the class that declares it, and its name there."""
    from bigtx.config import schema as schemas
    from bigtx.config.settings import leaves

    found: dict[str, tuple[str, str]] = {}
    for top in (schemas.TokenizerTrainConfig, schemas.PrepareConfig, schemas.PretrainConfig, schemas.FinetuneConfig):
        for setting in leaves(top):
            found.setdefault(setting.key, _owner(top, setting.key))
    return found


def _owner(top: type, key: str) -> tuple[str, str]:
    from bigtx.config.settings import NAME, members

    schema, words = top, key.split(".")
    for place, word in enumerate(words[:-1]):
        if word == NAME:
            continue
        setting = members(schema)[word]
        schema = setting.section or (setting.named_section if words[place + 1] == NAME else None) or schema
    name = words[-1]
    owner = next(parent for parent in reversed(schema.__mro__) if name in vars(parent).get("__annotations__", {}))
    return owner.__name__, name


def known_settings(root: Path) -> dict[str, tuple[str, str]]:
    """Return the result of `all_settings`, computed in another process."""
    command = [sys.executable, str(Path(__file__)), "list"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    return {key: tuple(value) for key, value in json.loads(done.stdout).items()}


def mutant_of(key: str, owner: str, name: str, source: bytes) -> Mutant:
    """Return the mutant in which a setting keeps its default."""
    place = len(source)
    after = RESET.format(owner=owner, name=name)
    return Mutant(SCHEMA, key, "setting", "", after, place, place, (1, 1))


def read_registry(root: Path) -> dict[str, str]:
    """Return the test of each setting, without its parameters."""
    import yaml

    path = root / REGISTRY
    found: dict[str, str] = yaml.safe_load(path.read_text(encoding="utf-8"))["tests"] if path.exists() else {}
    return found


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    print(json.dumps(all_settings()))
