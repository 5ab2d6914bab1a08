"""A run whose loss has spikes, or whose ranks come to hold different weights."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import forks
import pytest
from doors import ROOT, TINY, environment, losses, pretrain, read_lines, same_weights
from finetunes import RHYTHM, labelled, make_base, write_jsonl

from bigtx.engine.checkpoint import Checkpoint, list_checkpoints, read_manifest

pytestmark = pytest.mark.dist


def struck(faults: dict[str, Any], *arguments: str, ranks: int = 1) -> Any:
    """A training with faults, to its end."""
    return forks.run(
        [
            sys.executable,
            str(ROOT / "tools" / "drill" / "inject.py"),
            json.dumps(faults),
            *arguments,
            f"--ranks={ranks}",
        ],
        capture_output=True,
        text=True,
        timeout=600,
        env=environment(),
    )


def run_of(corpus: Path, run_dir: Path, *changes: str) -> list[str]:
    guards = ["guards.window=8", "train.checkpoint_every=5 steps", "schedule.warmup=0 steps"]
    return [*TINY, f"data.sources.a.path={corpus}", f"run_dir={run_dir}", *guards, *changes]


def events(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    """The events of a kind."""
    return [event for event in read_lines(run_dir / "events.jsonl") if event["kind"] == kind]


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_spikes_that_last_send_the_run_back_past_their_data(corpus: Path, tmp_path: Path, ranks: int) -> None:
    run_dir, skipped = tmp_path / "run", tmp_path / "skipped"
    changes = ["guards.spike=roll_back", "guards.patience=2", "guards.skip_steps=1", "train.max_steps=20"]
    changes += ["engine.precision=bf16"] * (ranks - 1)
    done = struck({"loud": [96, 112, 3.0]}, *run_of(corpus, run_dir, *changes), ranks=ranks)
    assert done.returncode == 0, done.stdout + done.stderr
    # Steps 13 and 14 read 96 to 112; the checkpoint is that of step 10, at 80; one step more is skipped.
    assert [(event["step"], event["sequences"]) for event in events(run_dir, "spike")] == [
        (13, "96-104"),
        (14, "104-112"),
    ]
    (event,) = events(run_dir, "roll_back")
    assert (event["step"], event["checkpoint"], event["skipped_sequences"]) == (14, "step-00000010", "80-120")
    assert "back at step 10, with step-00000010; its sequences 80-120 are skipped" in done.stdout
    # The same as if the user had skipped them.
    assert pretrain(*run_of(corpus, skipped, "data.skip=[80-120]", *changes), ranks=ranks).returncode == 0
    assert losses(run_dir) == losses(skipped) and sorted(losses(run_dir)) == list(range(1, 21))
    same_weights(run_dir, skipped)
    last = read_lines(run_dir / "metrics.jsonl")[-1]
    assert (last["train/roll_backs"], last["train/spikes"]) == (1, 0)


def test_a_killed_run_returns_as_an_unbroken_one(corpus: Path, tmp_path: Path) -> None:
    """Killed between the return and the next checkpoint, and after that checkpoint."""
    straight, loud = tmp_path / "straight", {"loud": [96, 112, 3.0]}
    changes = ["guards.spike=roll_back", "guards.patience=2", "train.max_steps=20"]
    assert struck(loud, *run_of(corpus, straight, *changes)).returncode == 0
    for step in (12, 16):
        run_dir = tmp_path / f"killed-{step}"
        assert struck(loud | {"kill": [1, step]}, *run_of(corpus, run_dir, *changes)).returncode != 0
        done = struck(loud, *run_of(corpus, run_dir, *changes))
        assert done.returncode == 0, done.stdout + done.stderr
        assert losses(run_dir) == losses(straight)
        same_weights(run_dir, straight)
        manifests = [read_manifest(list_checkpoints(each)[0]) for each in (run_dir, straight)]
        assert manifests[0]["state"] == manifests[1]["state"] and manifests[0]["guards"] == manifests[1]["guards"]
        assert manifests[0]["state"]["roll_backs"] == 1
        assert len(events(run_dir, "roll_back")) == (2 if step == 12 else 1)


def test_the_update_of_a_spike_is_left_out(corpus: Path, tmp_path: Path) -> None:
    run_dir, resumed = tmp_path / "run", tmp_path / "resumed"
    faults = {"loud": [80, 88, 3.0], "kill": [0, 10]}
    arguments = ["guards.spike=skip", "train.max_steps=15", "engine.precision=bf16"]
    done = struck({"loud": faults["loud"]}, *run_of(corpus, run_dir, *arguments), ranks=2)
    assert done.returncode == 0, done.stdout + done.stderr
    (event,) = events(run_dir, "spike")
    assert (event["step"], event["sequences"], event["skipped"]) == (11, "80-88", True)
    assert event["value"] > event["limit"] > event["median"]
    assert done.stdout.count("step 11 (sequences 80-88) skipped: its loss") == 1
    found = read_manifest(list_checkpoints(run_dir)[0])
    assert found["num_updates"] == 14 and found["state"]["skipped_steps"] == 0 and not found.get("suspect")
    assert losses(run_dir)[11] == "NaN", "of a window without a loss"
    assert [line["train/spikes"] for line in read_lines(run_dir / "metrics.jsonl")][9:11] == [0, 1]
    # A resumed run has the same window, without which step 11 were not judged.
    assert struck(faults, *run_of(corpus, resumed, *arguments), ranks=2).returncode != 0
    assert struck({"loud": faults["loud"]}, *run_of(corpus, resumed, *arguments), ranks=2).returncode == 0
    assert losses(resumed) == losses(run_dir)
    same_weights(resumed, run_dir)


def test_a_warning_changes_nothing(corpus: Path, tmp_path: Path) -> None:
    run_dir, unguarded = tmp_path / "run", tmp_path / "unguarded"
    done = struck({"loud": [80, 88, 3.0]}, *run_of(corpus, run_dir, "train.max_steps=12"))
    assert done.stdout.count("warning: step 11 (sequences 80-88): its loss") == 1, done.stdout + done.stderr
    assert [event["skipped"] for event in events(run_dir, "spike")] == [False]
    off = run_of(corpus, unguarded, "guards.spike=off", "train.max_steps=12")
    done = struck({"loud": [80, 88, 3.0]}, *off)
    assert events(unguarded, "spike") == [] and "train/spikes" not in read_lines(unguarded / "metrics.jsonl")[0]
    assert losses(run_dir) == losses(unguarded)
    same_weights(run_dir, unguarded)


def test_a_step_is_saved_again_whose_checkpoint_was_suspect(corpus: Path, tmp_path: Path) -> None:
    """A streak of spikes, and one of skipped steps, into which the save of step 15 falls."""
    back, resumed = tmp_path / "back", tmp_path / "resumed"
    changes = ["guards.spike=roll_back", "guards.patience=3", "train.max_steps=20"]
    done = struck({"loud": [104, 128, 3.0]}, *run_of(corpus, back, *changes))
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(events(back, "roll_back")) == 1
    changes = ["train.max_skipped_steps=2", "train.max_steps=20"]
    done = struck({"loud": [104, 10_000, float("nan")]}, *run_of(corpus, resumed, *changes))
    assert done.returncode == 2 and list_checkpoints(resumed)[0].name == "step-00000015"
    assert read_manifest(list_checkpoints(resumed)[0])["suspect"]
    done = pretrain(*run_of(corpus, resumed, *changes))
    assert done.returncode == 0, done.stdout + done.stderr
    for run_dir in (back, resumed):
        found = list_checkpoints(run_dir)
        assert [path.name for path in found] == ["step-00000020", "step-00000015"]
        assert not any(read_manifest(path).get("suspect") or Checkpoint(path).verify() for path in found)


def test_too_many_returns_end_the_run(corpus: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    changes = ["guards.spike=roll_back", "guards.patience=2", "guards.max_roll_backs=2", "train.max_steps=20"]
    done = struck({"loud": [96, 10_000, 3.0]}, *run_of(corpus, run_dir, *changes))
    assert done.returncode == 2, done.stdout + done.stderr
    assert "the run has returned to a checkpoint 2 times, and guards.max_roll_backs allows no more" in done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert [event["skipped_sequences"] for event in events(run_dir, "roll_back")] == ["80-112", "80-128"]
    assert [path.name for path in list_checkpoints(run_dir)] == ["step-00000010", "step-00000005"]
    # Without the fault, the same command finishes the run.
    done = pretrain(*run_of(corpus, run_dir, *changes))
    assert done.returncode == 0 and sorted(losses(run_dir)) == list(range(1, 21)), done.stdout + done.stderr


def test_a_nan_on_one_rank_is_skipped_by_all_and_a_streak_returns_the_run(corpus: Path, tmp_path: Path) -> None:
    run_dir, skipped = tmp_path / "run", tmp_path / "skipped"
    changes = ["guards.spike=roll_back", "train.max_skipped_steps=2", "train.max_steps=20", "engine.precision=bf16"]
    faults = {"loud": [96, 120, float("nan")], "rank": 1}
    done = struck(faults, *run_of(corpus, run_dir, *changes), ranks=2)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [event["step"] for event in events(run_dir, "skipped_step")] == [13, 14, 15]
    (event,) = events(run_dir, "roll_back")
    assert event["why"].startswith("3 steps in a row (up to step 15) had a loss or gradient that is not finite")
    assert event["skipped_sequences"] == "80-120" and event["checkpoint"] == "step-00000010"
    assert pretrain(*run_of(corpus, skipped, "data.skip=[80-120]", *changes), ranks=2).returncode == 0
    assert losses(run_dir) == losses(skipped)
    same_weights(run_dir, skipped)


@pytest.mark.parametrize(
    ("stage", "precision", "every", "step", "whose"),
    [
        (0, "fp32", "1 steps", 12, "the ranks have different copies of embedding.weight, and it is not known"),
        pytest.param(
            1,
            "bf16",
            "1 steps",
            12,
            "the copy of embedding.weight differs from the right one",
            marks=pytest.mark.slow,
        ),
        # Only a checkpoint is due then.
        (1, "fp32", "1000 steps", 15, "the copy of embedding.weight differs from the right one"),
        pytest.param(0, "bf16", "1000 steps", 14, "it is not known which one is right", marks=pytest.mark.slow),
        pytest.param(2, "bf16", "1 steps", 13, "the copy of embedding.weight differs", marks=pytest.mark.slow),
        pytest.param(2, "fp32", "4 steps", 12, "the copy of embedding.weight differs", marks=pytest.mark.slow),
    ],
)
def test_a_flipped_bit_is_found_and_nothing_is_lost(
    corpus: Path, tmp_path: Path, stage: int, precision: str, every: str, step: int, whose: str
) -> None:
    run_dir, straight = tmp_path / "run", tmp_path / "straight"
    changes = [f"engine.zero_stage={stage}", f"engine.precision={precision}", "train.max_steps=18"]
    arguments = [*changes, f"guards.verify_replicas_every={every}"]
    done = struck({"flip": [1, step, "embedding.weight"]}, *run_of(corpus, run_dir, *arguments), ranks=2)
    assert done.returncode == 0, done.stdout + done.stderr
    (event,) = events(run_dir, "roll_back")
    assert whose in event["why"] and "rank 1 (" in event["why"] and (stage == 0) is ("rank 0 (" in event["why"])
    assert (event["checkpoint"], event["skipped_sequences"]) == ("step-00000010", "")
    assert event["why"] in done.stdout
    assert pretrain(*run_of(corpus, straight, *changes), ranks=2).returncode == 0
    assert losses(run_dir) == losses(straight)
    same_weights(run_dir, straight)


@pytest.mark.slow
def test_a_fine_tuning_returns_too(corpus: Path, tmp_path: Path) -> None:
    records = write_jsonl(tmp_path / "records.jsonl", labelled(160))
    base, run_dir = make_base(corpus, tmp_path / "base"), tmp_path / "run"
    arguments = [
        *(f"base={base}", f"data.train=[{records}]", f"run_dir={run_dir}", "task=classify", *RHYTHM),
        *("guards.spike=roll_back", "guards.window=8", "guards.patience=2", "train.checkpoint_every=5 steps"),
        *("train.max_steps=20", "guards.deviations=20"),
    ]
    done = struck({"loud": [96, 112, 100.0], "command": "finetune"}, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    (event,) = events(run_dir, "roll_back")
    assert event["checkpoint"] == "step-00000010" and event["skipped_sequences"] == "80-112"
    assert sorted(losses(run_dir)) == list(range(1, 21))
    assert read_manifest(list_checkpoints(run_dir)[0])["state"]["sequences"] == 112 + 10 * 8
