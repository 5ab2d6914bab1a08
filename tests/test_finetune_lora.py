"""Adapters and frozen parts through the door of fine-tuning: small checkpoints, whole models, and nothing lost."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from doors import losses, same_weights
from finetunes import finetune, finetuned, kill_at, labelled, make_base, results, write_jsonl

from bigtx.cli import main
from bigtx.engine.checkpoint import Checkpoint, MergedCheckpoint, list_checkpoints, load_weights, newest, preferred

FROZEN = ["optimizer.freeze=[embedding.*,'decoder.blocks.0.*']", "optimizer.layer_decay=0.7"]
LORA = ["model.lora.rank=4", "model.lora.dropout=0.1", "optimizer.learning_rate=3e-3"]


@pytest.fixture(scope="module")
def base(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(corpus, tmp_path_factory.mktemp("bases") / "decoder")


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("records") / "train.jsonl", labelled(120))


def run_of(base: Path, records: Path, run_dir: Path, changes: Sequence[str]) -> list[str]:
    return [
        "task=classify",
        f"base={base}",
        f"data.train=[{records}]",
        f"run_dir={run_dir}",
        "train.max_steps=24",
        "train.checkpoint_every=5 steps",
        "schedule.name=constant",
        "validation.every=12 steps",
        *changes,
    ]


@pytest.fixture(scope="module")
def tuned(base: Path, records: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with adapters."""
    run_dir = tmp_path_factory.mktemp("tuned") / "run"
    finetuned(*run_of(base, records, run_dir, LORA))
    return run_dir


def test_a_checkpoint_holds_the_adapters_and_readers_see_a_whole_model(base: Path, tuned: Path) -> None:
    checkpoint, of_base = newest(tuned), dict(load_weights(newest(base)))
    own = Checkpoint(checkpoint).manifest["parameters"]
    assert all(".adapter." in name or name.startswith("head.classes.") for name in own)
    size = sum(path.stat().st_size for path in checkpoint.iterdir())
    whole = sum(path.stat().st_size for path in newest(base).iterdir())
    assert size < 0.4 * whole, (size, whole)
    weights = dict(load_weights(checkpoint))
    same = {name for name in of_base if name in weights}
    assert same == of_base.keys() - {"head.weight"} and same.isdisjoint(own)
    assert all(torch.equal(weights[name], of_base[name]) for name in same)
    assert all(weights[name].any() for name in own if name.endswith(".adapter.b"))
    assert min(losses(tuned).values()) < 0.9 * losses(tuned)[1]
    said = json.loads((tuned / "base.json").read_text())
    assert {name for name in own} == set(said["new"]) and said["dropped"] == ["head.weight"]
    assert results(tuned)["validation"]["accuracy"] > 0.6


@pytest.mark.dist
@pytest.mark.parametrize(
    ("stage", "changes"), [(1, LORA), pytest.param(3, FROZEN, marks=pytest.mark.slow)], ids=["adapters", "frozen"]
)
def test_a_killed_run_loses_nothing(base: Path, records: Path, tmp_path: Path, stage: int, changes: list[str]) -> None:
    changes = [*changes, f"engine.zero_stage={stage}"]
    straight, run_dir, stop_at = tmp_path / "straight", tmp_path / "run", random.randrange(6, 18)
    finetuned(*run_of(base, records, straight, changes), ranks=2)
    assert min(losses(straight).values()) < 0.9 * losses(straight)[1]
    kill_at(run_dir, stop_at, *run_of(base, records, run_dir, changes), ranks=2)
    finetuned(*run_of(base, records, run_dir, changes), ranks=2)
    assert losses(run_dir) == losses(straight), f"killed at step {stop_at}"
    same_weights(run_dir, straight)
    assert (run_dir / "frozen" / "manifest.json").read_bytes() == (straight / "frozen" / "manifest.json").read_bytes()


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("changes", [LORA[:1], FROZEN], ids=["adapters", "frozen"])
def test_other_ranks_and_stages(base: Path, records: Path, tmp_path: Path, changes: list[str]) -> None:
    """2 ranks with ZeRO 1, then 1 rank with ZeRO 0, then 2 with ZeRO 3."""
    run_dir, straight = tmp_path / "run", tmp_path / "straight"
    finetuned(*run_of(base, records, straight, [*changes, "engine.zero_stage=1"]), ranks=2)
    for stage, ranks, steps in ((1, 2, 8), (0, 1, 16), (3, 2, 24)):
        part = [f"engine.zero_stage={stage}", f"train.max_steps={steps}", "allow_changes=[train.max_steps]"]
        finetuned(*run_of(base, records, run_dir, [*changes, *part]), ranks=ranks)
    expected, found = losses(straight), losses(run_dir)
    assert found.keys() == expected.keys()
    assert all(found[step] == expected[step] for step in range(1, 9))
    assert all(abs(found[step] - expected[step]) < 2e-4 for step in range(9, 25))


