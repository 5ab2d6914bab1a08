"""A run that continues another one from any of its checkpoints, in a folder of its own."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from doors import BF16, TINY, bigtx, losses, pretrain, read_lines, same_weights
from finetunes import labelled, write_jsonl

from bigtx.engine.checkpoint import Checkpoint, list_checkpoints, read_manifest

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def original(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 8 steps with two ranks, with checkpoints at 4 and 8."""
    run_dir = tmp_path_factory.mktemp("original") / "run"
    settings = ["train.max_steps=8", "train.checkpoint_every=4 steps", "model.dropout=0.1", "engine.zero_stage=2"]
    done = pretrain(
        *TINY, *BF16, f"data.sources.a.path={corpus}", f"run_dir={run_dir}", *settings, "track.wandb=off", ranks=2
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return run_dir


def test_a_fork_without_changes_repeats_the_run(original: Path, tmp_path: Path) -> None:
    fork = tmp_path / "fork"
    done = bigtx("pretrain", str(original), f"fork_from={original}@4", f"run_dir={fork}", "--ranks=2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"forked from {original}/checkpoints/step-00000004" in done.stdout
    assert "missing" not in done.stdout, "the lines of the original are not those of the fork"
    expected = losses(original)
    assert losses(fork) == {step: expected[step] for step in range(5, 9)}
    same_weights(fork, original)
    begun = [event for event in read_lines(fork / "events.jsonl") if event["kind"] in ("fork", "resume")]
    source = Checkpoint(original / "checkpoints" / "step-00000004")
    assert [(event["kind"], event["step"], event["manifest_sha256"]) for event in begun] == [
        ("fork", 4, source.manifest_sha256)
    ]
    assert max(losses(original)) == 8, "the original is as it was"


def test_a_branch_has_a_schedule_and_batches_of_its_own_and_needs_its_origin_only_once(
    original: Path, tmp_path: Path
) -> None:
    origin, branch = tmp_path / "origin", tmp_path / "branch"
    shutil.copytree(original, origin)
    words = [
        f"fork_from={origin}@4",
        f"run_dir={branch}",
        "schedule.name=warmup_stable_decay",
        "schedule.decay=2 steps",
    ]
    words += ["optimizer.learning_rate=5e-4", "train.global_batch_size=12", "train.checkpoint_every=1 steps"]
    done = bigtx("pretrain", str(origin), *words, "train.max_steps=6")
    assert done.returncode == 0, done.stdout + done.stderr
    state = read_manifest(list_checkpoints(branch)[0])["state"]
    assert (state["step"], state["sequences"]) == (6, 4 * 8 + 2 * 12)
    rates = [line["train/learning_rate"] for line in read_lines(branch / "metrics.jsonl")]
    assert rates == pytest.approx([5e-4 * 0.55, 5e-4 * 0.1])
    shutil.rmtree(origin)
    done = bigtx("pretrain", str(branch), "train.max_steps=7")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"resumed from {branch}/checkpoints/step-00000006" in done.stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["fork_from={run}@5"], "the run has no checkpoint of that step; it has those of steps 4, 8"),
        (["fork_from={run}/nothing"], "no such folder"),
        (["fork_from={run}@4", "seed=2"], "seed: 1 -> 2"),
        (["fork_from={run}@4", "model.num_layers=3"], "model.num_layers: 2 -> 3"),
        (["fork_from={run}@4", "run_dir={run}"], "is also named by fork_from"),
        (["fork_from={run}@8"], "write a larger train.max_steps, or fork an earlier checkpoint"),
        (
            ["fork_from={run}@4", "train.global_batch_size=12", "train.max_steps=null", "train.max_tokens=1M"],
            "write train.max_steps=N train.max_tokens=null",
        ),
    ],
    ids=["step", "folder", "seed", "model", "own folder", "length", "batch"],
)
def test_what_a_fork_cannot_be(original: Path, tmp_path: Path, words: list[str], said: str) -> None:
    run_dir = tmp_path / "fork"
    done = bigtx("pretrain", str(original), f"run_dir={run_dir}", *(word.format(run=original) for word in words))
    assert done.returncode == 2, done.stdout + done.stderr
    assert said in " ".join(done.stderr.split()) and "Traceback" not in done.stderr, done.stderr
    assert not (run_dir / "checkpoints").exists()


def test_a_fork_on_other_data_is_refused(original: Path, corpus: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(original, other)
    words = [f"fork_from={other}@4", f"run_dir={tmp_path / 'fork'}", f"data.sources.b.path={corpus}"]
    done = bigtx("pretrain", str(other), *words)
    assert done.returncode == 2 and "data.sources.b" in done.stderr, done.stderr


def test_a_fork_of_adapters_has_the_frozen_weights_and_the_base(decoder_base: Path, tmp_path: Path) -> None:
    run_dir, fork = tmp_path / "run", tmp_path / "fork"
    settings = [
        "model.lora.rank=2",
        "train.max_steps=4",
        "train.checkpoint_every=2 steps",
        "train.keep_checkpoints=9",
        "train.global_batch_size=4",
        "train.log_every=1 steps",
        "validation.every=2 steps",
        "track.wandb=off",
    ]
    records = write_jsonl(tmp_path / "records.jsonl", labelled(40))
    done = bigtx("finetune", f"base={decoder_base}", f"data.train=[{records}]", f"run_dir={run_dir}", *settings)
    assert done.returncode == 0, done.stdout + done.stderr
    done = bigtx("finetune", str(run_dir), f"fork_from={run_dir}@2", f"run_dir={fork}")
    assert done.returncode == 0, done.stdout + done.stderr
    shutil.rmtree(run_dir)
    same = {path.name: path.read_bytes() for path in (fork / "frozen").iterdir()}
    assert "manifest.json" in same and Checkpoint(list_checkpoints(fork)[0]).verify() == []
    assert (fork / "base.json").is_file() and (fork / "results.json").is_file()
