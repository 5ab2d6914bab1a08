"""The command's doors, tried as processes."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import bigtx
from bigtx.cli import COMMANDS

ROOT = Path(__file__).resolve().parents[1]
# What `load` needs is imported; nothing of this may be.
HEAVY = ("torch", "deepspeed", "numpy", "sentencepiece", "wandb", "webdataset")
WATCHED = f"""
import sys
from bigtx.cli import main
try:
    status = main(sys.argv[1:])
except SystemExit as end:
    status = end.code
heavy = [name for name in {HEAVY} if name in sys.modules]
print("HEAVY", *heavy, file=sys.stderr) if heavy else None
sys.exit(status)
"""
CONFIG = """
import sys
from bigtx.config.load import parse_command_line
from bigtx.config.schema import PretrainConfig
from bigtx.utils.errors import exit_cleanly
@exit_cleanly
def main():
    parse_command_line(PretrainConfig, sys.argv[1:], program="deepspeed bigtx/pretrain.py")
try:
    status = main()
finally:
    print("HEAVY", file=sys.stderr) if "torch" in sys.modules else None
sys.exit(status)
"""


def run(code: str, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *args], cwd=ROOT, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    "args",
    [
        [],
        ["--help"],
        ["--version"],
        ["tokenizer"],
        ["data", "--help"],
        ["configs", "list"],
        ["configs", "explain", "model"],
    ],
)
def test_help_answers_at_once(args: list[str]) -> None:
    done = run(WATCHED, *args)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout


def test_help_shows_every_command() -> None:
    shown = run(WATCHED, "--help").stdout
    for name in COMMANDS:
        assert f"bigtx {name} " in shown
    assert run(WATCHED, "--version").stdout == f"bigtx {bigtx.__version__}\n"


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["tokenizr", "train"], "did you mean bigtx tokenizer train?"),
        (["data", "prepar"], "did you mean bigtx data prepare?"),
        (["zzz"], "`bigtx --help` shows all commands"),
        (["train"], "deepspeed --module bigtx.pretrain"),
        (["configs", "explain", "train.max_stepz"], "did you mean train.max_steps?"),
        (["configs", "copy", "absent"], "no recipe 'absent'"),
    ],
)
def test_mistakes_are_explained(args: list[str], words: str) -> None:
    done = run(WATCHED, *args)
    assert (done.returncode, done.stdout) == (2, "")
    assert words in done.stderr and "Traceback" not in done.stderr and "HEAVY" not in done.stderr


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (
            ["train.max_stepz=3"],
            r"train\.max_stepz=3 \(command line\): no such setting; did you mean train\.max_steps\?",
        ),
        (["train.max_steps=abc"], r"train\.max_steps=abc \(command line\): is not a whole number"),
        (["absent.yaml"], r"no file 'absent\.yaml'"),
        (["train.max_steps=1", "train.global_batch_size=30"], "does not divide a rank's share"),
        (["run_dir=${oc.env:HOME}"], "never fills in"),
    ],
)
def test_config_errors_answer_at_once(args: list[str], words: str) -> None:
    done = run(CONFIG, "--local_rank=0", *args)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.search(words, done.stderr), done.stderr
    # One paragraph.
    assert "\n\n" not in done.stderr and "Traceback" not in done.stderr and "HEAVY" not in done.stderr


def test_rank_0_alone_speaks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    done = run(CONFIG, "foo=1")
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "")


def test_python_m(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bigtx", "--version"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (0, f"bigtx {bigtx.__version__}\n")


def test_a_reader_that_leaves_is_no_error() -> None:
    command = f"{sys.executable} -m bigtx configs explain | head -n 1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_version_is_that_of_the_package() -> None:
    import importlib.metadata

    assert importlib.metadata.version("bigtx") == bigtx.__version__
    with pytest.raises(AttributeError):
        _ = bigtx.nothing