def test_a_run_of_adapters_as_a_base(base: Path, records: Path, tuned: Path, tmp_path: Path) -> None:
    """Its adapters are merged; the new run has its own, or none."""
    again, whole = tmp_path / "again", tmp_path / "whole"
    finetuned(*run_of(tuned, records, again, ["model.lora.rank=2", "train.max_steps=2"]))
    merged, weights = MergedCheckpoint(preferred(tuned)), dict(load_weights(newest(again)))
    name = "decoder.blocks.1.mlp.down.weight"
    assert torch.equal(weights[name].flatten(), merged.read(name, "master", 0, weights[name].numel()))
    assert not torch.equal(weights[name], dict(load_weights(preferred(tuned)))[name])
    assert weights["decoder.blocks.1.mlp.down.adapter.a"].shape[0] == 2
    finetuned(*run_of(tuned, records, whole, ["train.max_steps=1", "optimizer.learning_rate=0"]))
    weights = dict(load_weights(newest(whole)))
    assert not any(".adapter." in name for name in weights)
    assert torch.equal(weights[name].flatten(), merged.read(name, "master", 0, weights[name].numel()))


def test_damaged_frozen_weights_are_found(base: Path, records: Path, tuned: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(tuned, copy)
    (copy / "results.json").unlink()
    victim = next((copy / "frozen").glob("*.safetensors"))
    content = bytearray(victim.read_bytes())
    content[-1] ^= 1
    victim.write_bytes(content)
    (problem,) = Checkpoint(newest(copy)).verify()
    assert f"frozen/{victim.name} does not have the sha256" in problem
    done = finetune(*run_of(base, records, copy, LORA))
    assert done.returncode == 2 and f"frozen/{victim.name} does not have the sha256" in done.stdout + done.stderr
    assert f"{copy / 'frozen'} is damaged (see above)" in done.stderr and "Traceback" not in done.stderr
    victim.unlink()
    done = finetune(*run_of(base, records, copy, LORA))
    assert done.returncode == 2 and f"{victim.name} is missing" in done.stdout + done.stderr
    assert all((path / "manifest.json").is_file() for path in list_checkpoints(copy))


def test_what_cannot_be_trained_is_said(base: Path, records: Path, tmp_path: Path) -> None:
    for changes, expected in (
        (["model.lora.rank=4", "model.lora.targets=[atention.query]"], "attention.query"),
        (["model.lora.alpha=4"], "has no effect without model.lora.rank=N"),
        (["optimizer.train_also=['*norm*']"], "has no effect without model.lora.rank=N"),
        (["optimizer.freeze=[decoder.block.0.*]"], "matches no parameter of the model; did you mean decoder.blocks.0."),
        (["optimizer.freeze=['*']"], "matches every parameter that would be trained"),
        (["optimizer.freeze=['head.*']"], "begin from the seed, but they would not be trained; leave them out"),
        (["optimizer.layer_decay=0"], "the least is 0.1"),
    ):
        done = finetune(*run_of(base, records, tmp_path / "run", changes))
        assert done.returncode == 2 and expected in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_classes_are_exported_with_adapters_merged(
    tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(tuned), "--to", "hf", "-o", str(tmp_path / "hf")]) == 0
    assert "as LlamaForSequenceClassification: " in capsys.readouterr().out
    assert main(["export", str(tuned), "--to", "peft", "-o", str(tmp_path / "out"), "--base", "x"]) == 2
    assert "besides the adapters, head.classes.weight" in capsys.readouterr().err
