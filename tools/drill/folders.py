"""Faults of the run folder: read-only, in use, damaged, moved, deleted, copied."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess

from doors import CONTAINER, last_step, losses

from drill.catalogue import NotPossible, fault
from drill.processes import HIT_AT
from drill.scene import Scene, contents, expect


@fault(31, "read-only", "fails before step 0, one message, nothing is written")
def read_only(scene: Scene) -> str:
    """The output folder is read-only, a file, or below a file."""
    run = scene.training()
    run.run_dir.write_text("not a folder")
    run.run().refused(str(run.run_dir))
    below = scene.training(name="run-0/below")
    below.run().refused("run-0")
    disk = scene.training()
    scene.mount(disk.run_dir, "ro")
    disk.run().refused(str(disk.run_dir), "read-only")
    expect(not any(disk.run_dir.iterdir()), "something was written")
    return "3 of 3 refused before the first step"


@fault(33, "two-runs", "the second refuses at once; a stale lock is recovered")
def two_runs(scene: Scene) -> str:
    """Two runs for one folder; a lock that a killed run left."""
    run = scene.training().start().reach(HIT_AT)
    second = scene.start(run.command())
    out, err = second.communicate(timeout=120)
    expect(second.returncode == 2 and "is in use by process" in err, f"status {second.returncode}: {err[-300:]}")
    expect(out == "" and run.process.poll() is None, "the second disturbed the first")
    run.kill()
    expect((run.run_dir / "run.lock").exists(), "there is no stale lock")
    run.resume()
    run.check_nothing_lost()
    return "the second is refused and names the process; the stale lock is recovered; nothing lost"


@fault(34, "extension-lock", "the run does not wait for it, or fails within 60 s and names the file")
def extension_lock(scene: Scene) -> str:
    """A stale lock of an extension that is compiled at its first use."""
    run = scene.training("engine.offload_optimizer=cpu", "train.max_steps=2")
    extensions = scene.folder / "extensions"
    run.environment = {"TORCH_EXTENSIONS_DIR": str(extensions), "DS_PIN_MEMORY_BACKEND": "native"}
    lock = extensions / "pin_memory" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    run.run().succeeded()
    expect(list(lock.parent.glob("*.so")) and not lock.exists(), "it is not the lock that torch uses")
    return "the lock has no effect: the run builds the extension and finishes"


@fault(36, "two-namespaces", "the second refuses; the first is not disturbed", fast=True)
def two_namespaces(scene: Scene) -> str:
    """The same run folder from another PID namespace with the same host name."""
    if not shutil.which("unshare") or subprocess.run([*CONTAINER, "true"], capture_output=True).returncode:
        raise NotPossible("this user may not make a namespace of process ids")
    run = scene.training("train.max_steps=100000").start().reach(HIT_AT)
    second = scene.start([*CONTAINER, *run.command()])
    _, err = second.communicate(timeout=120)
    expect(second.returncode == 2 and "is in use by process" in err, f"status {second.returncode}: {err[-300:]}")
    reached = last_step(run.run_dir)
    run.reach(reached + 1).send("command", signal.SIGTERM)
    expect(run.stopped().status == 75, "the first was disturbed")
    run.check_whole()
    expect(sorted(losses(run.run_dir)) == list(range(1, last_step(run.run_dir) + 1)), "the metrics are mixed")
    return "the second is refused with status 2; the first trains on"


@fault(43, "damaged-files", "one paragraph for each, which names the file; or it has no effect")
def damaged_files(scene: Scene) -> str:
    """A config.yaml of zeros, a list or a python tag; a text as `step`; a W&B id of other bytes; a lock without pid."""
    for content in ("\0" * 100, "[1]", "a: !!python/name:os.system ''", "", "a: ["):
        run = scene.finished()
        (run.run_dir / "config.yaml").write_text(content)
        run.run().refused("config.yaml")
        scene.run("generate", str(run.run_dir), "prompt=ba").refused("config.yaml")
    harmless = {
        "metrics.jsonl": [b'{"step": "many", "tokens": 1, "time": 1}\n', b"\xff\xfe\n", b"[1]\n"],
        "wandb_run_id": [b"\xff\xfe\0", b"a b", b""],
        "run.lock": [b'{"pid": null}', b"", b"\0" * 9],
    }
    for name, damages in harmless.items():
        for damage in damages:
            run = scene.finished()
            path = run.run_dir / name
            before = path.read_bytes() if name == "metrics.jsonl" else b""
            path.write_bytes(before + damage)
            shutil.rmtree(run.checkpoints()[-1])
            end = run.run().succeeded()
            expect("resumed from" in end.out and "Traceback" not in end.text, f"{name}: {end.tail()}")
            run.check_nothing_lost()
    return "5 of 5 damaged configs are one paragraph; 9 of 9 other damages have no effect"


@fault(44, "folder-moved", "noticed at the next write; all files are in one place; a status that says so")
def folder_moved(scene: Scene) -> str:
    """The run folder is renamed or deleted while the run trains."""
    for harm in ("renamed", "deleted"):
        run = scene.training("train.max_steps=400").start().reach(HIT_AT)
        elsewhere = run.run_dir.with_name(f"moved-{harm}")
        run.disturb(lambda run=run, to=elsewhere: run.run_dir.rename(to))  # type: ignore[misc]
        if harm == "deleted":
            shutil.rmtree(elsewhere)
        end = run.stopped()
        expect(end.status not in (0, 75), f"{harm}: {end.tail()}")
        expect(str(run.run_dir) in end.err, f"{harm}: the folder is not named; {end.tail()}")
        left = contents(run.run_dir) if run.run_dir.exists() else {}
        expect(not left, f"{harm}: files at the old place: {sorted(left)[:5]}")
    return "2 of 2 noticed and named; no file at the old place"


@fault(47, "stale-lock", "recovered where the lock of the operating system is free")
def stale_lock(scene: Scene) -> str:
    """A run.lock that is empty, garbage, or of a container that was killed and started under another host name."""
    elsewhere = {"host": "elsewhere", "process_start": "another-boot/1", "pid_namespace": "pid:[1]", "pid": 1}
    contents_of_lock = ["", "{", "[]", "\0" * 40, json.dumps(elsewhere)]
    for content in contents_of_lock:
        run = scene.finished()
        (run.run_dir / "run.lock").write_text(content)
        shutil.rmtree(run.checkpoints()[-1])
        run.resume()
    run.check_nothing_lost()
    return f"{len(contents_of_lock)} of {len(contents_of_lock)} recovered"
