"""The other jobs under SLURM: preparations in parts, sweeps, chains with a fine-tuning; and mistakes of a cluster."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from clusters import Cluster
from doors import ROOT, TINY, all_pids, bigtx, last_step, read_lines
from finetunes import RHYTHM, labelled, write_jsonl

pytestmark = [pytest.mark.slurm, pytest.mark.slow]
SCRIPTS = ROOT / "slurm"


@pytest.fixture
def pretraining(corpus: Path) -> list[str]:
    return [*TINY, f"data.sources.a.path={corpus}", "track.wandb=off", "train.checkpoint_every=5 steps"]


@pytest.fixture
def recipe(corpus: Path) -> list[str]:
    """Of the corpus that the other tests use."""
    texts = corpus.parent
    settings = [f"input.paths=[{texts}]", f"tokenizer={texts / 'tokenizer'}", "validation_fraction=0.05"]
    return [*settings, "block_tokens=4096", "num_processes=1"]


def test_a_node_that_crashes_and_returns(cluster: Cluster, pretraining: list[str], tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    arguments = [*pretraining, "train.max_steps=30", f"run_dir={run_dir}", "--ranks=2"]
    job = cluster.submit("--nodes=2", str(SCRIPTS / "pretrain.sbatch"), *arguments)
    cluster.wait_for(lambda: last_step(run_dir) >= 7, number=job)
    cluster.crash(2)
    cluster.wait_for(lambda: all_pids(run_dir) == [], timeout=60)
    cluster.start(2)
    assert cluster.wait_for_end(job)["JobState"] == "COMPLETED", cluster.logs()
    assert last_step(run_dir) == 30 and "resumed from" in cluster.logs()


def test_a_mistake_is_not_started_again(cluster: Cluster, pretraining: list[str], tmp_path: Path) -> None:
    arguments = [*pretraining, "train.max_stps=30", f"run_dir={tmp_path / 'run'}"]
    end = cluster.wait_for_end(cluster.submit(str(SCRIPTS / "pretrain.sbatch"), *arguments))
    assert (end["JobState"], end["ExitCode"], end["Restarts"]) == ("FAILED", "2:0", "0")
    assert "did you mean train.max_steps" in cluster.logs() and "not started again" in cluster.logs()


def test_a_job_of_two_nodes_without_srun_is_refused(cluster: Cluster, pretraining: list[str], tmp_path: Path) -> None:
    script = tmp_path / "own.sbatch"
    script.write_text('#!/bin/bash\nbigtx pretrain "$@"\n')
    arguments = [*pretraining, "train.max_steps=3", f"run_dir={tmp_path / 'run'}"]
    end = cluster.wait_for_end(cluster.submit("--nodes=2", "--output=slurm-own.log", str(script), *arguments))
    assert end["ExitCode"] == "2:0" and "this SLURM job has 2 nodes" in cluster.logs()


def test_srun_with_a_task_for_each_rank(cluster: Cluster, pretraining: list[str], tmp_path: Path) -> None:
    arguments = [*pretraining, "train.max_steps=3", f"run_dir={tmp_path / 'run'}"]
    said = cluster.run("srun", "--nodes=2", "--ntasks-per-node=2", "bigtx", "pretrain", *arguments)
    assert "4 ranks on 2 machines, started by srun" in said and last_step(tmp_path / "run") == 3


LAUNCHERS = {
    "torchrun": "torchrun --nnodes 2 --nproc_per_node 2 {place} -m bigtx.pretrain",
    "deepspeed": "deepspeed --hostfile hosts --no_ssh {place} --module bigtx.pretrain",
}
PLACE = "--node_rank $SLURM_NODEID --master_addr n1 --master_port 23456"


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_other_launchers_on_two_nodes(cluster: Cluster, pretraining: list[str], tmp_path: Path, launcher: str) -> None:
    (tmp_path / "hosts").write_text("n1 slots=2\nn2 slots=2\n")
    arguments = [*pretraining, "train.max_steps=3", f"run_dir={tmp_path / 'run'}"]
    line = f'exec {LAUNCHERS[launcher].format(place=PLACE)} "$@"'
    said = cluster.run("srun", "--nodes=2", "--ntasks-per-node=1", "bash", "-c", line, "bash", *arguments)
    assert f"4 ranks on 2 machines, started by {launcher}" in said and last_step(tmp_path / "run") == 3


def test_a_wrong_address_is_named_within_a_minute(cluster: Cluster, pretraining: list[str], tmp_path: Path) -> None:
    arguments = [*pretraining, "train.max_steps=3", f"run_dir={tmp_path / 'run'}", "--ranks=1"]
    where = {"MASTER_ADDR": "10.213.77.77", "MASTER_PORT": "23456"}
    said = cluster.run("srun", "--nodes=2", "--ntasks-per-node=1", "bigtx", "pretrain", *arguments, status=2, **where)
    assert "n2 (node 1) does not reach the first machine at 10.213.77.77:23457: " in said
    assert "only 1 of 2 machines came to 10.213.77.77:23457" in said and "Traceback" not in said


def test_a_cancelled_job_saves_and_is_not_requeued(cluster: Cluster, pretraining: list[str], tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    arguments = [*pretraining, "train.max_steps=3000", f"run_dir={run_dir}", "--ranks=2"]
    job = cluster.submit("--nodes=2", str(SCRIPTS / "pretrain.sbatch"), *arguments)
    cluster.wait_for(lambda: last_step(run_dir) >= 7, number=job)
    cluster.run("scancel", str(job))
    end = cluster.wait_for_end(job)
    assert (end["JobState"], end["Restarts"]) == ("CANCELLED", "0"), cluster.logs()
    ended = [event["status"] for event in read_lines(run_dir / "events.jsonl") if event["kind"] == "end"]
    assert ended == ["stopped"] and all_pids(run_dir) == [], cluster.logs()


def test_a_stop_file_asks_for_a_requeue(cluster: Cluster, pretraining: list[str], tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    arguments = [*pretraining, "train.max_steps=30", f"run_dir={run_dir}", "--ranks=2"]
    said = cluster.run("bigtx", "slurm", "submit", "pretrain", *arguments)
    job = int(said.split("job ")[1].split()[0])
    assert f"job {job}: " in cluster.run("bigtx", "slurm", "status", str(run_dir), status=None)
    cluster.wait_for(lambda: last_step(run_dir) >= 5, number=job)
    (run_dir / "STOP").touch()
    assert cluster.wait_for_end(job)["Restarts"] == "1" and not (run_dir / "STOP").exists()
    said = cluster.run("bigtx", "slurm", "status", str(run_dir))
    assert f"job {job} (restart 0)" in said and "stopped at step" in said
    assert f"job {job} (restart 1)" in said and "finished at step 30" in said


def test_a_preparation_in_parts_gives_the_bytes_of_one_machine(
    cluster: Cluster, recipe: list[str], corpus: Path, tmp_path: Path
) -> None:
    said = cluster.run("bigtx", "slurm", "submit", "prepare", *recipe, f"output={tmp_path / 'data'}", "parts=3")
    parts, merge = (int(line.split("job ")[1].split(",")[0]) for line in said.splitlines() if ": job " in line)
    victims = cluster.wait_for(lambda: [pid for pid in all_pids_of("part=2/3") if name_of(pid) == "bigtx"])
    os.kill(victims[0], signal.SIGKILL)
    assert cluster.wait_for_end(merge)["JobState"] == "COMPLETED", cluster.logs()
    files = [path.relative_to(corpus) for path in sorted(corpus.rglob("*.tar"))]
    assert files and all((tmp_path / "data" / file).read_bytes() == (corpus / file).read_bytes() for file in files)
    assert "crashed with status 137" in cluster.logs() and parts != merge


def all_pids_of(word: str) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if word.encode() in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def name_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def test_a_sweep(cluster: Cluster, pretraining: list[str], tmp_path: Path) -> None:
    (tmp_path / "sweep.txt").write_text(
        "optimizer.learning_rate=1e-3\n'model.dropout=0.1' optimizer.learning_rate=2e-3\n"
    )
    words = ["sweep", "sweep.txt", "runs", "pretrain", *pretraining, "train.max_steps=3", "--ranks=1"]
    job = cluster.run("bigtx", "slurm", "submit", *words).split("job ")[1].split()[0]
    cluster.wait_for(lambda: not cluster.run("squeue", "-h", "-j", job, status=None).strip())
    config = (tmp_path / "runs" / "2" / "config.yaml").read_text()
    assert "dropout: 0.1" in config and "learning_rate: 0.002" in config
    assert [last_step(tmp_path / "runs" / str(number)) for number in (1, 2)] == [3, 3]


def test_a_chain(cluster: Cluster, pretraining: list[str], recipe: list[str], tmp_path: Path) -> None:
    records = write_jsonl(tmp_path / "records.jsonl", labelled(64))
    data, base, tuned = tmp_path / "data", tmp_path / "base", tmp_path / "tuned"
    train = [*pretraining, f"data.sources.a.path={data}", "train.max_steps=5", f"run_dir={base}", "--ranks=2"]
    tune = [*RHYTHM, f"base={base}", f"data.train=[{records}]", "data.test=[]", "train.max_steps=3", f"run_dir={tuned}"]
    words = [*recipe, f"output={data}", "--", *train, "--", *tune, "--ranks=1"]
    said = cluster.run(str(SCRIPTS / "chain.sh"), *words, PARTS="2", NODES="2")
    last = said.split()[-1]
    assert cluster.wait_for_end(last)["JobState"] == "COMPLETED", cluster.logs()
    assert last_step(tuned) == 3
    ended = [event["status"] for event in read_lines(tuned / "events.jsonl") if event["kind"] == "end"]
    assert ended == ["finished"] and bigtx("data", "verify", str(data)).returncode == 0
