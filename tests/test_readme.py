"""The README: its commands are typed, in its order, and what it says of sizes, links and results holds."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from doors import ROOT, environment

from bigtx.cli import main
from bigtx.config.load import load, to_yaml
from bigtx.config.schema import PretrainConfig
from bigtx.utils.arguments import Arguments

README = (ROOT / "README.md").read_text(encoding="utf-8")
CONFIGURED = ("tokenizer train", "data prepare", "pretrain", "finetune")
"""Commands with a config, which is printed in place of the work."""
QUICK = {
    "tokenizer train": ["vocab_size=400"],
    "pretrain": ["train.max_steps=3", "train.global_batch_size=4", "validation.every=100 steps"],
    "pretrain runs/mine": [],
    "pretrain runs/mine train.max_steps": ["train.max_steps=5"],
    "finetune": ["train.epochs=1", "data.max_length=32"],
    "finetune finetune/chat.yaml": ["train.epochs=1", "train.min_steps=0"],
    "generate": ["max_new_tokens=8"],
}
"""What is added to commands that begin so, by their longest beginning; a later value of a setting counts."""
TRAINED = ["engine.precision=fp32", "track.wandb=off", "--ranks", "1"]
SKIPPED = "gpt-1.3b.yaml"
"""Is too large to be built here."""


def blocks(text: str) -> list[str]:
    """The indented blocks of code."""
    return [block.strip() for block in re.findall(r"(?:^    .*\n)+", text, re.MULTILINE)]


def commands() -> list[list[str]]:
    """The words of each command of bigtx, in the README's order; one that is shown twice is typed once."""
    lines = "\n".join(blocks(README)).replace("\\\n", " ").splitlines()
    words = [shlex.split(line)[1:] for line in map(str.strip, lines) if line.startswith("bigtx ")]
    return [line for number, line in enumerate(words) if line not in words[:number]]


def shown(words: Sequence[str]) -> str:
    return " ".join(words)


class Accepted(Exception):
    """A command line was read to its end."""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a new user, whose path has a space: texts, labelled reviews, others, and chats."""
    home = tmp_path / "my work"
    words = [f"{a}{b}{c}" for a in "bdkl" for b in "aeiou" for c in ("", "n", "r")]
    for number in range(120):
        text = " ".join(words[(number * k + k * k) % len(words)] for k in range(1, 150))
        label = ("good", "bad")[number % 2]
        for path in (f"texts/{number}.txt", f"reviews/{label}/{number}.txt"):
            (home / path).parent.mkdir(parents=True, exist_ok=True)
            (home / path).write_text(f"{text} {label}\n", encoding="utf-8")
    (home / "new").mkdir()
    (home / "new/1.txt").write_text("ba be bi good\n", encoding="utf-8")
    chat = [{"role": "user", "content": "ba be?"}, {"role": "assistant", "content": "bi."}]
    (home / "chats.jsonl").write_text((json.dumps({"messages": chat}) + "\n") * 12, encoding="utf-8")
    monkeypatch.chdir(home)
    return home


@pytest.mark.parametrize("words", commands(), ids=shown)
def test_commands_are_accepted(words: list[str], folder: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By what reads them: nothing is trained, so what a command needs of those before it is made up."""
    read = Arguments.parse_known_args

    def reads(parser: Arguments, *arguments: object) -> None:
        read(parser, *arguments)  # type: ignore[arg-type]
        raise Accepted

    name = " ".join(words[:2]) if words[0] in ("tokenizer", "data", "configs") else words[0]
    if name in CONFIGURED:
        shutil.copytree(corpus, folder / "corpus")
        shutil.copytree(corpus / "tokenizer", folder / "tokenizer")
        made_up_run(folder / "runs/mine")
        if SKIPPED in shown(words):
            assert main(["configs", "copy", "pretrain/gpt-1.3b.yaml"]) == 0
        assert main([*words, "--print-config"]) == 0
    else:
        monkeypatch.setattr(Arguments, "parse_known_args", reads)
        with pytest.raises(Accepted):
            main(words)


def made_up_run(run_dir: Path) -> None:
    """A folder with the config of a run, as far as a config needs it."""
    (run_dir / "checkpoints/step-00000500").mkdir(parents=True)
    config = load(PretrainConfig, ["pretrain/small.yaml", "data.sources.mine.path=corpus", "run_dir=runs/mine"])
    (run_dir / "config.yaml").write_text(to_yaml(config), encoding="utf-8")


@pytest.mark.slow
def test_the_journey(folder: Path) -> None:
    """All commands, one after the other, as they are written but for settings that make them quick."""
    for words in commands():
        if SKIPPED in shown(words):
            continue
        begins = max((key for key in QUICK if shown(words).startswith(key)), key=len, default="")
        added = QUICK.get(begins, [])
        trains = words[0] in ("pretrain", "finetune")
        done = subprocess.run(
            [sys.executable, "-m", "bigtx", *words, *added, *(TRAINED if trains else [])],
            capture_output=True,
            text=True,
            cwd=folder,
            timeout=600,
            env=environment(PYTHONPATH=str(ROOT)),
            input="ba be?\n" if words[0] == "chat" else "",
        )
        assert done.returncode == 0, f"bigtx {shown(words)}\n{done.stdout}\n{done.stderr}"
    assert json.loads((folder / "predictions.jsonl").read_text())["prediction"]["label"] in ("good", "bad")
    assert (folder / "mine-hf/model.safetensors").is_file()
    python = next(block for block in blocks(README) if block.startswith("import bigtx"))
    ran = subprocess.run(
        [sys.executable, "-c", python.replace("\n    ", "\n")],
        capture_output=True,
        text=True,
        cwd=folder,
        env=environment(PYTHONPATH=str(ROOT)),
    )
    assert ran.returncode == 0, ran.stderr


def test_limits() -> None:
    lines = README.splitlines()
    assert len(lines) <= 150
    assert max(map(len, lines)) <= 120
    assert len(README.split()) <= 1300


def test_results_are_in_the_log() -> None:
    """Each number of the table of results, as a number of its own."""
    rows = re.findall(r"^\| .*\*\*.*\|$", README, re.MULTILINE)
    assert len(rows) >= 4
    log = (ROOT / "docs/log.md").read_text(encoding="utf-8")
    missing = [
        number
        for row in rows
        for number in re.findall(r"\d+(?:\.\d+)?", row)
        if not re.search(rf"(?<![\d.]){re.escape(number)}(?![\d]|\.\d)", log)
    ]
    assert not missing


def test_first_screen() -> None:
    """A reader sees within the first screen how bigtx is installed and used."""
    first = "\n".join(README.splitlines()[:12])
    assert [first.find(words) for words in ("pip install", "bigtx data prepare", "bigtx pretrain")] == sorted(
        first.index(words) for words in ("pip install", "bigtx data prepare", "bigtx pretrain")
    )


@pytest.mark.skipif(not shutil.which("make"), reason="needs make")
def test_make_env_is_for_training() -> None:
    """What only the tests need is not in it."""
    shown = subprocess.run(["make", "-n", "-B", "env"], capture_output=True, text=True, cwd=ROOT, check=True).stdout
    assert "-e .[huggingface]" in shown and ".[dev]" not in shown
