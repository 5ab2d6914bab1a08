"""Pretraining through its doors: the launchers, signals, resume, and what a user gets wrong."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import forks
import pytest
from doors import (
    BF16,
    TINY,
    bigtx,
    environment,
    has_saved,
    kill_run,
    last_step,
    losses,
    pretrain,
    pretrain_command,
    rank_pids,
    read_lines,
    same_weights,
    start_pretrain,
    wait_for,
)

from bigtx.track.client import read_log
from bigtx.train.run_folder import WRITTEN
from bigtx.utils.files import read_object, unsealed

pytestmark = pytest.mark.dist
STEPS = 24
WANDB = "track.wandb=offline"


def test_all_launchers_say_who_they_are_and_leave_no_memory_taken(corpus: Path, tmp_path: Path) -> None:
    shared_memory = Path("/dev/shm")
    before = set(shared_memory.glob("deepspeed_*"))
    arguments = [*TINY, WANDB, f"data.sources.a.path={corpus}", "train.max_steps=2"]
    # New interpreters, which users have, and forks have not.
    command = pretrain_command([*arguments, f"run_dir={tmp_path / 'one'}"], 1)
    alone = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment(), timeout=600)
    assert alone.returncode == 0, alone.stderr
    assert "1 rank;" in alone.stdout
    two = pretrain(*arguments, f"run_dir={tmp_path / 'two'}", ranks=2, launcher=True, cwd=tmp_path)
    assert two.returncode == 0, two.stdout + two.stderr
    assert "bigtx: 2 ranks, started by deepspeed; run folder" in two.stdout
    assert set(shared_memory.glob("deepspeed_*")) <= before
    for run in ("one", "two"):
        folder = tmp_path / run
        assert {
            "config.yaml",
            "deepspeed.json",
            "environment.json",
            "tokenizer",
            "checkpoints",
            "metrics.jsonl",
            "logs",
        } <= {path.name for path in folder.iterdir()}
        metrics = read_lines(folder / "metrics.jsonl")[-1]
        assert {
            "train/loss",
            "train/grad_norm",
            "train/learning_rate",
            "perf/tokens_per_second",
            "perf/memory_gib",
            "validation/a/loss",
            "validation/a/bits_per_byte",
        } <= metrics.keys()
        # A folder where one of the others stands is no folder for a new run.
        beside = {"checkpoints", "logs", "wandb"}
        assert {path.name for path in folder.iterdir()} <= {*WRITTEN, *beside}


def test_dry_run_keeps_nothing_and_misses_the_validation(corpus: Path, tmp_path: Path) -> None:
    shutil.copytree(corpus, tmp_path / "corpus", ignore=shutil.ignore_patterns("validation"))
    source = f"data.sources.a.path={tmp_path / 'corpus'}"
    done = pretrain(*TINY, source, f"run_dir={tmp_path / 'run'}", "train.max_steps=9", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "dry run: one step, loss" in done.stdout
    assert "no validation: the corpora have no held-out text" in done.stdout
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def uninterrupted(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks that nobody disturbed."""
    run_dir = tmp_path_factory.mktemp("uninterrupted") / "run"
    done = pretrain(*resumable(corpus, run_dir), ranks=2)
    assert done.returncode == 0, done.stdout + done.stderr
    return run_dir


def resumable(corpus: Path, run_dir: Path, stage: int = 1) -> list[str]:
    return [
        *TINY,
        *BF16,
        f"data.sources.a.path={corpus}",
        f"run_dir={run_dir}",
        f"train.max_steps={STEPS}",
        "optimizer.name=muon",
        "train.checkpoint_every=7 steps",
        "model.dropout=0.1",
        f"engine.zero_stage={stage}",
    ]


