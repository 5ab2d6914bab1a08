"""What the faults share: small trainings that are started, disturbed, resumed, and compared with an unbroken one."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import forks
from corpora import make_corpus
from doors import (
    BF16,
    ROOT,
    TINY,
    all_pids,
    bigtx,
    environment,
    has_saved,
    last_step,
    pretrain_command,
    rank_pids,
    read_lines,
    supervisor_pid,
    tmpfs,
    wait_for,
)

from drill.catalogue import NotPossible, Unexpected

STEPS, INTERVAL = 30, 5
"""Steps of a training, and between two of its checkpoints."""
SETTINGS = dict(argument.split("=", 1) for argument in [*TINY, *BF16]) | {
    "model.dropout": "0.1",
    "train.max_steps": str(STEPS),
    "train.checkpoint_every": f"{INTERVAL} steps",
}
INJECT = str(Path(__file__).with_name("inject.py"))
WITHOUT_EFFECT = ("engine.timeout", "track.wandb")
"""Settings that do not change what a run computes."""
GUARD_SECONDS = 300.0
"""A process that runs longer hangs."""


def expect(condition: object, otherwise: str) -> None:
    """Raise `Unexpected` with a text unless the condition holds."""
    if not condition:
        raise Unexpected(otherwise)


@dataclass(frozen=True)
class End:
    """How a command ended.

    Attributes:
        status: the exit status, or minus the signal that ended it.
        seconds: from the last signal or damage to the end of its last process.
    """

    status: int
    out: str
    err: str
    seconds: float

    @property
    def text(self) -> str:
        """Return what the command printed."""
        return self.out + self.err

    def tail(self) -> str:
        """Return the status and the last lines, for a report."""
        return f"status {self.status}: {' / '.join(self.text.strip().splitlines()[-6:])[-600:]}"

    def refused(self, *words: str) -> Self:
        """Check that the command refused something: status 2, one message with these words, no traceback."""
        expect(self.status == 2, f"not refused; {self.tail()}")
        expect("Traceback" not in self.text, f"a traceback; {self.tail()}")
        missing = [word for word in words if word not in self.err]
        expect(not missing, f"the message has no {missing}; {self.tail()}")
        return self

    def succeeded(self) -> Self:
        """Check that the command ended with status 0."""
        expect(self.status == 0, f"failed; {self.tail()}")
        return self


class Training:
    """A training in a run folder.

    Attributes:
        lost: for each resume, the steps that had been logged before and were done again.
    """

    def __init__(
        self, scene: Scene, run_dir: Path, settings: Mapping[str, str], *, ranks: int = 2, by_deepspeed: bool = False
    ) -> None:
        self.scene, self.run_dir, self.settings = scene, run_dir, dict(settings)
        self.ranks, self.by_deepspeed = ranks, by_deepspeed
        self.lost: list[int] = []
        self.injected: dict[str, Any] = {}
        self.environment: dict[str, str] = {}
        self.process: subprocess.Popen[str]
        self._disturbed = 0.0

    @property
    def arguments(self) -> list[str]:
        """Return the words of the command line."""
        return [f"{key}={value}" for key, value in self.settings.items()] + [f"run_dir={self.run_dir}"]

    @property
    def interval(self) -> int:
        """Return the number of steps between two checkpoints."""
        return int(self.settings["train.checkpoint_every"].split()[0])

    def command(self) -> list[str]:
        """Return the command, with the faults that are injected."""
        command = pretrain_command(self.arguments, self.ranks, launcher=self.by_deepspeed)
        if self.injected:
            script = command.index(str(ROOT / "bigtx" / "pretrain.py"))
            command[script : script + 1] = [INJECT, json.dumps(self.injected)]
        return command

    def start(self, *prefix: str, **options: Any) -> Self:
        """Start the command in a session of its own; `options` are those of `forks.start`."""
        self.process = forks.start(
            [*prefix, *self.command()],
            text=True,
            start_new_session=True,
            env=environment() | self.environment,
            **({"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options),
        )
        self._disturbed = time.monotonic()
        return self

    def reach(self, step: int) -> Self:
        """Wait until a step is logged and, if one is due by then, a checkpoint is durable."""
        if step < self.interval:
            return self.wait_for(lambda: last_step(self.run_dir) >= step)
        return self.wait_for(lambda: has_saved(self.run_dir, step))

    def wait_for(self, condition: Callable[[], object]) -> Self:
        """Wait until a condition holds while the command runs."""
        wait_for(condition, self.process, GUARD_SECONDS)
        return self

    def wait_for_log(self, text: str) -> Self:
        """Wait until rank 0 has logged a text."""
        log = self.run_dir / "logs" / "rank-00000.log"
        return self.wait_for(lambda: log.exists() and text in log.read_text(encoding="utf-8"))

    def pid(self, who: str) -> int:
        """Return the id of a process: "command", "supervisor" (the parent of the ranks), "rank 0", ..."""
        if who == "command":
            return self.process.pid
        if who == "supervisor":
            return supervisor_pid(self.run_dir)
        return rank_pids(self.run_dir)[int(who.removeprefix("rank "))]

    def send(self, who: str, number: int) -> Self:
        """Send a signal to a process; the time to detect starts now."""
        pid = self.pid(who)
        self._disturbed = time.monotonic()
        os.kill(pid, number)
        return self

    def disturb(self, act: Callable[[], object]) -> Self:
        """Do something to the run; the time to detect starts now."""
        self._disturbed = time.monotonic()
        act()
        return self

    def wait(self) -> End:
        """Wait until no process of the run is left.

        Raises:
            Unexpected: the command or a rank runs on.
        """
        try:
            out, err = self.process.communicate(timeout=GUARD_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()
            raise Unexpected(f"the command has not ended after {GUARD_SECONDS:.0f} s") from None
        deadline = time.monotonic() + 60
        while (left := all_pids(self.run_dir)) and time.monotonic() < deadline:
            time.sleep(0.02)
        seconds = time.monotonic() - self._disturbed
        expect(not left, f"{len(left)} processes run on 60 s after the command has ended")
        return End(self.process.returncode, out or "", err or "", seconds)

    def stopped(self) -> End:
        """Wait until no process of the run is left, and record the time to detect."""
        end = self.wait()
        self.scene.detected = max(self.scene.detected or 0.0, round(end.seconds, 1))
        expect("Traceback" not in end.text, f"a traceback; {end.tail()}")
        return end

    def run(self) -> End:
        """Run the command to its end; it may fail."""
        return self.start().wait()

    def resume(self, reached: int | None = None) -> End:
        """Run the same command without the fault to the end of the run, and count the steps that are repeated.

        Args:
            reached: the last step before; by default that of the metrics.
        """
        self.injected, reached = {}, last_step(self.run_dir) if reached is None else reached
        end = self.run().succeeded()
        expect("resumed from" in end.out, f"the run was not resumed; {end.tail()}")
        self.count_lost(reached)
        return end

    def count_lost(self, reached: int) -> None:
        """Record how many steps the latest start repeated, of those up to `reached`."""
        self.lost.append(reached - int(self.events("start")[-1]["step"]))
        self.scene.lost = max(self.scene.lost or 0, self.lost[-1])

    def kill(self) -> None:
        """End all processes of the run at once."""
        with suppress(AttributeError, ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        for pid in all_pids(self.run_dir):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with suppress(AttributeError, subprocess.TimeoutExpired):
            self.process.communicate(timeout=30)

    def events(self, kind: str) -> list[dict[str, Any]]:
        """Return the run's events of a kind."""
        return [event for event in read_lines(self.run_dir / "events.jsonl") if event["kind"] == kind]

    def checkpoints(self) -> list[Path]:
        """Return the checkpoint folders, oldest first."""
        return sorted(path for path in (self.run_dir / "checkpoints").glob("step-*") if path.name[5:].isdigit())

    def check_whole(self) -> None:
        """Check that every checkpoint is whole and that no half-written one is left."""
        from bigtx.engine.checkpoint import Checkpoint

        problems = [problem for path in self.checkpoints() for problem in Checkpoint(path).verify()]
        problems += [f"{path.name} is left" for path in (self.run_dir / "checkpoints").glob("*.partial")]
        expect(not problems, "; ".join(problems))

    def check_nothing_lost(self, most: int | None = None, *, tolerance: float | None = None) -> None:
        """Compare the finished run with an unbroken one of the same config.

        Args:
            most: the most steps that a resume may repeat; by default those of two intervals between checkpoints, as a
                run may end while one is written.
            tolerance: the largest difference of a loss, where the weights need not be equal; see `differences`.
        """
        found = differences(self.run_dir, self.scene.reference(self), tolerance=tolerance)
        expect(not found, "; ".join(found))
        allowed = 2 * self.interval if most is None else most
        expect(all(steps <= allowed for steps in self.lost), f"steps repeated: {self.lost}, allowed: {allowed}")


