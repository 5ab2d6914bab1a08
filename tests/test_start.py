"""What is imported before a command answers or trains: a start is as slow as what it imports."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from doors import BF16, ROOT, TINY, environment

from bigtx.config.load import load, to_yaml
from bigtx.config.schema import PretrainConfig
from bigtx.engine.checkpoint import FORMAT_VERSION, write_manifest
from bigtx.utils.processes import hold_free_port

IMPORTED = """
import importlib, json, sys
place, calls, report = sys.argv[1], json.loads(sys.argv[2]), []
module, _, name = place.partition(":")
command = getattr(importlib.import_module(module), name)
for arguments in calls:
    try:
        status = command(arguments)
    except SystemExit as end:
        status = end.code
    report.append([status, sorted(sys.modules)])
open(sys.argv[3], "w").write(json.dumps(report))
"""
"""Calls a command several times; writes its status and the modules there are after each."""


def imported(place: str, calls: Sequence[Sequence[Any]], cwd: Path, **changes: str) -> list[tuple[int, set[str]]]:
    """The status of each call in one process, and what has been imported by then.

    Args:
        changes: of the environment.
    """
    words, report = json.dumps([list(map(str, arguments)) for arguments in calls]), cwd / "imported.json"
    done = subprocess.run(
        [sys.executable, "-c", IMPORTED, place, words, str(report)],
        capture_output=True,
        text=True,
        cwd=cwd,
        timeout=300,
        env=environment(PYTHONPATH=str(ROOT), **changes),
    )
    assert done.returncode == 0, done.stderr
    return [(status, set(modules)) for status, modules in json.loads(report.read_text())]


@pytest.mark.parametrize("module", ["bigtx.pretrain", "bigtx.finetune"])
def test_a_mistake_in_a_config_is_answered_before_anything_heavy(tmp_path: Path, module: str) -> None:
    mistakes = [["nowhere.yaml"], ["train.max_stepps=3"], ["train.max_steps=many"], ["model.num_layers=-1"]]
    for status, modules in imported(f"{module}:main", mistakes, tmp_path):
        assert status == 2
        assert not modules & {"torch", "deepspeed", "numpy", "sentencepiece", "wandb", "webdataset"}


def test_a_mistake_in_words_or_paths_is_answered_without_torch(tmp_path: Path) -> None:
    unsaved = tmp_path / "unsaved"
    unsaved.mkdir()
    source = f"data.sources.a.path={tmp_path}"
    (unsaved / "config.yaml").write_text(
        to_yaml(load(PretrainConfig, [*TINY, source, "train.max_steps=1"], check=False))
    )
    saved = tmp_path / "saved"
    shutil.copytree(unsaved, saved)
    manifest = {"format": FORMAT_VERSION, "step": 1, "parameters": {}, "files": {}}
    (saved / "checkpoints" / "step-00000001").mkdir(parents=True)
    write_manifest(saved / "checkpoints" / "step-00000001", manifest)
    calls: list[list[Any]] = [["evaluate", saved, "--data", tmp_path / "nowhere"]]
    for run in (tmp_path / "nowhere", tmp_path, unsaved):
        calls += [
            ["generate", run, "--prompt", "x"],
            ["predict", run, "--input", "-"],
            ["evaluate", run, "--split", "validation"],
            ["export", run, "--to", "hf", "-o", tmp_path / "out"],
            ["export", run, "--to", "peft", "--base", tmp_path, "-o", tmp_path / "out"],
        ]
    calls += [
        ["data", "prepare", "input.paths=nowhere", "tokenizer=nowhere", "output=out"],
        ["data", "inspect", "nowhere"],
        ["data", "verify", "nowhere"],
        ["data", "stats", "nowhere"],
        ["tokenizer", "inspect", "nowhere"],
    ]
    for arguments, (status, modules) in zip(calls, imported("bigtx.cli:main", calls, tmp_path), strict=True):
        assert status == 2, arguments
        assert not modules & {"torch", "deepspeed", "transformers"}, arguments


@pytest.mark.dist
@pytest.mark.parametrize("stage", [pytest.param(0, marks=pytest.mark.slow), 1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_imports_no_compiler_and_nothing_that_it_does_not_use(corpus: Path, tmp_path: Path, stage: int) -> None:
    settings = [
        *TINY,
        *BF16,
        f"data.sources.a.path={corpus}",
        f"run_dir={tmp_path / 'run'}",
        f"engine.zero_stage={stage}",
        "optimizer.name=muon",
        "train.max_steps=1",
        "track.wandb=off",
    ]
    # A rank of a launcher: bigtx itself would start another process.
    with hold_free_port() as held:
        rank = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
        rank["MASTER_PORT"] = str(held.getsockname()[1])
        [(status, modules)] = imported("bigtx.pretrain:main", [settings], tmp_path, **rank)
    assert status == 0
    assert {"torch", "deepspeed", "bigtx.model.attention"} <= modules
    compilers = {"torch._dynamo", "torch._inductor", "torch.utils.cpp_extension", "setuptools", "sympy"}
    assert not modules & (compilers | {"wandb", "transformers", "tokenizers", "webdataset", "pyarrow"})
