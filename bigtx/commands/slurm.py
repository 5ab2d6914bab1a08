"""`bigtx slurm render | submit | status`: jobs of the scripts in slurm/, with what the site needs.

What `render` prints is what `submit` submits: the script of slurm/, with the site's options as #SBATCH lines and the
command's arguments in it.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bigtx.config.load import parse_command_line
from bigtx.config.runs import is_run
from bigtx.config.schema import FinetuneConfig, PrepareConfig, PretrainConfig
from bigtx.config.shipped import shipped_folder
from bigtx.utils.arguments import JSON_HELP, Arguments, columns, take, wrapped
from bigtx.utils.errors import CheckpointError, ConfigError, LaunchError
from bigtx.utils.log import say, say_json
from bigtx.utils.shell import command

CONFIGS: dict[str, tuple[type, str]] = {
    "pretrain": (PretrainConfig, "pretrain"),
    "finetune": (FinetuneConfig, "finetune"),
    "prepare": (PrepareConfig, "data prepare"),
}
"""Jobs whose config is checked before they are submitted, and their commands."""
JOBS = (*CONFIGS, "evaluate", "sweep")
OWN = {
    "nodes=N": "nodes of the job (1); for pretrain, finetune and sweep",
    "parts=N": "nodes that share a preparation, each with a part of it (1); a second job merges them",
    "site=FILE": "what the cluster needs (configs/site/default.sh, or what BIGTX_SITE names)",
}
"""What `submit` and `render` take for themselves; all else is the job's."""
OPTIONS = {
    "SBATCH_ACCOUNT": "account",
    "SBATCH_CONSTRAINT": "constraint",
    "SBATCH_EXCLUSIVE": "exclusive",
    "SBATCH_GPUS_PER_NODE": "gpus-per-node",
    "SBATCH_GRES": "gres",
    "SBATCH_MEM_PER_NODE": "mem",
    "SBATCH_PARTITION": "partition",
    "SBATCH_QOS": "qos",
    "SBATCH_RESERVATION": "reservation",
    "SBATCH_SIGNAL": "signal",
    "SBATCH_TIMELIMIT": "time",
}
"""Variables of sbatch, and the options that they stand for."""
COMMENT = "bigtx "
"""What a job's comment begins with; the run folder follows."""

ENDED = (
    "boot_fail",
    "cancelled",
    "completed",
    "deadline",
    "failed",
    "node_fail",
    "out_of_memory",
    "preempted",
    "revoked",
    "timeout",
)
"""What SLURM calls jobs that have ended."""
WAITING = ("pending", "configuring", "requeued")
"""What SLURM calls jobs that do not run yet, or not again."""


@dataclass
class _Job:
    """A job as it is asked for.

    Attributes:
        kind: one of `JOBS`, or merge.
        arguments: of the script.
        options: of sbatch, by their long names.
        output: the folder that the job makes or trains in, if it is known.
    """

    kind: str
    arguments: list[str]
    site: Path
    options: dict[str, str] = field(default_factory=dict)
    output: str | None = None


def submit_command(argv: Sequence[str]) -> int:
    """Submit a job, and say what to do next.

    Raises:
        ConfigError: the job's arguments cannot be used.
        LaunchError: sbatch is missing, or refuses the job.
    """
    if _asks_for_help("submit", argv):
        return 0
    is_json = "--json" in argv
    job = _read("submit", [word for word in argv if word != "--json"])
    number, merge_number = _submit(job), None
    name = job.kind
    log = Path.cwd() / (f"slurm-{name}-{number}" + ("-K" if "array" in job.options else ""))
    if job.kind == "prepare" and job.output:
        merge = _Job("merge", [job.output], job.site, {"dependency": f"afterok:{number}"}, job.output)
        merge_number = _submit(merge)
    if is_json:
        say_json({"kind": name, "job": number, "merge_job": merge_number, "log": f"{log}.log", "output": job.output})
        return 0
    say(f"{name}: job {number}\nlog: {log}.log, of the command itself {log}-node0.log")
    if merge_number:
        say(f"merge: job {merge_number}, when all parts are done")
    if job.kind in ("pretrain", "finetune") and job.output:
        say(f"next: {command('bigtx', 'slurm', 'status', job.output)}")
        say(f"to stop it with a checkpoint and have it go on later: {command('touch', Path(job.output) / 'STOP')}")
    say(f"to end it: {command('scancel', number)}")
    return 0


def render_command(argv: Sequence[str]) -> int:
    """Print the batch script that `submit` would submit.

    Raises:
        ConfigError: the job's arguments cannot be used.
    """
    if not _asks_for_help("render", argv):
        say(_render(_read("render", argv)).rstrip("\n"))
    return 0


