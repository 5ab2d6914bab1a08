"""Every setting does something: tests/settings.yaml names the test that fails where it does not."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import yaml
from doors import ROOT

from bigtx.config.schema import FinetuneConfig, PrepareConfig, PretrainConfig, TokenizerTrainConfig
from bigtx.config.settings import leaves

TESTS = ROOT / "tests"
REGISTRY = yaml.safe_load((TESTS / "settings.yaml").read_text(encoding="utf-8"))
SCHEMAS = (TokenizerTrainConfig, PrepareConfig, PretrainConfig, FinetuneConfig)


def text_with_helpers(path: Path) -> str:
    """A test file, and the modules of tests that it has its inputs from."""
    waiting, read = [path], dict[Path, str]()
    while waiting:
        file = waiting.pop()
        if file in read or not file.is_file():
            continue
        read[file] = file.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(read[file])):
            if isinstance(node, ast.ImportFrom) and node.module:
                waiting.append(TESTS / f"{node.module.replace('.', '/')}.py")
    return "\n".join(read.values())


def test_every_setting_has_a_test() -> None:
    known = {setting.key for schema in SCHEMAS for setting in leaves(schema)}
    assert REGISTRY["tests"].keys() | REGISTRY["without"].keys() == known
    assert not REGISTRY["tests"].keys() & REGISTRY["without"].keys()
    assert len(REGISTRY["without"]) < 10 and all(REGISTRY["without"].values())


@pytest.mark.parametrize("name", sorted(set(REGISTRY["tests"].values())))
def test_the_test_is_there_and_names_its_settings(name: str) -> None:
    file, _, function = name.partition("::")
    path = ROOT / file
    assert re.search(rf"^def {function}\(", path.read_text(encoding="utf-8"), re.MULTILINE), "no such test"
    text = text_with_helpers(path)
    for key in (key for key, test in REGISTRY["tests"].items() if test == name):
        assert re.search(rf"\b{key.rpartition('.')[2]}\b", text), f"{key} is not named there"


def test_no_test_that_only_reads_the_config_holds_a_setting() -> None:
    """There it is written, but not at work."""
    assert not [name for name in REGISTRY["tests"].values() if name.startswith(("tests/config/", "tests/advice/"))]