def differences(run_dir: Path, reference: Path, *, tolerance: float | None = None) -> list[str]:
    """Return how a finished run differs from an unbroken one; an empty list means that nothing was lost.

    The loss of each step must be equal to the last bit; the position in the data, from which the order of the sequences
    follows, must be equal; and the files of the last checkpoint, which hold the parameters and the states of the
    optimizer, must have equal hashes.

    Args:
        run_dir, reference: the run folders.
        tolerance: the largest difference of a loss in nats. If it is given, weights are not compared: with another
            number of ranks or ZeRO stage, sums are rounded in another order.
    """
    found = []
    own, expected = (read_lines(folder / "metrics.jsonl") for folder in (run_dir, reference))
    places = [[(line["step"], line["tokens"]) for line in lines] for lines in (own, expected)]
    if places[0] != places[1]:
        found.append(f"other steps or tokens: {len(own)} lines up to {places[0][-1:]}, not {len(expected)}")
    else:
        away = {
            a["step"]: abs(float(a["train/loss"]) - float(b["train/loss"])) for a, b in zip(own, expected, strict=True)
        }
        if wrong := [step for step, distance in away.items() if not distance <= (tolerance or 0.0)]:
            largest = max(away.values())
            found.append(f"other losses in {len(wrong)} steps, first in {wrong[0]}; largest difference {largest:.2g}")
    first, second = (_last_manifest(folder) for folder in (run_dir, reference))
    for key in ("step", "seed", "data", "tokenizer", *(() if tolerance else ("state", "num_updates"))):
        if first[key] != second[key]:
            found.append(f"other {key} in the last manifest: {first[key]}, not {second[key]}")
    for key in ("sequences", "tokens", "skipped_sequences", "skipped_steps"):
        if first["state"][key] != second["state"][key]:
            found.append(f"other {key}: {first['state'][key]}, not {second['state'][key]}")
    if tolerance is None and _hashes(first) != _hashes(second):
        found.append("other parameters or optimizer states at the end")
    return found