def status_command(argv: Sequence[str]) -> int:
    """Say what became of a run's jobs: each life of the run, and the jobs that SLURM still knows.

    Raises:
        CheckpointError: the folder is no run, and SLURM knows no job for it.
    """
    parser = Arguments(
        prog="bigtx slurm status",
        description="What became of a run's jobs: each life of the run, and the jobs that SLURM still knows.",
    )
    parser.add_argument("run", metavar="RUN", help="a run's folder")
    parser.add_json()
    arguments = parser.parse_args(argv)
    lives = _lives(Path(arguments.run))
    jobs = _known_jobs(Path(arguments.run), {life["job"] for life in lives})
    if not lives and not jobs and not is_run(Path(arguments.run)):
        raise CheckpointError(f"{arguments.run} is not a run, and no job is queued for it; name a run's folder")
    if arguments.json:
        say_json({"lives": lives, "jobs": jobs})
        return 0
    over = [each["job"] for each in jobs if each["state"] in (*ENDED, *WAITING)]
    for life in lives:
        job = f"job {life['job']} (restart {life['restart']})" if life["job"] else "outside SLURM"
        if life["end"]:
            end = f"{life['end']} at step {life['end_step']:,}"
        elif life is not lives[-1] or life["job"] in over:
            end = "no end is recorded: it was killed, or its machine failed"
        else:
            end = "no end is recorded: it runs, or was killed"
        began = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(life["time"]))
        say(f"{began}  {job} on {life['host']}, {life['ranks']} ranks, from step {life['step']:,}: {end}")
    for each in jobs:
        say(f"job {each['job']}: {each['state']}" + (f" ({each['reason']})" if each["reason"] != "None" else ""))
    if all(each["state"] in ENDED for each in jobs):
        say("no job of this run is queued or running")
    return 0


def _asks_for_help(verb: str, argv: Sequence[str]) -> bool:
    if not {"-h", "--help"} & set(argv):
        return False
    what = "Submit a job" if verb == "submit" else "Print the batch script of a job"
    about = (
        f"{what}, by the scripts in slurm/. JOB is {', '.join(JOBS[:-1])} or {JOBS[-1]}. All words but those below are "
        "its command's: a config and settings for pretrain, finetune and prepare; RUN and options for evaluate; FILE "
        "RUNS pretrain|finetune and a config for sweep, which makes a run in RUNS for each line of settings in FILE."
    )
    example = "pretrain pretrain/gpt-125m.yaml data.sources.mine.path=corpus run_dir=runs/mine nodes=2"
    lines = [
        f"usage: bigtx slurm {verb} JOB [NAME=VALUE ...] WORDS ...",
        "",
        wrapped(about),
        "",
        wrapped(f"e.g. bigtx slurm {verb} {example}", " " * 7, "  "),
        "",
        *columns((OWN | ({"--json": JSON_HELP} if verb == "submit" else {})).items()),
    ]
    say("\n".join(lines))
    return True


def _read(verb: str, argv: Sequence[str]) -> _Job:
    """The job that a command line asks for; its config is checked as the job itself would check it."""
    if not argv or argv[0] not in JOBS:
        what = f"{argv[0]!r} is no job" if argv else "which job"
        raise ConfigError(f"bigtx slurm {verb}: {what}; write bigtx slurm {verb} {'|'.join(JOBS)} ...")
    kind, words = argv[0], list(argv[1:])
    given: dict[str, str | None] = {}
    for name in (shown.partition("=")[0] for shown in OWN):
        given[name], words = take(words, name)
    for name, kinds in (("nodes", ("pretrain", "finetune", "sweep")), ("parts", ("prepare",))):
        text = given[name]
        if text is not None and kind not in kinds:
            raise ConfigError(f"{name}={text}: a job of {kind} takes no {name}; leave it out")
        if text is not None and (not text.isdecimal() or int(text) < 1):
            raise ConfigError(f"{name}={text}: name a number of nodes, e.g. {name}=2")
    default = os.environ.get("BIGTX_SITE") or shipped_folder() / "site" / "default.sh"
    site = Path(given["site"] or default).absolute()
    if not site.is_file():
        raise ConfigError(
            f"site={site}: no such file; copy {shipped_folder() / 'site' / 'default.sh'} and name the copy"
        )
    job = _Job(kind, words, site)
    if kind in CONFIGS:
        job.output = _checked_output(kind, words)
    if given["nodes"]:
        job.options["nodes"] = given["nodes"]
    if kind == "prepare":
        job.options["array"] = f"1-{given['parts'] or 1}"
    elif kind == "sweep":
        job.options["array"] = f"1-{_num_lines(words)}"
    if kind in ("pretrain", "finetune") and job.output:
        job.options["comment"] = COMMENT + str(Path(job.output).absolute())
    return job


def _checked_output(kind: str, words: Sequence[str]) -> str:
    """Check a job's config. Returns the folder that it makes or trains in."""
    schema, name = CONFIGS[kind]
    config: Any = parse_command_line(schema, words, program=f"bigtx {name}").config
    return str(config.output if kind == "prepare" else config.run_dir)


