"""Faults of processes: killed, stopped, slow, asked to stop; and of the clock."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import socket
import subprocess
from pathlib import Path

from doors import last_step

from drill.catalogue import NotPossible, fault
from drill.scene import INTERVAL, Scene, Training, expect

HIT_AT = 8
"""The step after which a training is disturbed, between two checkpoints."""
DEAD_SECONDS = 5.0
"""How long the others may run after a rank was killed, or after the time-out has ended."""


@fault(
    1,
    "kill-rank",
    "every rank ends within 5 s, no process is left, the status is not 0, and the message names rank, host, step and "
    "cause; nothing is lost",
    fast=True,
    matrix=True,
)
def kill_rank(scene: Scene) -> str:
    """A rank is killed (SIGKILL) in the middle of a step."""
    for victim in ("rank 1", "rank 0"):
        run = scene.training().start().reach(HIT_AT).send(victim, signal.SIGKILL)
        end = run.stopped()
        expect(end.status == 128 + signal.SIGKILL, end.tail())
        expect(end.seconds <= DEAD_SECONDS, f"ended only after {end.seconds:.1f} s")
        words = (f"{victim} on {socket.gethostname()}", "after step", "by SIGKILL")
        expect(all(word in end.err for word in words), f"the message lacks one of {words}; {end.tail()}")
        run.resume()
        run.check_nothing_lost()
    return "status 137; rank, host, step and signal are named; nothing lost"


@fault(
    3,
    "kill-launcher",
    "the ranks end too, after a checkpoint; no process is left; no status 0, except from `deepspeed` when its own "
    "launch.py is killed; nothing is lost",
    matrix=True,
)
def kill_launcher(scene: Scene) -> str:
    """The launcher (`bigtx pretrain`, `deepspeed`, its `launch.py`) gets SIGKILL, SIGTERM, SIGUSR1 or SIGHUP."""
    numbers = (signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)[: 2 if scene.is_matrix else None]
    cases = [(False, "command", number) for number in numbers]
    cases += [(True, victim, number) for victim in ("command", "supervisor") for number in numbers]
    zeros = []
    for by_deepspeed, victim, number in cases[: 3 if scene.is_matrix else None]:
        run = scene.training(by_deepspeed=by_deepspeed).start().reach(HIT_AT).send(victim, number)
        end = run.stopped()
        if end.status == 0:
            zeros.append(signal.Signals(number).name)
            expect(by_deepspeed and victim == "supervisor", f"status 0 after {number.name} to the {victim}")
        run.by_deepspeed = False
        run.resume()
        run.check_nothing_lost(0)
    exceptions = f"; status 0 of `deepspeed` after {', '.join(zeros)} to launch.py" if zeros else ""
    return f"the ranks saved and ended; nothing lost{exceptions}"


@fault(
    9,
    "sigterm-rank",
    "all ranks save at the same step and end with status 75, which asks for a requeue; nothing is lost",
    fast=True,
)
def sigterm_rank(scene: Scene) -> str:
    """SIGTERM to one rank."""
    run = scene.training().start().reach(HIT_AT).send("rank 1", signal.SIGTERM)
    check_stopped(run)
    return "one checkpoint at the step of the stop; status 75; nothing lost"


def check_stopped(run: Training, status: int = 75) -> None:
    """Check that a run stopped with a checkpoint of its last step, and that nothing is lost."""
    end = run.stopped()
    expect(end.status == status, end.tail())
    expect([event["status"] for event in run.events("end")] == ["stopped"], "the event of the end is missing")
    saved, reached = run.checkpoints()[-1].name, last_step(run.run_dir)
    expect(saved == f"step-{reached:08d}", f"the last step is {reached}, the last checkpoint {saved}")
    run.check_whole()
    run.resume()
    run.check_nothing_lost(0)


@fault(10, "sigusr1-slurm", "as for a rank: a checkpoint, a requeue by SLURM, and nothing is lost")
def sigusr1_slurm(scene: Scene) -> str:
    """SIGUSR1 through a SLURM batch script."""
    from clusters import SCRIPT, Cluster
    from slurm_runs import check_finished, events, run_straight, started

    lack = subprocess.run([SCRIPT, "ready"], capture_output=True, text=True)
    if lack.returncode:
        raise NotPossible(lack.stdout.strip())
    straight = run_straight(scene.corpus, scene.folder / "straight")
    # munged refuses to work in a folder that only its owner may enter.
    for place in (scene.folder, scene.folder.parent):
        place.chmod(0o755)
    (scene.folder / "slurm").mkdir()
    with Cluster(scene.folder / "slurm") as cluster:
        cluster.folder = scene.folder
        job = started(cluster, scene.corpus, scene.folder / "run")
        cluster.run("scancel", "--batch", "--signal=USR1", str(job))
        check_finished(cluster, job, scene.folder / "run", straight)
    seen = events(scene.folder / "run", "end", "status")
    expect(seen == ["stopped", "finished"], f"the run ended as {seen}")
    scene.lost = 0
    return "4 ranks on 2 nodes saved, SLURM requeued the job, nothing lost"


@fault(11, "signal-in-save", "one valid checkpoint of the last step, none half written; nothing is lost")
def signal_in_save(scene: Scene) -> str:
    """A signal during a save, and a second signal."""
    for at in ("open step-N.partial/rank-00000.safetensors", "os.rename step-N.partial"):
        run = scene.training()
        run.injected = {"at": at, "do": "SIGTERM", "then": "SIGUSR1"}
        run.start()
        check_stopped(run)
    return "one valid checkpoint, status 75, nothing lost"


@fault(21, "slow-rank", "the rank is named in the log and in the events; the results are unchanged")
def slow_rank(scene: Scene) -> str:
    """One rank three times slower than the others."""
    run = scene.training()
    run.injected = {"rank": 1, "sleep": 0.3}
    end = run.run().succeeded()
    run.check_nothing_lost()
    named = [line for line in end.out.splitlines() if line.startswith("warning: rank 1 ") and "is slow" in line]
    expect(named, f"no line names rank 1; {end.tail()}")  # There is another line each time that the ratio has doubled.
    expect(run.events("slow_rank"), "there is no event")
    return named[0]


@fault(
    22,
    "hung-rank",
    "the run ends within engine.timeout plus 5 s; rank, host, step and cause are on the terminal, and the stacks of "
    "all ranks that can give one are in the run folder",
    fast=True,
)
def hung_rank(scene: Scene) -> str:
    """A rank stopped (SIGSTOP), with engine.timeout='5 s'."""
    timeout = 5.0
    run = scene.training(f"engine.timeout={timeout:g} s", "train.max_steps=100000")
    run.start().reach(HIT_AT).send("rank 1", signal.SIGSTOP)
    end = run.stopped()
    expect(end.status not in (0, 75), end.tail())
    expect(end.seconds <= timeout + DEAD_SECONDS, f"ended only after {end.seconds:.1f} s")
    words = (f"rank 1 on {socket.gethostname()}", "is stopped in step", "engine.timeout", "the state T")
    missing = [word for word in words if word not in end.err]
    expect(not missing, f"the message has no {missing}; {end.tail()}")
    stacks = {path.name: path.read_text() for path in (run.run_dir / "logs" / "stacks").iterdir()}
    expect(list(sorted(stacks)) == ["rank-00000.txt", "rank-00001.txt"], f"stacks: {sorted(stacks)}")
    waiting = stacks["rank-00000.txt"]
    expect("loop.py" in waiting, f"the stack of rank 0 does not show where it waits: {waiting[-2000:]}")
    run.settings["train.max_steps"] = str(last_step(run.run_dir) + INTERVAL)
    run.settings["allow_changes"] = "[train.max_steps]"
    run.resume()
    return "rank, host, step and cause are named; the stacks of both ranks are in RUN/logs/stacks; the run resumes"


SHIFT = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>
static time_t shift(void) { return access(getenv("DRILL_SHIFT"), F_OK) ? 0 : 86400; }
int clock_gettime(clockid_t clock, struct timespec *t) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = (int (*)(clockid_t, struct timespec *))dlsym(RTLD_NEXT, "clock_gettime");
    int status = real(clock, t);
    if (clock == CLOCK_REALTIME) t->tv_sec += shift();
    return status;
}
int gettimeofday(struct timeval *restrict t, void *restrict zone) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    t->tv_sec = now.tv_sec;
    t->tv_usec = now.tv_nsec / 1000;
    return 0;
}
time_t time(time_t *result) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (result) *result = now.tv_sec;
    return now.tv_sec;
}
"""
"""A library that moves the clock of a process ahead by a day once a file exists."""


