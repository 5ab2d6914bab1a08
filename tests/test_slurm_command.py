"""`bigtx slurm render | submit | status` where there is no cluster, and the batch scripts as text."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from doors import ROOT, as_json

from bigtx.commands.slurm import JOBS, render_command, status_command, submit_command
from bigtx.utils.errors import BigtxError, CheckpointError, ConfigError, LaunchError

SCRIPTS = sorted((ROOT / "slurm").iterdir())


@pytest.fixture
def run_command(tmp_path: Path) -> list[str]:
    """A pretraining's settings."""
    (tmp_path / "corpus" / "train").mkdir(parents=True)
    (tmp_path / "corpus" / "train" / "manifest.json").write_text("{}")
    corpus = f"data.sources.a.path={tmp_path / 'corpus'}"
    return [corpus, f"run_dir={tmp_path / 'my run'}", "train.max_steps=10"]


def rendered(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    capsys.readouterr()
    render_command(words)
    return capsys.readouterr().out


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_bash_reads_every_script(script: Path) -> None:
    done = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_every_job_has_a_script() -> None:
    assert {path.stem for path in SCRIPTS if path.suffix == ".sbatch"} == {*JOBS, "merge"}


def test_the_site_and_the_command_are_in_the_script(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, run_command: list[str]
) -> None:
    site = tmp_path / "my site.sh"
    site.write_text('echo loaded\nexport SBATCH_PARTITION=gpu SBATCH_EXCLUSIVE="" SBATCH_SIGNAL=B:USR1@60\n')
    text = rendered(capsys, "pretrain", "model/decoder-125m.yaml", *run_command, "nodes=4", f"site={site}")
    options = [line for line in text.splitlines() if line.startswith("#SBATCH")]
    assert "#SBATCH --partition=gpu" in options and "#SBATCH --exclusive" in options
    assert "#SBATCH --signal=B:USR1@60" in options and "#SBATCH --signal=B:USR1@300" not in options
    assert [line for line in options if "--nodes" in line] == ["#SBATCH --nodes=4"]
    assert f"#SBATCH --comment='bigtx {tmp_path / 'my run'}'" in options
    # Run with another `source`, the script calls the command with the words that were given.
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm" / "common.sh").write_text('run() { printf "%s\\n" "$BIGTX_SITE" "$@"; }\n')
    text = text.replace(f"BIGTX_HOME={ROOT}", f"BIGTX_HOME={tmp_path}")
    said = subprocess.run(["bash"], input=text, capture_output=True, text=True, check=True).stdout.splitlines()
    assert said == [str(site), "bigtx", "pretrain", "model/decoder-125m.yaml", *run_command]


MISTAKES = [
    ([], "the job is missing; write bigtx slurm submit pretrain|finetune|prepare|evaluate|sweep"),
    (["train"], "'train' is not a job"),
    (["pretrain", "nodes=two"], "nodes=two: write a number of nodes, e.g. nodes=2"),
    (["evaluate", "RUN", "nodes=2"], "a job of evaluate takes no nodes; leave it out"),
    (["pretrain", "site=/no/such.sh"], "site=/no/such.sh: no such file; copy "),
    (["pretrain", "train.max_steps=x"], "train.max_steps"),
    (["sweep", "/no/such", "runs", "pretrain"], "write a sweep as FILE RUNS pretrain|finetune ..."),
]


@pytest.mark.parametrize(("words", "said"), MISTAKES)
def test_mistakes_are_found_before_anything_is_submitted(words: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as error:
        submit_command(words)
    assert said in str(error.value)


@pytest.mark.parametrize("kind", JOBS)
def test_a_batch_script_holds_no_secret(tmp_path: Path, kind: str) -> None:
    """Also in the words of jobs whose config is read only when they run."""
    (tmp_path / "sweep").write_text("train.seed=1\n")
    words = {"sweep": [str(tmp_path / "sweep"), str(tmp_path / "runs"), "pretrain"]}.get(kind, [])
    with pytest.raises(ConfigError, match="looks like a secret") as caught:
        render_command([kind, *words, "track.notes=hf_" + "a1B2" * 9])
    assert "a1B2" not in str(caught.value)


def test_a_site_file_that_fails_is_shown(tmp_path: Path, run_command: list[str]) -> None:
    (tmp_path / "site.sh").write_text("no-such-command-here\nfalse\n")
    with pytest.raises(ConfigError, match=r"ended with status 1: .*no-such-command-here: command not found"):
        render_command(["evaluate", "RUN", f"site={tmp_path / 'site.sh'}"])


def test_without_sbatch_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "bash").symlink_to("/bin/bash")
    (tmp_path / "env").symlink_to("/usr/bin/env")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LaunchError, match="there is no sbatch on this machine; submit from a login node"):
        submit_command(["evaluate", "RUN"])


