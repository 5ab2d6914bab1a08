"""docs/architecture.md names every folder of bigtx, and the files of a training step."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

from doors import BF16, ROOT, TINY, environment

PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")


def test_every_folder_has_its_line() -> None:
    folders = {path.parent.name for path in (ROOT / "bigtx").glob("*/__init__.py")}
    assert {name for name in re.findall(r"^\| `(\w+)/` \|", PAGE, re.MULTILINE)} == folders


def test_the_files_of_a_step(corpus: Path, tmp_path: Path) -> None:
    named = [*TINY, *BF16, "train.log_every=10 steps", "train.max_steps=4", "optimizer.name=adamw"]
    settings = [*named, f"data.sources.a.path={corpus}", f"run_dir={tmp_path / 'run'}"]
    command = [sys.executable, str(ROOT / "tests" / "traced_step.py"), str(tmp_path / "traced.json"), *settings]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(PYTHONPATH=str(ROOT)))
    assert done.returncode == 0, done.stdout + done.stderr
    traced = json.loads((tmp_path / "traced.json").read_text())
    assert [name.removeprefix("bigtx/") for name in re.findall(r"^    (bigtx/\S+)$", PAGE, re.MULTILINE)] == traced[
        "files"
    ]
    assert len(traced["files"]) <= 17 and len(traced["modules"]) <= 90


def test_files_are_few_and_short() -> None:
    files = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in (ROOT / "bigtx").rglob("*.py")}
    assert 100 < len(files) <= 210
    assert [path.name for path, num_lines in files.items() if num_lines > 400] == []