def _num_lines(words: Sequence[str]) -> int:
    """Runs of a sweep."""
    if len(words) < 3 or not Path(words[0]).is_file():
        raise ConfigError(
            "a sweep is written: FILE RUNS pretrain|finetune ..., FILE with a line of settings for each run, RUNS the "
            "folder for their run folders"
        )
    lines = Path(words[0]).read_text(encoding="utf-8").splitlines()
    if not lines or not all(line.strip() for line in lines):
        raise ConfigError(f"{words[0]}: each line names the settings of a run, KEY=VALUE ...; take empty lines out")
    return len(lines)


def _home() -> Path:
    """The folder that holds slurm/ and configs/: the clone, or the installed package."""
    return shipped_folder().parent


def _render(job: _Job) -> str:
    """A batch script that runs as it is, wherever it lies."""
    script = (_home() / "slurm" / f"{job.kind}.sbatch").read_text(encoding="utf-8")
    options = {
        OPTIONS[name]: value for name, value in _site_variables(job.site).items() if name in OPTIONS
    } | job.options
    kept = [line for line in script.splitlines() if not (found := _option(line)) or found not in options]
    place = max(number for number, line in enumerate(kept) if _option(line)) + 1
    ours = [
        f"#SBATCH --{name}={shlex.quote(value)}" if value else f"#SBATCH --{name}" for name, value in options.items()
    ]
    environment = ["", command("export", f"BIGTX_HOME={_home()}", f"BIGTX_SITE={job.site}")]
    return "\n".join([*kept[:place], *ours, *environment, command("set", "--", *job.arguments), *kept[place:]]) + "\n"


def _option(line: str) -> str | None:
    """The long name of an #SBATCH line's option."""
    found = re.match(r"#SBATCH --([\w-]+)", line)
    return found[1] if found else None


def _site_variables(site: Path) -> dict[str, str]:
    """The variables of sbatch that the site's file sets, by running it as the batch scripts do."""
    done = subprocess.run(
        ["bash", "-c", 'source "$1" >&2 && env -0', "bash", str(site)],
        capture_output=True,
        env=os.environ | {"BIGTX_HOME": str(_home())},
    )
    if done.returncode != 0:
        raise ConfigError(f"site={site} ended with status {done.returncode}: {done.stderr.decode().strip()}")
    pairs = (pair.partition("=") for pair in done.stdout.decode(errors="replace").split("\0"))
    return {name: value for name, _, value in pairs if name.startswith("SBATCH_")}


def _submit(job: _Job) -> str:
    """Submit a job. Returns its number."""
    variables = _site_variables(job.site)
    # These are in the script, where what was asked for on the command line has replaced them.
    environment = {name: value for name, value in (os.environ | variables).items() if name not in OPTIONS}
    try:
        done = subprocess.run(
            ["sbatch", "--parsable", "--kill-on-invalid-dep=yes"],
            input=_render(job),
            capture_output=True,
            text=True,
            env=environment,
        )
    except FileNotFoundError:
        raise LaunchError(
            "there is no sbatch on this machine; submit from a login node of the cluster, or print the script by "
            "`bigtx slurm render`"
        ) from None
    if done.returncode != 0:
        raise LaunchError(f"sbatch refused the job: {done.stderr.strip()}; {job.site} says what the cluster needs")
    return done.stdout.strip().partition(";")[0]


def _lives(run_dir: Path) -> list[dict[str, Any]]:
    """Each life of a run: how it began, and how it ended if that is known."""
    import json

    lives: list[dict[str, Any]] = []
    try:
        lines = (run_dir / "events.jsonl").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    for line in lines:
        try:
            event = json.loads(line)
            if event["kind"] == "start":
                lives.append(
                    {
                        "time": event["time"],
                        "job": event["slurm_job"],
                        "restart": int(event["slurm_restart"]),
                        "host": event["host"],
                        "ranks": event["world_size"],
                        "step": event["step"],
                        "end": None,
                        "end_step": None,
                    }
                )
            elif event["kind"] == "end" and lives:
                lives[-1] |= {"end": event["status"], "end_step": event["step"]}
        except (ValueError, KeyError, TypeError):
            continue  # A line that was torn by a crash.
    return lives


def _known_jobs(run_dir: Path, numbers: set[str]) -> list[dict[str, str]]:
    """The jobs that SLURM knows for a run, also those that ended minutes ago; none where there is no SLURM.

    Args:
        numbers: jobs that have worked on the run.
    """
    listed = ["squeue", "-h", "--states=all", "-o", "%A|%T|%r|%k"]
    try:
        done = subprocess.run(listed, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return []
    own = COMMENT + str(run_dir.absolute())
    rows = (line.split("|", 3) for line in done.stdout.splitlines())
    return [
        {"job": row[0], "state": row[1].lower(), "reason": row[2]}
        for row in rows
        if len(row) == 4 and (row[3] == own or row[0] in numbers)
    ]