def test_a_refusal_of_sbatch_is_shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "sbatch").write_text("#!/bin/bash\necho 'sbatch: error: invalid partition' >&2; exit 1\n")
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(
        LaunchError, match=r"sbatch refused the job: sbatch: error: invalid partition; .*default.sh has"
    ):
        submit_command(["evaluate", "RUN"])


def test_status_tells_each_life(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    start = {"kind": "start", "time": 1795987674.9, "host": "n1", "world_size": 4, "slurm_job": "7"}
    events = [
        start | {"step": 0, "slurm_restart": "0"},
        {"kind": "end", "step": 12, "status": "stopped"},
        start | {"step": 12, "slurm_restart": "1"},
    ]
    lines = [json.dumps(event) for event in events]
    (tmp_path / "events.jsonl").write_text("\n".join([*lines[:2], '{"kind": "sta', *lines[2:]]) + "\n")
    first, second = as_json(capsys, status_command, [str(tmp_path)])["starts"]
    assert (first["job"], first["restart"], first["end"], first["end_step"]) == ("7", 0, "stopped", 12)
    assert (second["restart"], second["step"], second["end"]) == (1, 12, None)
    status_command([str(tmp_path)])
    said = capsys.readouterr().out
    assert "job 7 (restart 0) on n1, 4 ranks, from step 0: stopped at step 12" in said
    assert "from step 12: no end is recorded" in said and "no job of this run is queued" in said


BUSY = """#!/bin/bash
echo "$*" >> calls
case $1-$(grep -c "^$1" calls) in
  show-1) echo "slurm_load_jobs error: Socket timed out on send/recv operation" >&2; exit 1 ;;
  requeue-1) echo "Unexpected message received for job 7" >&2; exit 1 ;;
  show-2) echo "JobId=7 JobState=RUNNING Reason=None" ;;
  show-*) echo "JobId=7 JobState=SIGNALING Reason=None" ;;
esac
"""


def test_a_job_is_requeued_though_the_controller_is_busy(tmp_path: Path) -> None:
    for name, text in {"scontrol": BUSY, "srun": "#!/bin/bash\nexit 75\n", "sleep": "#!/bin/bash\n"}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "pretrain", "SLURM_JOB_NODELIST": "n1", "BIGTX_HOME": str(ROOT)}
    done = subprocess.run(
        ["bash", "-c", 'source "$BIGTX_HOME/slurm/common.sh"; run bigtx pretrain'],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | job | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
    )
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls == ["show job -o 7", "show job -o 7", "requeue 7", "show job -o 7", "requeue 7"], done.stderr
    assert done.returncode == 75 and "could not be requeued" not in done.stdout


SQUEUE = """#!/bin/bash
echo "7|{state}|NodeFail|(null)"
echo "8|RUNNING|None|(null)"
"""


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ("RUNNING", ["it is running, or was killed", "job 7: running"]),
        ("PENDING", ["it was killed, or its machine failed", "job 7: pending (NodeFail)"]),
        ("NODE_FAIL", ["it was killed, or its machine failed", "job 7: node_fail", "no job of this run is queued"]),
        ("CANCELLED", ["it was killed, or its machine failed", "job 7: cancelled", "no job of this run is queued"]),
    ],
)
def test_status_of_a_life_without_an_end_asks_slurm(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, state: str, said: list[str]
) -> None:
    """The job was submitted by sbatch itself, without the comment that bigtx gives."""
    (tmp_path / "squeue").write_text(SQUEUE.format(state=state))
    (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    event = {"kind": "start", "time": 1795987674.9, "host": "n1", "world_size": 4, "slurm_job": "7", "step": 0}
    (tmp_path / "events.jsonl").write_text(json.dumps(event | {"slurm_restart": "0"}) + "\n")
    status_command([str(tmp_path)])
    shown = capsys.readouterr().out
    assert all(each in shown for each in said) and "job 8" not in shown


def test_status_of_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a run, and no job is queued for it"):
        status_command([str(tmp_path)])
    assert issubclass(CheckpointError, BigtxError)
