"""Faults of metrics and W&B: full disks, servers that are down, copied runs, torn lines."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

from doors import last_step
from track.program import fill_disk
from track.wandb_double import WandbDouble

from drill.catalogue import fault
from drill.processes import HIT_AT
from drill.scene import STEPS, Scene, Training, expect, said

KEY = "0123456789abcdefghijklmnopqrstuvwxyzKEY0"
ONLINE = "track.wandb=online"


def _on_small_disk(scene: Scene) -> Training:
    """Return a training whose folder is a small disk, and whose checkpoints are on another one."""
    run = scene.training("track.wandb=offline", "train.max_steps=60")
    scene.mount(run.run_dir, "size=1m")
    (scene.folder / "checkpoints").mkdir()
    (run.run_dir / "checkpoints").symlink_to(scene.folder / "checkpoints")
    return run


@fault(8, "disk-full-logs", "training continues; one warning; nothing is lost once there is space")
def disk_full_logs(scene: Scene) -> str:
    """The disk fills under the logs, the metrics and W&B's files, and has space again later."""
    run = _on_small_disk(scene)
    run.injected = {"sleep": 0.05}
    run.start().reach(HIT_AT).disturb(lambda: fill_disk(run.run_dir))
    newest = scene.folder / "checkpoints"
    run.wait_for(lambda: (newest / "step-00000025").exists())
    (run.run_dir / "filler").unlink()
    end = run.wait().succeeded()
    expect(end.text.count("warning: cannot write") == 1, f"not one warning; {end.tail()}")
    run.check_nothing_lost()
    return "one warning, all steps in metrics.jsonl, nothing lost"


@fault(
    41,
    "disk-stays-full",
    "metrics are in the next checkpoint, or the run says at its end what is missing, with a status that is not 0",
)
def disk_stays_full(scene: Scene) -> str:
    """A disk that stays full."""
    run = _on_small_disk(scene)
    run.injected = {"sleep": 0.05}
    run.start().reach(HIT_AT).disturb(lambda: fill_disk(run.run_dir))
    end = run.wait()
    if end.status == 0:
        (run.run_dir / "filler").unlink()
        end = run.resume()
        expect(last_step(run.run_dir) == 60, f"status 0, and metrics up to step {last_step(run.run_dir)}; {end.tail()}")
        return "the resume restores all metrics from the checkpoint"
    expect("metrics.jsonl" in end.err and "Traceback" not in end.err, end.tail())
    return f"status {end.status}, and the message says what is missing"


@fault(
    23,
    "wandb-down",
    "the time of a step grows by less than 1 %; metrics.jsonl is complete; nothing is doubled afterwards",
)
def wandb_down(scene: Scene) -> str:
    """W&B's server down, swallowing packets, or its process killed."""
    with WandbDouble() as server:
        for trouble in ("down", "silent", "killed"):
            server.silent = trouble == "silent"
            run = scene.training(ONLINE)
            url = "http://127.0.0.1:9" if trouble == "down" else server.url
            run.environment = {"WANDB_API_KEY": KEY, "WANDB_BASE_URL": url}
            run.injected = {"sleep": 0.1}
            run.start().reach(HIT_AT)
            if trouble == "killed":
                run.wait_for(lambda run=run: run.events("wandb"))  # type: ignore[misc]
                kill_core(run.run_dir)
            run.wait().succeeded()
            run.check_nothing_lost()
            run.settings |= {"train.max_steps": "32", "allow_changes": "[train.max_steps]"}
            server.silent = False
            run.environment["WANDB_BASE_URL"] = server.url
            run.resume()
            stored = server.runs[(run.run_dir / "wandb_run_id").read_text().strip()]
            steps = [row["_step"] for row in stored.history]
            expect(steps == list(range(1, 33)), f"{trouble}: W&B has the steps {steps}")
    return "metrics.jsonl is complete, W&B has every step once"


def kill_core(run_dir: Path) -> None:
    """End W&B's own process of a run, by kill -9."""
    from track import program

    program.kill_core(run_dir, signal.SIGKILL)