def _last_manifest(run_dir: Path) -> dict[str, Any]:
    folders = [path for path in (run_dir / "checkpoints").glob("step-*") if path.name[5:].isdigit()]
    manifest: dict[str, Any] = json.loads((max(folders) / "manifest.json").read_text(encoding="utf-8"))
    return manifest


def _hashes(manifest: Mapping[str, Any]) -> dict[str, str]:
    return {name: entry["sha256"] for name, entry in manifest["files"].items()}


class Stage:
    """What all faults of a drill share: a corpus and the unbroken runs.

    Attributes:
        folder: a new folder for all files of the drill.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.references: dict[str, Path] = {}
        self._lock = threading.Lock()
        self._locks: dict[str, threading.Lock] = {}
        texts = folder / "texts"
        texts.mkdir()
        # Several shards, so that one of them can be damaged.
        self.corpus = make_corpus(texts, "shard_size=64KiB")

    def reference(self, training: Training) -> Path:
        """Return the folder of an unbroken run with the settings of a training."""
        settings = {key: SETTINGS[key] if key in WITHOUT_EFFECT else value for key, value in training.settings.items()}
        key = json.dumps([settings, training.ranks], sort_keys=True)
        with self._lock:
            lock = self._locks.setdefault(key, threading.Lock())
        with lock:
            if key not in self.references:
                folder = self.folder / f"unbroken-{len(self._locks)}"
                scene = Scene(self, folder)
                with scene:
                    Training(scene, folder / "run", settings, ranks=training.ranks).run().succeeded()
                    self.references[key] = Path(shutil.copytree(folder / "run", f"{folder}-run"))
            return self.references[key]


class Scene:
    """The place where one fault is tried. When it closes, all of its processes end and its files are deleted.

    Attributes:
        folder: a new folder.
        variant: the ZeRO stage and the precision, if they were chosen.
        is_fast: whether CI waits for the result.
        detected, lost: see `Result`.
    """

    def __init__(
        self, stage: Stage, folder: Path | None = None, *, changes: Sequence[str] = (), is_fast: bool = False
    ) -> None:
        """Args: changes: settings of all trainings of this scene."""
        self.stage = stage
        self.corpus = stage.corpus
        self.folder = folder or Path(tempfile.mkdtemp(prefix="fault-", dir=stage.folder))
        self.variant = " ".join(changes)
        self.is_fast = is_fast
        self.detected: float | None = None
        self.lost: int | None = None
        self._changes = changes
        self._trainings: list[Training] = []
        self._resources = ExitStack()

    def __enter__(self) -> Self:
        self.folder.mkdir(exist_ok=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for training in self._trainings:
            if all_pids(training.run_dir):
                training.kill()
        self._resources.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def is_matrix(self) -> bool:
        """Return whether the fault is tried for one of several stages and precisions."""
        return bool(self._changes)

    def settings(self, *changes: str) -> dict[str, str]:
        """Return the settings of a training in this scene."""
        own = {"data.sources.a.path": str(self.corpus)}
        return SETTINGS | own | dict(change.split("=", 1) for change in (*self._changes, *changes))

    def training(self, *changes: str, name: str = "", ranks: int = 2, by_deepspeed: bool = False) -> Training:
        """Return a new training with changed settings.

        Args:
            name: the name of the run folder.
            by_deepspeed: whether `deepspeed bigtx/pretrain.py` starts the ranks instead of `bigtx pretrain`.
        """
        run_dir = self.folder / (name or f"run-{len(self._trainings)}")
        training = Training(self, run_dir, self.settings(*changes), ranks=ranks, by_deepspeed=by_deepspeed)
        self._trainings.append(training)
        return training

    def finished(self, *changes: str, name: str = "", ranks: int = 2) -> Training:
        """Return a finished training, whose files may be damaged."""
        training = self.training(*changes, name=name, ranks=ranks)
        shutil.copytree(self.reference(training), training.run_dir, symlinks=True)
        return training

    def reference(self, training: Training) -> Path:
        """Return the folder of the unbroken run with the same settings."""
        return self.stage.reference(training)

    def start(self, command: Sequence[str]) -> subprocess.Popen[str]:
        """Start a command in a session of its own, with pipes for its output."""
        return forks.start(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env=environment(),
        )

    def run(self, *words: str) -> End:
        """Run `bigtx WORDS` to its end."""
        started = time.monotonic()
        done = bigtx(*words, cwd=self.folder)
        return End(done.returncode, done.stdout, done.stderr, time.monotonic() - started)

    def mount(self, folder: Path, options: str) -> None:
        """Mount a tmpfs on a folder until the scene closes.

        Raises:
            NotPossible: this user may not mount file systems.
        """
        if not self.can_mount(folder, options):
            raise NotPossible("this user may not mount file systems")

    def can_mount(self, folder: Path, options: str) -> bool:
        """Mount a tmpfs as `mount` does; returns False where this user may not."""
        return tmpfs(folder, options, self._resources)

    def remount(self, folder: Path, options: str) -> None:
        """Change the options of a mounted tmpfs."""
        subprocess.run(["mount", "-o", f"remount,{options}", folder], check=True)

    def keep(self, resource: Any) -> Any:
        """Enter a context until the scene closes."""
        return self._resources.enter_context(resource)


def contents(folder: Path) -> dict[str, bytes]:
    """Return the files below a folder and their bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def said(text: str, pattern: str) -> bool:
    """Return whether a text has a match of a regular expression."""
    return re.search(pattern, text) is not None
