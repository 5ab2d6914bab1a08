"""`--json`: the result of a command as one JSON value, alone on standard output."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from advice.shelf import Shelf
from doors import ROOT, as_json, environment

from bigtx.cli import COMMANDS, main
from bigtx.commands import evaluate, generate, interop

WITHOUT = {
    "configs copy": "writes files and shows none",
    "configs show": "shows YAML",
    "finetune": "its metrics are JSON lines in the run folder",
    "help": "explains",
    "pretrain": "its metrics are JSON lines in the run folder",
    "slurm render": "shows a batch script",
}
"""Commands without `--json`, and why."""


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    return Shelf(tmp_path_factory.mktemp("shelf"))


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_that_show_something_have_the_switch(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["help", *command.split()]) == 0
    assert ("\n  --json " in capsys.readouterr().out) is (command not in WITHOUT)


def test_a_text_of_a_single_prompt(shelf: Shelf, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(shelf.decoder), "prompt=red", "max_new_tokens=4", "temperature=0"]
    shown = as_json(capsys, generate.generate_command, words)
    generate.generate_command(words)
    assert capsys.readouterr().out == f"red{shown['completion']}\n"
    assert (shown["prompt"], shown["num_tokens"], shown["ended_by"]) == ("red", 4, "length")


def test_an_evaluation_is_what_its_file_holds(shelf: Shelf, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(shelf.decoder), "split=validation", "wandb=offline", f"output={tmp_path / 'out.json'}"]
    shown = as_json(capsys, evaluate.command, words)
    assert shown.pop("output") == str(tmp_path / "out.json")
    assert shown == json.loads((tmp_path / "out.json").read_text()) and shown["metrics"]


def test_an_evaluation_of_a_pretrained_run_prints_nothing_else(shelf: Shelf, tmp_path: Path) -> None:
    # Not a fork, which would have imported deepspeed: that prints to standard output when it is imported.
    words = ["evaluate", str(shelf.decoder), "wandb=off", f"output={tmp_path / 'out.json'}", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "bigtx", *words], capture_output=True, text=True, env=environment(PYTHONPATH=str(ROOT))
    )
    assert done.returncode == 0 and "metrics" in json.loads(done.stdout), done.stdout + done.stderr


def test_an_evaluation_of_records_some_of_which_cannot_be_used(
    shelf: Shelf, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = tmp_path / "in.jsonl"
    records.write_text('{"text": "red", "label": "joy"}\n{"text": "red"}\n')
    words = [str(shelf.classifier), f"data={records}", "wandb=off", f"output={tmp_path / 'out.json'}", "--json"]
    assert evaluate.command(words) == 1
    shown = json.loads(capsys.readouterr().out)
    assert (shown["records"], shown["num_failed"]) == (1, 1) and "accuracy" in shown["metrics"]


def test_exports_and_imports(
    shelf: Shelf, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    hf, new = tmp_path / "hf", tmp_path / "new"
    exported = as_json(capsys, interop.export_command, [str(shelf.decoder), f"output={hf}", "--no-verify"])
    assert (exported["folder"], exported["to"], exported["compared"]) == (str(hf), "hf", None)
    assert exported["files"] == {path.name: path.stat().st_size for path in hf.glob("*.safetensors")}
    imported = as_json(capsys, interop.import_command, [str(hf), f"output={new}"])
    assert (imported["run"], imported["shape"], imported["num_classes"]) == (str(new), "decoder", None)
    for same in ("model_type", "num_tensors"):
        assert imported[same] == exported[same]
    words = [str(shelf.adapters), "to=peft", "base=elsewhere", f"output={tmp_path / 'peft'}"]
    adapters = as_json(capsys, interop.export_command, words)
    assert (adapters["to"], adapters["rank"], adapters["compared"]) == ("peft", 2, None) and adapters["num_modules"]


def test_an_export_that_is_compared(shelf: Shelf, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    exported = as_json(capsys, interop.export_command, [str(shelf.decoder), f"output={tmp_path / 'hf'}"])
    assert exported["compared"]["num_logits"] > 0 and exported["compared"]["largest_difference"] < 1e-3