@fault(45, "copied-run", "the copy gets its own W&B id, linked to the original")
def copied_run(scene: Scene) -> str:
    """A copied run is continued, and so is the original."""
    original = scene.finished("track.wandb=offline")
    shutil.rmtree(original.checkpoints()[-1])
    original.resume()
    first = (original.run_dir / "wandb_run_id").read_text()
    copy = scene.training("track.wandb=offline")
    shutil.copytree(original.run_dir, copy.run_dir)
    for run in (copy, original):
        shutil.rmtree(run.checkpoints()[-1])
        run.resume()
    expect((original.run_dir / "wandb_run_id").read_text() == first, "the original has a new id")
    expect((copy.run_dir / "wandb_run_id").read_text() != first, "both have one id")
    links = copy.events("wandb_copy")
    expect(links and links[0]["original"] == first.strip(), f"the copy is not linked: {links}")
    return "two ids, the copy names the original"


@fault(46, "torn-metrics", "it is said at the resume, and recorded in an event")
def torn_metrics(scene: Scene) -> str:
    """Metric lines before the checkpoint are torn or missing."""
    for harm in ("torn", "missing"):
        run = scene.finished()
        path = run.run_dir / "metrics.jsonl"
        lines = path.read_bytes().splitlines(keepends=True)
        lines[10:12] = [] if harm == "missing" else [lines[10][:20]]
        path.write_bytes(b"".join(lines))
        shutil.rmtree(run.checkpoints()[-1])
        end = run.resume(reached=STEPS)
        expect(said(end.out, r"warning: \d+ of 25 lines of .*metrics\.jsonl"), f"{harm}: not said; {end.tail()}")
        (event,) = run.events("missing_lines")
        expect(event["missing"] >= 1 and event["of"] == 25, f"{harm}: the event is {event}")
    return "said once at the resume, and in an event"


SECRETS = {
    "AWS_SECRET_ACCESS_KEY": "the-aws-secret-of-the-drill",
    "HF_TOKEN": "hf_" + "d1R2" * 9,
    "WANDB_API_KEY": KEY,
}


@fault(35, "secrets", "in no file that the run writes")
def secrets(scene: Scene) -> str:
    """Secrets in the environment, in the arguments or in the config."""
    hidden = "hunter2-of-the-drill"
    with WandbDouble() as server:
        run = scene.training(ONLINE)
        run.environment = SECRETS | {"WANDB_BASE_URL": server.url, "DRILL_PASSWORD": hidden}
        run.run().succeeded()
    config = scene.folder / "mine.yaml"
    config.write_text(f"track:\n  project: {SECRETS['HF_TOKEN']}\n")
    refused = scene.training("track.project=" + SECRETS["HF_TOKEN"])
    refused.run().refused("secret")
    given = scene.training()
    text = scene.run("pretrain", str(config), *given.arguments).refused("secret").text
    everything = {path: path.read_bytes() for path in scene.folder.rglob("*") if path.is_file() and path != config}
    for secret in (*SECRETS.values(), hidden):
        places = [str(path) for path, content in everything.items() if secret.encode() in content]
        expect(not places, f"a secret is in {places}")
        expect(secret not in text, "a secret is on the terminal")
    return f"none of {len(SECRETS) + 1} secrets in any of {len(everything)} files; in argv and config refused"


@fault(51, "secret-in-argv", "in no file and no log; masked on the terminal where the text is bigtx's")
def secret_in_argv(scene: Scene) -> str:
    """A secret in the arguments of a run by `deepspeed`."""
    secret = SECRETS["HF_TOKEN"]
    run = scene.training(f"track.project={secret}", by_deepspeed=True)
    end = run.run()
    expect(end.status != 0, "the run was not refused")
    files = [str(path) for path in run.run_dir.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()]
    expect(not files, f"the secret is in {files}")
    own = [
        line for line in end.text.splitlines() if secret in line and "[launch.py" not in line and "[INFO]" not in line
    ]
    expect(not own, f"the secret is on the terminal: {own[:2]}")
    shown = sum(secret in line for line in end.text.splitlines())
    return f"refused, in no file; {shown} lines of DeepSpeed's launcher show it"