@fault(32, "clock", "no time-out, no change of the order of data, metrics or checkpoints; nothing is lost")
def clock(scene: Scene) -> str:
    """The clock jumps ahead by a day, and back."""
    compiler, library = shutil.which("gcc"), scene.folder / "shift.so"
    if not compiler:
        raise NotPossible("there is no C compiler")
    library.with_suffix(".c").write_text(SHIFT)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, library.with_suffix(".c"), "-ldl"], check=True)
    run, shifted = scene.training("engine.timeout=30 s"), scene.folder / "shifted"
    run.environment = {"LD_PRELOAD": str(library), "DRILL_SHIFT": str(shifted)}
    run.start().reach(HIT_AT).disturb(shifted.touch).reach(HIT_AT + 8).disturb(shifted.unlink)
    run.wait().succeeded()
    jump = _largest_jump(run.run_dir)
    expect(jump > 80_000, f"the clock did not jump: {jump:.0f} s")
    run.check_nothing_lost()
    return "no effect; nothing lost"


def _largest_jump(run_dir: Path) -> float:
    from doors import read_lines

    times = [line["time"] for line in read_lines(run_dir / "metrics.jsonl")]
    return max(after - before for before, after in itertools.pairwise(times))


@fault(40, "terminal-closes", "as for SIGTERM: a checkpoint, status 75; nothing is lost")
def terminal_closes(scene: Scene) -> str:
    """The terminal of the run closes (SIGHUP)."""
    run = scene.training()
    terminal, end = os.openpty()
    run.start(stdin=end, stdout=end, stderr=end, on_terminal=True)
    os.close(end)
    try:
        run.reach(HIT_AT)
    finally:
        run.disturb(lambda: os.close(terminal))
    check_stopped(run)
    return "one checkpoint, status 75, nothing lost"


@fault(48, "sigterm-at-start", "the message says that the run stopped before the first step; status 75")
def sigterm_at_start(scene: Scene) -> str:
    """SIGTERM to one rank during start-up."""
    run = scene.training().start().wait_for_log("bigtx: ").send("rank 1", signal.SIGTERM)
    end = run.stopped()
    expect(end.status == 75, end.tail())
    expect("stopped before the first step" in end.out, end.tail())
    expect("lost the connection" not in end.text, end.tail())
    return "stopped before the first step; status 75"
