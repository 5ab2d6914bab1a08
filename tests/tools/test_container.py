"""The files of the container images, read: there is no engine here that could build them."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "tools" / "container"
BASE = re.compile(r"python:3\.\d+\.\d+-slim-\w+")


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions, in order."""
    text = (FOLDER / "Dockerfile").read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in lines]


def of(name: str) -> list[str]:
    return [arguments for instruction, arguments in instructions() if instruction == name]


def sections() -> dict[str, str]:
    """The definition of Apptainer: its sections, and the head as ""."""
    text = re.sub(r"(?m)^#.*\n", "", (FOLDER / "bigtx.def").read_text())
    head, *parts = re.split(r"(?m)^%(\w+)\n", text)
    return {"": head} | dict(zip(parts[::2], parts[1::2], strict=True))


def ignored() -> tuple[set[str], set[str]]:
    """What the engine is not sent, and what it is nevertheless."""
    lines = (FOLDER / "Dockerfile.dockerignore").read_text().splitlines()
    patterns = {line for line in lines if line and not line.startswith("#")}
    return {line for line in patterns if line[0] != "!"}, {line[1:] for line in patterns if line[0] == "!"}


def test_the_base_has_a_version_and_is_the_same_in_both() -> None:
    bases = [base.split()[0] for base in of("FROM")]
    assert len(bases) == 2 and len(set(bases)) == 1 and BASE.fullmatch(bases[0])
    assert f"From: {bases[0]}\n" in sections()[""]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["requires-python"] == ">=3.11" and int(bases[0].split(".")[1]) >= 11


def test_the_image_runs_as_a_user_and_not_as_root() -> None:
    names = [name for name, _ in instructions()]
    (user,) = of("USER")
    assert user.isdecimal() and int(user) > 0
    assert "RUN" not in names[names.index("USER") :]


def test_both_images_take_the_same_steps() -> None:
    steps = ["system", "packages", "bigtx"]
    assert re.findall(r"install\.sh (\w+)", sections()["post"]) == steps
    taken = re.findall(r"(?:install\.sh|install-bigtx) (\w+)", "\n".join(of("RUN")))
    assert sorted(taken) == sorted(steps)
    script = (FOLDER / "install.sh").read_text()
    assert re.findall(r"(?m)^  (\w+)\)$", script) == steps
    assert all("--constraint constraints.txt" in line for line in script.splitlines() if "/pip install" in line)


def test_bigtx_itself_is_the_last_that_is_installed() -> None:
    runs = of("RUN")
    order = [next(index for index, run in enumerate(runs) if run.split()[-1] == "packages")]
    order += [next(index for index, run in enumerate(runs) if "install-bigtx bigtx" in run)]
    assert order == sorted(order)
    before = [source for copy in of("COPY")[:1] for source in copy.split()[:-1]]
    assert set(before) == {"pyproject.toml", "constraints.txt", "tools/container/install.sh"}


def test_what_is_copied_is_there_and_what_is_not_needed_stays_out() -> None:
    everything, sent = ignored()
    assert "*" in everything
    copied = {part for copy in of("COPY") if "--from" not in copy for part in copy.split()[:-1]}
    listed = {line.split()[0] for line in sections()["files"].splitlines() if line.strip()}
    assert copied <= sent and listed == sent
    assert all((ROOT / path).exists() for path in sent)
    assert not sent & {".git", "runs", ".venv", "wheelhouse", "tests", "tools"}
    # All that the wheel is made of.
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert set(build["tool"]["hatch"]["build"]["targets"]["wheel"]["only-include"]) <= sent
    assert {build["project"]["readme"], *build["project"]["license-files"]} <= sent


@pytest.mark.parametrize("step", ["system", "packages", "bigtx"])
def test_the_script_stops_at_the_first_mistake(tmp_path: Path, step: str) -> None:
    script = tmp_path / "install.sh"
    # Nothing is installed here: each program of the step fails.
    script.write_text(
        re.sub(r"(?m)^(\s+)(apt-get|python3|/opt/bigtx/bin/pip)", r"\1false \2", (FOLDER / "install.sh").read_text())
    )
    done = subprocess.run(["sh", str(script), step], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode != 0 and not list(tmp_path.glob("requirements*"))
