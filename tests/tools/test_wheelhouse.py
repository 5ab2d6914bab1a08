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


def collected(
    tool: ModuleType, tmp_path: Path, requires: dict[str, list[str]], have: dict[str, str] | None = None
) -> list[str]:
    """The wheels that the tool gets where the index has these, as `name-version` of what it asks for."""
    versions = tool.read_pins(ROOT / "constraints.txt")

    def get(name: str, specifier: str, target: object, folder: Path) -> object:
        version = specifier.partition("==")[2] or versions.get(name, "1.0")
        wheel = write_wheel(folder, name.replace("-", "_"), version, requires[name])
        return tool.Wheel(wheel, version, tool.requirements_of_wheel(wheel))

    target = tool.Target("3.12", "manylinux_2_28_x86_64")
    wheels = tool.collect(target, have or {}, ["test"], tmp_path, get)
    return ["-".join(wheel.file.name.split("-")[:2]) for wheel in wheels]


def names(files: list[str]) -> list[str]:
    return [file.partition("-")[0] for file in files]


def test_collect_follows_the_wheels_requirements(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requires = {"deepspeed": ["hjson", "torch>=2"], "hjson": [], "wandb": ["click>=8.2"], "click": ["hjson"]}
    monkeypatch.setattr(tool, "requirements_of_bigtx", lambda extras: ["deepspeed<0.20", "wandb", "torch>=2.11"])
    files = collected(tool, tmp_path, requires, {"torch": "", "click": "8.1.0"})
    assert names(files) == ["click", "deepspeed", "hjson", "wandb"]


def test_packages_of_cuda_have_the_versions_that_torch_asks_for(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requires = {  # As torch 2.13.0 of PyPI.
        "torch": [
            "cuda-toolkit[cublas,nvrtc]==13.0.3; platform_system == 'Linux'",
            "cuda-bindings<14,>=13.0.3; platform_system == 'Linux' and python_version < '3.15'",
            "nvidia-nccl-cu13==2.29.7; platform_system == 'Linux'",
        ],
        "cuda-toolkit": ["nvidia-cublas==13.1.0; extra == 'cublas'", "nvidia-cufft==12.0; extra == 'cufft'"],
        "cuda-bindings": [],
        "nvidia-nccl-cu13": [],
        "nvidia-cublas": [],
    }
    monkeypatch.setattr(tool, "requirements_of_bigtx", lambda extras: ["torch>=2.11"])
    monkeypatch.setattr(tool, "read_pins", lambda path: {"torch": "2.13.0", "cuda-bindings": "13.1.0"})
    assert collected(tool, tmp_path, requires) == [
        "cuda_bindings-13.1.0",
        "cuda_toolkit-13.0.3",
        "nvidia_cublas-13.1.0",
        "nvidia_nccl_cu13-2.29.7",
        "torch-2.13.0",
    ]


def test_extras_that_a_later_requirement_names_are_followed(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requires = {"torch": ["fsspec"], "fsspec": ["aiohttp; extra == 'http'"], "wandb": ["fsspec[http]"], "aiohttp": []}
    for order in (["torch", "wandb"], ["wandb", "torch"]):
        monkeypatch.setattr(tool, "requirements_of_bigtx", lambda extras, order=order: order)
        folder = tmp_path / order[0]
        folder.mkdir()
        assert names(collected(tool, folder, requires)) == ["aiohttp", "fsspec", "torch", "wandb"]


def test_versions_that_do_not_fit_each_other_are_refused(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tool, "requirements_of_bigtx", lambda extras: ["wandb"])
    with pytest.raises(tool.WheelhouseError, match=r"wandb needs click<8, but click is 8\.5\.1 here"):
        collected(tool, tmp_path, {"wandb": ["click<8"], "click": []})


def test_an_extra_of_extras_and_what_builds_bigtx_are_included(tool: ModuleType) -> None:
    wanted = {Requirement(text).name for text in tool.requirements_of_bigtx(["dev"])}
    assert {"hatchling", "editables", "torch", "pytest", "transformers", "ruff", "sacrebleu"} <= wanted
    assert "bigtx" not in wanted


def test_every_package_that_bigtx_needs_has_a_pinned_version(tool: ModuleType) -> None:
    pins = tool.read_pins(ROOT / "constraints.txt")
    requirements = tool.requirements_of_bigtx(["dev"])
    for requirement in map(Requirement, requirements):
        version = pins[tool.canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), f"constraints.txt: {requirement.name}=={version}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--platform", "linux"], "manylinux_2_28_x86_64"),
        (["--python", "3"], "3.12"),
        (["-o", str(ROOT)], "--output"),
        (["--extra", "devel", "-o", "/nowhere"], "huggingface"),
    ],
)
def test_errors_are_one_line_and_status_2(arguments: list[str], message: str) -> None:
    done = subprocess.run([sys.executable, str(TOOL), *arguments], capture_output=True, text=True)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
