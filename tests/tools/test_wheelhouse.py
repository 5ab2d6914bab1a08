"""tools/wheelhouse without a network: what it asks pip for, and what it leaves out."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import zipfile
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools" / "wheelhouse"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    loader = SourceFileLoader("wheelhouse_tool", str(TOOL))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(loader.name, loader))
    loader.exec_module(module)
    return module


def write_wheel(folder: Path, name: str, version: str, requires: list[str]) -> Path:
    wheel = folder / f"{name}-{version}-py3-none-any.whl"
    lines = [
        "Metadata-Version: 2.1",
        f"Name: {name}",
        f"Version: {version}",
        *(f"Requires-Dist: {r}" for r in requires),
    ]
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"{name}-{version}.dist-info/METADATA", "\n".join(lines) + "\n\ntext\n")
    return wheel


def test_platform_tags_name_every_older_glibc_and_its_legacy_name(tool: ModuleType) -> None:
    tags = tool.platform_tags(28, "x86_64")
    assert tags[:2] == ["manylinux_2_28_x86_64", "manylinux_2_27_x86_64"]
    assert tags[tags.index("manylinux_2_17_x86_64") + 1] == "manylinux2014_x86_64"
    assert tags[-1] == "manylinux1_x86_64"


def test_what_the_target_has_is_left_out_unless_it_is_too_old(tool: ModuleType) -> None:
    have = tool.read_have("torch==2.11.0+cu130  # the image's\nPyYAML, numpy==1.26.4\n\n# a comment\n")
    assert have == {"torch": "2.11.0+cu130", "pyyaml": "", "numpy": "1.26.4"}
    assert tool.is_there(Requirement("torch>=2.11,<2.14"), have)
    assert tool.is_there(Requirement("pyyaml>=6"), have)
    assert not tool.is_there(Requirement("numpy>=2.0"), have)
    assert not tool.is_there(Requirement("wandb"), have)


def test_markers_are_read_for_the_target_and_not_for_this_machine(tool: ModuleType) -> None:
    environment = tool.Target("3.12", "manylinux_2_28_aarch64").environment
    requirements = [
        "old; python_version < '3.12'",
        "new; python_version >= '3.12' and platform_machine == 'aarch64'",
        "windows; sys_platform == 'win32'",
        "media; extra == 'media'",
        "always",
    ]
    assert [one.name for one in tool.needed(requirements, [], environment)] == ["new", "always"]
    assert [one.name for one in tool.needed(requirements, ["media"], environment)] == ["new", "media", "always"]


def test_collect_follows_the_wheels_requirements(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requires = {"deepspeed": ["hjson", "torch>=2"], "hjson": [], "wandb": ["click>=8.2"], "click": ["hjson"]}
    monkeypatch.setattr(tool, "requirements_of_bigtx", lambda extras: ["deepspeed<0.20", "wandb", "torch>=2.11"])
    monkeypatch.setattr(
        tool, "fetch", lambda name, version, target, folder: write_wheel(folder, name, version, requires[name])
    )
    target = tool.Target("3.12", "manylinux_2_28_x86_64")
    wheels = tool.collect(target, {"torch": "", "click": "8.1.0"}, ["test"], tmp_path)
    assert [wheel.name.split("-")[0] for wheel in wheels] == ["click", "deepspeed", "hjson", "wandb"]


def test_every_package_that_bigtx_needs_has_a_pinned_version(tool: ModuleType) -> None:
    pins = tool.read_pins(ROOT / "constraints.txt")
    requirements = tool.requirements_of_bigtx(["test", "huggingface"])
    for requirement in map(Requirement, requirements):
        version = pins[tool.canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), f"constraints.txt: {requirement.name}=={version}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--platform", "linux"], "manylinux_2_28_x86_64"), (["--python", "3"], "3.12"), (["-o", str(ROOT)], "--output")],
)
def test_errors_are_one_line_and_status_2(arguments: list[str], message: str) -> None:
    done = subprocess.run([sys.executable, str(TOOL), *arguments], capture_output=True, text=True)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