def test_killed_and_started_again_nothing_is_lost(corpus: Path, tmp_path: Path, uninterrupted: Path) -> None:
    run_dir, stop_at = tmp_path / "run", random.randrange(8, 14)
    arguments = [*resumable(corpus, run_dir), WANDB]
    process = start_pretrain(*arguments, ranks=2)
    wait_for(lambda: has_saved(run_dir, stop_at), process)
    kill_run(process, run_dir)
    run_id = (run_dir / "wandb_run_id").read_text()
    done = pretrain(*arguments, ranks=2)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "resumed from" in done.stdout
    assert losses(run_dir) == losses(uninterrupted), f"killed at step {stop_at}"
    phases = ["command", "imports", "ranks", "data", "folder", "engine", "weights", "tracker", "first_step"]
    assert [list(event["seconds"]) for event in events(run_dir, "start_up")] == [phases] * 2
    assert (run_dir / "wandb_run_id").read_text() == run_id
    # The first start may have been killed before W&B had begun: the second one logs its steps, too.
    logs = sorted((run_dir / "wandb").glob("offline-run-*/*.wandb"))
    assert {path.name for path in logs} == {f"run-{run_id.strip()}.wandb"}
    logged = [record.history.step.num for path in logs for record in wandb_records(path) if record.HasField("history")]
    assert logged == [line["step"] for line in read_lines(run_dir / "metrics.jsonl")]
    same_weights(run_dir, uninterrupted)


def wandb_records(path: Path) -> list[Any]:
    """Return the records of a W&B run's local log."""
    from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]

    return [Record.FromString(record) for record in read_log(path)]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_killed_and_started_again_at_the_other_stages(corpus: Path, tmp_path: Path, stage: int) -> None:
    straight, run_dir = tmp_path / "straight", tmp_path / "run"
    assert pretrain(*resumable(corpus, straight, stage), ranks=2).returncode == 0
    process = start_pretrain(*resumable(corpus, run_dir, stage), ranks=2)
    wait_for(lambda: has_saved(run_dir, random.randrange(8, 14)), process)
    kill_run(process, run_dir)
    assert pretrain(*resumable(corpus, run_dir, stage), ranks=2).returncode == 0
    assert losses(run_dir) == losses(straight)
    same_weights(run_dir, straight)


def test_ctrl_c_saves_without_a_traceback(corpus: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    arguments = [*resumable(corpus, run_dir), WANDB, "train.max_steps=100000", "train.log_every=4 steps"]
    process = start_pretrain(*arguments, ranks=2)
    wait_for(lambda: last_step(run_dir) >= 3 and events(run_dir, "wandb"), process)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=120)
    ours = [line for line in (out + err).splitlines() if "launch" not in line]
    assert "Traceback" not in out, out
    assert "stopped at step" in out, ours
    saved = max(path.name for path in (run_dir / "checkpoints").iterdir())
    (end,) = events(run_dir, "end")
    assert (end["status"], f"step-{end['step']:08d}") == ("stopped", saved)
    # W&B may end later than the ranks, and what they leave behind is ended: not in the middle of this.
    assert events(run_dir, "wandb_error") == [] and len(list((run_dir / "wandb").glob("offline-run-*"))) == 1
    assert "Traceback" not in (run_dir / "logs" / "wandb.log").read_text()
    assert rank_pids(run_dir) == []


