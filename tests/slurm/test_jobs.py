"""The other jobs under SLURM: preparations in parts, sweeps, chains with a fine-tuning; and mistakes of a cluster."""

from __future__ import annotations

import os
import random
import re
import shlex
import signal
from pathlib import Path

import pytest
from clusters import Cluster
from doors import ROOT, TINY, all_pids, bigtx, has_saved, last_step, read_lines
from finetunes import RHYTHM, WORDS, finetuned, labelled, results, write_jsonl
from slurm_runs import SCRIPTS, check_finished, environment_of, events, name_of, pids_with, submit_started

pytestmark = [pytest.mark.slurm, pytest.mark.slow]


@pytest.fixture
def pretraining(corpus: Path) -> list[str]:
    return [*TINY, f"data.sources.a.path={corpus}", "track.wandb=off", "train.checkpoint_every=5 steps"]


@pytest.fixture
def recipe(corpus: Path) -> list[str]:
    """Of the corpus that the other tests use."""
    texts = corpus.parent
    settings = [f"input.paths=[{texts}]", f"tokenizer={texts / 'tokenizer'}", "validation_fraction=0.05"]
    return [*settings, "block_tokens=4096", "num_processes=1"]


LOST = "no end is recorded: it was killed, or its machine failed"
NO_JOB = "no job of this run is queued or running"


def status_of(cluster: Cluster, run_dir: Path) -> list[str]:
    """What `bigtx slurm status` says, on the login host."""
    return cluster.run("bigtx", "slurm", "status", str(run_dir)).splitlines()


