"""The command's doors, tried as processes."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from doors import as_json

import bigtx
from bigtx.cli import COMMANDS, main

ROOT = Path(__file__).resolve().parents[1]
# What `load` needs is imported; nothing of this may be.
HEAVY = ("torch", "deepspeed", "numpy", "sentencepiece", "wandb", "webdataset")
WATCHED = f"""
import json, sys
from bigtx.cli import main
for words in json.loads(sys.argv[1]):
    status = main(words)
    heavy = [name for name in {HEAVY} if name in sys.modules]
    print(json.dumps([words, status, heavy]), file=sys.stderr)
"""
CONFIG = """
import sys
from bigtx.config.load import parse_command_line
from bigtx.config.schema import PretrainConfig
from bigtx.utils.errors import exit_cleanly
@exit_cleanly
def main():
    parse_command_line(PretrainConfig, sys.argv[1:], program="bigtx pretrain")
try:
    status = main()
finally:
    print("HEAVY", file=sys.stderr) if "torch" in sys.modules else None
sys.exit(status)
"""


def run(code: str, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *args], cwd=ROOT, capture_output=True, text=True, timeout=60)


ANSWERS = [
    [],
    ["--help"],
    ["help"],
    ["help", "data"],
    ["help", "data", "stats"],
    ["help", "help"],
    ["help", "pretrain"],
    ["finetune", "--help"],
    ["--version"],
    ["version"],
    ["version", "--json"],
    ["tokenizer"],
    ["data", "--help"],
    ["configs", "list"],
    ["configs", "list", "--json"],
    ["configs", "show", "pretrain/small.yaml"],
    ["configs", "explain", "model"],
]
MISTAKES = [
    ["trian"],
    ["data", "prep"],
    ["small"],
    ["pretrain/small.yaml"],
    ["pretrain", "small"],
    ["finetune", "--output", "x"],
    ["data", "stats"],
    ["export"],
    ["configs", "show", "smal"],
]


def test_help_and_mistakes_answer_at_once() -> None:
    done = run(WATCHED, json.dumps([*ANSWERS, *MISTAKES]))
    assert done.returncode == 0, done.stderr
    ends = [json.loads(line) for line in done.stderr.splitlines() if line.startswith("[[")]
    assert ends == [[words, status, []] for wordss, status in ((ANSWERS, 0), (MISTAKES, 2)) for words in wordss]


def test_help_shows_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    texts = set()
    for words in ([], ["help"], ["--help"]):
        assert main(words) == 0
        texts.add(capsys.readouterr().out)
    (shown,) = texts
    lines = shown.splitlines()
    # In the order of use.
    assert [name for line in lines for name in COMMANDS if line.startswith(f"  {name} ")] == list(COMMANDS)
    assert len(lines) < 40 and max(map(len, lines)) <= 80


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_every_command_fits_the_terminal(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["help", *command.split()]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("usage: ") and max(map(len, shown.splitlines())) <= 80, shown


@pytest.mark.parametrize("command", ["pretrain", "finetune"])
def test_the_help_of_a_training_has_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["help", command]) == 0
    assert f"e.g. bigtx {command} " in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["version"], ["--version"]):
        assert main(words) == 0
        assert capsys.readouterr().out == f"bigtx {bigtx.__version__}\n"
    for words in (["version"], ["--version"]):
        versions = as_json(capsys, main, words)
        assert versions["bigtx"] == bigtx.__version__ and versions["python"] == platform.python_version()
        assert versions["torch"] == importlib.metadata.version("torch") and "deepspeed" in versions


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["tokenizr", "train"], "did you mean bigtx tokenizer train?"),
        (["tokenizr"], "did you mean bigtx tokenizer?"),
        (["data", "prep"], "did you mean bigtx data prepare?"),
        (["data", "zzz"], "`bigtx data` has prepare, merge, inspect, stats and verify"),
        (["prepare"], "did you mean bigtx data prepare?"),
        (["help", "generat"], "did you mean bigtx generate?"),
        (["zzz"], "`bigtx help` shows all commands"),
        (["train"], "`bigtx pretrain` trains a model on prepared corpora, `bigtx finetune` one on records"),
        (["trian"], "`bigtx pretrain` trains a model on prepared corpora, `bigtx finetune` one on records"),
        (["fine-tune"], "did you mean bigtx finetune?"),
        (["finetuning"], "did you mean bigtx finetune?"),
        (["pre_train"], "did you mean bigtx pretrain?"),
        (["plot"], "the metrics are in RUN/metrics.jsonl, and charts are in W&B"),
        (["tokenize"], "`bigtx tokenizer train` makes a tokenizer, `bigtx data prepare` tokenizes"),
        (["serve"], "there is no server"),
        (["pretrain/small.yaml", "seed=2"], "write bigtx pretrain pretrain/small.yaml seed=2"),
        (["finetune/chat.yaml"], "write bigtx finetune finetune/chat.yaml"),
        (["data/python-stdlib-tokenizer.yaml"], "write bigtx tokenizer train data/python-stdlib-tokenizer.yaml"),
        (["pretrain/smal.yaml"], "did you mean bigtx pretrain pretrain/small.yaml?"),
        (["small"], "did you mean bigtx pretrain pretrain/small.yaml?"),
        (["pretrain", "small"], "no file 'small', here or among the recipes; did you mean pretrain/small.yaml?"),
        (["pretrain", "pretrain/smal.yaml"], "did you mean pretrain/small.yaml?"),
        (["finetune", "chat"], "did you mean finetune/chat.yaml"),
        (["pretrain", "gpt"], "did you mean pretrain/gpt-1.3b.yaml or pretrain/gpt-125m.yaml or"),
        (["data", "prepare", "--output", "x"], "settings are written KEY=VALUE: output=x"),
        (["tokenizer", "train", "-o", "x"], "settings are written KEY=VALUE: output=x"),
        (["pretrain", "--api-key", "plain-secret"], "--api-key (command line): no such option"),
        (["generate"], "RUN and prompt=TEXT or prompts_file=FILE are missing"),
        (["predict", "r", "inptu=x"], "did you mean input=FILE?"),
        (["export", "r", "to=onnx", "-o", "x"], "to=onnx: is not one of hf, peft"),
        (["data", "stats"], "CORPUS is missing; write bigtx data stats CORPUS [--json]"),
        (["data", "verify", "x", "processes=all"], "processes=all: is not a whole number"),
        (["version", "--jsn"], "did you mean --json?"),
        (["configs", "explain", "train.max_stepz"], "did you mean train.max_steps?"),
        (["configs", "show", "smal"], "did you mean pretrain/small.yaml"),
        (["configs", "copy", "absent"], "no recipe 'absent'"),
    ],
)
def test_mistakes_are_explained(args: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(args) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and words in shown.err and "plain-secret" not in shown.err
    assert shown.err.count("\n") == 1, shown.err


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (
            ["train.max_stepz=3"],
            r"train\.max_stepz=3 \(command line\): no such setting; did you mean train\.max_steps\?",
        ),
        (["train.max_steps=abc"], r"train\.max_steps=abc \(command line\): is not a whole number"),
        (["absent.yaml"], r"no file 'absent\.yaml'"),
        (["--ranks=none"], "--ranks none: write how many ranks to start"),
        (["run_dir=${oc.env:HOME}"], "never replaces"),
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


@pytest.mark.parametrize("command", ["pretrain", "tokenizer train", "data prepare"])
def test_rank_0_alone_prints_the_config(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_text("a text")
    words = {
        "pretrain": ["run_dir=r", "train.max_steps=1", f"data.sources.a.path={tmp_path}"],
        "tokenizer train": [f"input.paths={tmp_path}", "output=t"],
        "data prepare": [f"input.paths={tmp_path}", "output=c", f"tokenizer={tmp_path}"],
    }[command]
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "manifest.json").touch()
    for name, value in {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "here", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    for number, expected in (("1", None), ("0", words[0].partition("=")[2])):
        monkeypatch.setenv("RANK", number)
        assert main([*command.split(), *words, "--print-config"]) == 0
        shown = yaml.safe_load(capsys.readouterr().out)
        assert (shown is None) == (expected is None)
        assert expected is None or expected in (shown.get("run_dir"), *shown.get("input", {}).get("paths", []))


def test_python_m(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bigtx", "version"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (0, f"bigtx {bigtx.__version__}\n")


def test_a_reader_that_leaves_is_no_error() -> None:
    command = f"{sys.executable} -m bigtx configs explain | head -n 1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_version_is_that_of_the_package() -> None:
    assert importlib.metadata.version("bigtx") == bigtx.__version__
    with pytest.raises(AttributeError):
        _ = bigtx.nothing