def test_a_terminal_that_closes_is_a_request_to_stop(corpus: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    terminal, end = os.openpty()
    process = forks.start(
        pretrain_command([*resumable(corpus, run_dir), "train.max_steps=100000"], ranks=1),
        stdin=end,
        stdout=end,
        stderr=end,
        text=True,
        env=environment(),
        start_new_session=True,
        on_terminal=True,
    )
    os.close(end)
    try:
        wait_for(lambda: last_step(run_dir) >= 3, process)
    finally:
        os.close(terminal)
    assert process.wait(timeout=120) == 75
    (ended,) = events(run_dir, "end")
    assert ended["status"] == "stopped"
    assert f"step-{ended['step']:08d}" in [path.name for path in (run_dir / "checkpoints").iterdir()]


def test_stopped_before_the_first_step(corpus: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    process = start_pretrain(*resumable(corpus, run_dir), ranks=1)
    log = run_dir / "logs" / "rank-00000.log"
    wait_for(lambda: log.exists() and "model:" in log.read_text(), process)
    os.killpg(process.pid, signal.SIGINT)
    os.killpg(process.pid, signal.SIGTERM)  # As the deepspeed launcher does at once.
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, out + err
    assert "stopped before the first step; nothing to save" in out and "Traceback" not in out + err
    assert sorted(path.name for path in run_dir.iterdir()) == ["environment.json", "logs"]


def test_a_run_is_resumed_by_its_folder_alone(corpus: Path, tmp_path: Path, uninterrupted: Path) -> None:
    shutil.copytree(uninterrupted, tmp_path / "moved")
    task = tmp_path / "moved" / "wandb_task.json"
    task.write_bytes(b"\xff\0")  # `bigtx wandb sync` says that training further writes it again.
    done = bigtx("pretrain", "moved", f"train.max_steps={STEPS + 2}", "--ranks", "2", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"resumed from moved/checkpoints/step-{STEPS:08d}" in done.stdout
    assert max(losses(tmp_path / "moved")) == STEPS + 2 and max(losses(uninterrupted)) == STEPS
    changes = [event for event in read_lines(tmp_path / "moved" / "events.jsonl") if event["kind"] == "config_change"]
    assert [(change["key"], change["old"], change["new"]) for change in changes] == [
        ("train.max_steps", STEPS, STEPS + 2)
    ]
    assert unsealed(read_object(task))


def test_a_damaged_checkpoint_is_named_and_the_one_before_used(
    corpus: Path, tmp_path: Path, uninterrupted: Path
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(uninterrupted, run_dir)
    newest = max((run_dir / "checkpoints").iterdir())
    victim = next(newest.glob("*.safetensors"))
    victim.write_bytes(victim.read_bytes()[:-100])
    done = pretrain(*resumable(corpus, run_dir), ranks=2)
    assert done.returncode == 0, done.stdout + done.stderr
    assert victim.name in done.stdout and "damaged" in done.stdout
    assert losses(run_dir) == losses(uninterrupted)
    for checkpoint in (run_dir / "checkpoints").iterdir():
        for file in checkpoint.glob("*.safetensors"):
            file.write_bytes(file.read_bytes()[:-100])
    done = pretrain(*resumable(corpus, run_dir))
    assert done.returncode == 2
    assert "every checkpoint" in done.stderr and "Traceback" not in done.stderr


def test_resumed_with_other_ranks_stage_and_precision(corpus: Path, tmp_path: Path, uninterrupted: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(uninterrupted, run_dir)
    shutil.rmtree(max((run_dir / "checkpoints").iterdir()))
    done = pretrain(*resumable(corpus, run_dir, stage=3), "engine.precision=fp32", "train.micro_batch_size=4")
    assert done.returncode == 0, done.stdout + done.stderr
    expected, found = losses(uninterrupted), losses(run_dir)
    assert found.keys() == expected.keys()
    manifest = json.loads((max((run_dir / "checkpoints").iterdir()) / "manifest.json").read_text())
    assert manifest["state"]["sequences"] == STEPS * 8
    # Another precision rounds otherwise; data and dropout are the same.
    assert all(abs(found[step] - expected[step]) < 0.3 for step in expected)


def test_what_may_change_at_resume(corpus: Path, tmp_path: Path, uninterrupted: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(uninterrupted, run_dir)
    changed = ["optimizer.learning_rate=5e-4", f"train.max_steps={STEPS + 2}"]
    refused = pretrain(*resumable(corpus, run_dir), *changed, "model.num_layers=3")
    assert refused.returncode == 2
    for key in ("optimizer.learning_rate", "train.max_steps", "model.num_layers"):
        assert key in refused.stderr
    done = pretrain(
        *resumable(corpus, run_dir),
        *changed,
        "allow_changes=[optimizer.learning_rate,train.max_steps]",
        ranks=2,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert max(losses(run_dir)) == STEPS + 2
    changes = {
        event["key"]: event["new"] for event in read_lines(run_dir / "events.jsonl") if event["kind"] == "config_change"
    }
    assert changes == {"optimizer.learning_rate": 5e-4, "train.max_steps": STEPS + 2}


def test_a_finished_run_says_so(corpus: Path, tmp_path: Path, uninterrupted: Path) -> None:
    done = pretrain(*resumable(corpus, uninterrupted))
    assert done.returncode == 0
    assert "the run is finished" in done.stdout


def test_init_from_another_run(corpus: Path, tmp_path: Path, uninterrupted: Path) -> None:
    done = pretrain(
        *resumable(corpus, tmp_path / "run"),
        f"init_from={uninterrupted}",
        "train.max_steps=3",
        "optimizer.name=adamw",
        "engine.zero_stage=0",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert losses(tmp_path / "run")[1] < losses(uninterrupted)[1] - 0.5
    other = pretrain(*resumable(corpus, tmp_path / "other"), f"init_from={uninterrupted}", "model.hidden_size=32")
    assert other.returncode == 2 and "other parameters" in other.stderr and "Traceback" not in other.stderr


def test_two_runs_for_one_folder(corpus: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    process = start_pretrain(*resumable(corpus, run_dir), "train.max_steps=100000", ranks=2)
    wait_for(lambda: last_step(run_dir) >= 1, process)
    second = pretrain(*resumable(corpus, run_dir), "train.max_steps=100000")
    kill_run(process, run_dir)
    assert second.returncode == 2 and "is in use by process" in second.stderr and "Traceback" not in second.stderr
    assert second.stdout == "", "it looks before it begins anything"
    assert (
        pretrain(
            *resumable(corpus, run_dir),
            "train.max_steps=100000",
            "allow_changes=[train.max_steps]",
            "train.max_steps=12",
        ).returncode
        == 0
    )


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["model.hiden_size=64"], "hidden_size"),
        (
            ["model.num_layers=two"],
            "model.num_layers=two (command line): is not a whole number; write it in digits, e.g. 8",
        ),
        (["data.sources.a.path=/nowhere"], "/nowhere"),
        (["model.vocab_size=300", "model.hidden_size=64"], "vocab_size"),
        (["engine.precision=fp16", "engine.zero_stage=0"], "fp16"),
        (["engine.offload_parameters=cpu"], "offload_parameters"),
        (["deepspeed.zero_optimization.stage=3"], "engine.zero_stage"),
        (["no/such/file.yaml"], "no/such/file.yaml"),
    ],
)
def test_mistakes_are_one_paragraph(corpus: Path, tmp_path: Path, arguments: list[str], expected: str) -> None:
    done = pretrain(
        *TINY, f"data.sources.a.path={corpus}", f"run_dir={tmp_path / 'run'}", "train.max_steps=2", *arguments
    )
    assert done.returncode == 2, done.stdout + done.stderr
    assert expected in done.stderr
    assert "Traceback" not in done.stderr + done.stdout


def events(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    """The run's events of a kind."""
    return [event for event in read_lines(run_dir / "events.jsonl") if event["kind"] == kind]


@pytest.mark.parametrize(("changes", "words"), [({"RANK": "3"}, "holds RANK=3"), ({"WORLD_SIZE": "4"}, "WORLD_SIZE=4")])
def test_half_an_environment_of_a_launcher_is_refused(
    corpus: Path, tmp_path: Path, changes: dict[str, str], words: str
) -> None:
    run = [f"data.sources.a.path={corpus}", f"run_dir={tmp_path / 'run'}", "train.max_steps=2"]
    command = pretrain_command([*TINY, *run], 1)
    done = forks.run(command, capture_output=True, text=True, timeout=120, env=environment(**changes))
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.startswith("LaunchError: ") and words in done.stderr and "unset" in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_moved_run_goes_on_where_it_is_and_its_last_words_stand_alone(corpus: Path, tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new place"
    done = pretrain(*TINY, f"data.sources.a.path={corpus}", f"run_dir={old}", "train.max_steps=2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "perf/mfu" not in (old / "metrics.jsonl").read_text(), "no maker publishes the peak of a CPU"
    old.rename(new)
    longer = ["train.max_steps=4", "allow_changes=[train.max_steps]", f"data.sources.a.path={corpus}/"]
    terminal, end = os.openpty()
    process = forks.start(
        pretrain_command([str(new / "config.yaml"), *longer], 1),
        stdout=end,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(TERM="xterm"),
    )
    os.close(end)
    shown = b""
    with contextlib.suppress(OSError):  # The end of a terminal.
        while chunk := os.read(terminal, 65536):
            shown += chunk
    assert process.wait() == 0, process.communicate()[1]
    os.close(terminal)
    assert not old.exists() and last_step(new) == 4 and (new / "checkpoints" / "step-00000004").is_dir()
    lines = re.split(r"\r\n|\r\x1b\[K", shown.decode())
    assert lines[-3].startswith("finished: 4 steps") and lines[-2].startswith("next: bigtx generate '"), lines[-5:]
    assert f"'{new}'" in lines[-2] and any("4/4" in line for line in lines[:-3])