def test_a_node_that_crashes_and_returns(cluster: Cluster, pretraining: list[str], tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    arguments = [*pretraining, "train.max_steps=30", f"run_dir={run_dir}", "--ranks=2"]
    job = cluster.submit("--nodes=2", str(SCRIPTS / "pretrain.sbatch"), *arguments)
    cluster.wait_for(lambda: has_saved(run_dir, 7), number=job)
    cluster.crash(2)
    cluster.wait_for(lambda: all_pids(run_dir) == [], timeout=60)
    cluster.start(2)
    assert cluster.wait_for_end(job)["JobState"] == "COMPLETED", cluster.logs()
    assert last_step(run_dir) == 30 and "resumed from" in cluster.logs()
    first, second, *rest = status_of(cluster, run_dir)
    assert f"job {job} (restart 0) on n1, 4 ranks, from step 0: " in first
    assert first.endswith(LOST) or "failed at step" in first  # Rank 0 had the time to say so.
    assert f"job {job} (restart 1)" in second and second.endswith("finished at step 30")
    assert rest == [f"job {job}: completed", NO_JOB]


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


WRONG = {
    "torchrun alone": (
        "torchrun --nproc_per_node 2 -m bigtx.pretrain",
        "srun has started 2 copies of a run of one machine",
    ),
    "deepspeed alone": (
        "deepspeed --num_accelerators 2 --master_port $((23500 + SLURM_NODEID)) --module bigtx.pretrain",
        "srun has started 2 copies of a run of one machine",
    ),
    "other numbers of ranks": (
        "bigtx pretrain --ranks=$((1 + SLURM_NODEID))",
        "the machines of this run start different ranks: n1 (node 0) 1 on each of 2 machines, n2 (node 1) 2 on each",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_world_of_the_wrong_size_is_refused(
    cluster: Cluster, pretraining: list[str], tmp_path: Path, case: str
) -> None:
    command, message = WRONG[case]
    arguments = [*pretraining, "train.max_steps=3", f"run_dir={tmp_path / 'run'}"]
    line = f'exec {command} "$@"'
    srun = ["srun", "--nodes=2", "--ntasks-per-node=1", "--kill-on-bad-exit=0", "bash", "-c", line, "bash"]
    said = cluster.run(*srun, *arguments, status=None)
    assert message in said
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_plain_python_on_a_node(cluster: Cluster, pretraining: list[str], tmp_path: Path) -> None:
    for name, program in {"module": ["-m", "bigtx.pretrain"], "script": [str(ROOT / "bigtx" / "pretrain.py")]}.items():
        arguments = [*pretraining, "train.max_steps=3", f"run_dir={tmp_path / name}", "--ranks=2"]
        cluster.run("srun", "--nodes=1", "python", *program, *arguments)
        assert last_step(tmp_path / name) == 3 and events(tmp_path / name, "start", "world_size") == [2]


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
    assert "only 1 of 2 machines connected to 10.213.77.77:23457" in said and "Traceback" not in said


def test_a_cancelled_job_saves_and_is_not_requeued(cluster: Cluster, pretraining: list[str], tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    arguments = [*pretraining, "train.max_steps=3000", f"run_dir={run_dir}", "--ranks=2"]
    job = cluster.submit("--nodes=2", str(SCRIPTS / "pretrain.sbatch"), *arguments)
    cluster.wait_for(lambda: has_saved(run_dir, 7), number=job)
    cluster.run("scancel", str(job))
    end = cluster.wait_for_end(job)
    assert (end["JobState"], end["Restarts"]) == ("CANCELLED", "0"), cluster.logs()
    ended = [event["status"] for event in read_lines(run_dir / "events.jsonl") if event["kind"] == "end"]
    assert ended == ["stopped"] and all_pids(run_dir) == [], cluster.logs()
    life, *rest = status_of(cluster, run_dir)
    assert "stopped at step" in life and rest == [f"job {job}: cancelled", NO_JOB]


def test_a_job_whose_time_is_over_saves_in_the_time_that_slurm_leaves(
    cluster: Cluster, pretraining: list[str], tmp_path: Path
) -> None:
    """Without a signal beforehand (SIGURG does nothing)."""
    run_dir = tmp_path / "run"
    words = ["--nodes=2", "--time=1", "--signal=B:URG@1", str(SCRIPTS / "pretrain.sbatch"), *pretraining]
    job = cluster.submit(*words, "train.max_steps=100000", f"run_dir={run_dir}", "--ranks=1")
    assert cluster.wait_for_end(job)["JobState"] == "TIMEOUT", cluster.logs()
    cluster.wait_for(lambda: all_pids(run_dir) == [])
    life, *rest = status_of(cluster, run_dir)
    assert "stopped at step" in life and rest == [f"job {job}: timeout (TimeLimit)", NO_JOB]


def test_a_cluster_whose_jobs_get_no_environment(cluster: Cluster, pretraining: list[str], tmp_path: Path) -> None:
    """The site's file makes it, for the tasks too."""
    path, run_dir = cluster.environment["PATH"], tmp_path / "run"
    lines = ["SBATCH_EXPORT=NONE", f"PATH={shlex.quote(path)}", "OMP_NUM_THREADS=1", "CUDA_VISIBLE_DEVICES="]
    (tmp_path / "site.sh").write_text("".join(f"export {line}\n" for line in lines) + "container=() srun_options=()\n")
    words = [
        "pretrain",
        *pretraining,
        "train.max_steps=3",
        f"run_dir={run_dir}",
        "site=site.sh",
        "nodes=2",
        "--ranks=1",
    ]
    said = cluster.run("bigtx", "slurm", "submit", *words)
    job = int(said.split("job ")[1].split()[0])
    assert cluster.wait_for_end(job)["JobState"] == "COMPLETED", cluster.logs()
    assert last_step(run_dir) == 3


def test_a_time_limit_that_is_too_short_ends_the_job(cluster: Cluster, pretraining: list[str], tmp_path: Path) -> None:
    """SLURM sends the signal of 300 s before the end at once."""
    words = ["--time=1", str(SCRIPTS / "pretrain.sbatch"), *pretraining, f"run_dir={tmp_path / 'run'}"]
    job = cluster.submit(*words, "train.max_steps=100000", "--ranks=1", BIGTX_MAX_CRASHES="1")
    end = cluster.wait_for_end(job)
    assert (end["JobState"], end["ExitCode"], end["Restarts"]) == ("FAILED", "75:0", "1"), cluster.logs()
    assert "not started again; the time limit must be longer than the seconds of --signal" in cluster.logs()


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


def test_a_preparation_that_loses_a_process_and_a_node_gives_the_bytes_of_one_machine(
    cluster_of_three: Cluster, corpus: Path, tmp_path: Path
) -> None:
    cluster, one, data = cluster_of_three, tmp_path / "one", tmp_path / "data"
    settings = [f"input.paths=[{write_units(tmp_path / 'texts', 16)}]", f"tokenizer={corpus.parent / 'tokenizer'}"]
    settings += ["validation_fraction=0.05", "block_tokens=4096", "shard_size=2MB", "num_processes=1"]
    assert bigtx("data", "prepare", *settings, f"output={one}").returncode == 0
    said = cluster.run("bigtx", "slurm", "submit", "prepare", *settings, f"output={data}", "parts=8")
    merge = next(int(line.split("job ")[1].split(",")[0]) for line in said.splitlines() if line.startswith("merge"))
    os.kill(preparing(cluster, "part=2/8"), signal.SIGKILL)
    node = environment_of(preparing(cluster, "part=7/8"))["SLURMD_NODENAME"]
    cluster.crash(int(node.removeprefix("n")))
    assert cluster.wait_for_end(merge)["JobState"] == "COMPLETED", cluster.logs()
    assert files_of(data) == files_of(one) and len(list(one.rglob("*.tar"))) > 2
    assert "crashed with status 137" in cluster.logs()
    assert len(set(re.findall(r"Part (\d) of 8: [1-9]", cluster.logs()))) == 8
    assert node not in cluster.nodes_of(merge)


def write_units(folder: Path, count: int) -> Path:
    """Files of the size that is given to one process at a time."""
    folder.mkdir()
    generator = random.Random(1)
    for number in range(count):
        texts = (" ".join(generator.choices(WORDS, k=250)) for _ in range(1200))
        write_jsonl(folder / f"{number:02d}.jsonl", [{"text": text} for text in texts])
    return folder


def preparing(cluster: Cluster, part: str) -> int:
    """The process that makes a part."""
    return int(cluster.wait_for(lambda: [pid for pid in pids_with(part) if name_of(pid) == "bigtx"])[0])


def files_of(corpus: Path) -> dict[str, bytes]:
    """All that a corpus holds."""
    return {str(path.relative_to(corpus)): path.read_bytes() for path in corpus.rglob("*") if path.is_file()}


def test_a_fine_tuning_on_two_nodes(cluster: Cluster, decoder_base: Path, tmp_path: Path) -> None:
    records = write_jsonl(tmp_path / "records.jsonl", labelled(400))
    data = [f"base={decoder_base}", f"data.train=[{records}]", "train.max_steps=40", "train.checkpoint_every=5 steps"]
    straight, run_dir = tmp_path / "straight", tmp_path / "run"
    arguments = [str(SCRIPTS / "finetune.sbatch"), *RHYTHM, *data, "train.micro_batch_size=2", f"run_dir={run_dir}"]
    job = submit_started(cluster, ["--nodes=2", *arguments, "--ranks=2"], run_dir)
    cluster.run("scancel", "--batch", "--signal=USR1", str(job))
    finetuned(*data, "train.micro_batch_size=2", f"run_dir={straight}", ranks=4)
    check_finished(cluster, job, run_dir, straight)
    assert events(run_dir, "end", "status") == ["stopped", "finished"]
    assert results(run_dir) == results(straight)


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
