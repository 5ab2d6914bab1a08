"""`bigtx slurm render | submit | status`: jobs of the scripts in slurm/, with the settings of the site.

`submit` submits the script that `render` prints: a script of slurm/ with the site's options as #SBATCH lines and with
the command's arguments.
"""

from __future__ import annotations

import contextlib
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
from bigtx.config.runs import is_run, shipped_folder
from bigtx.config.schema import FinetuneConfig, PrepareConfig, PretrainConfig
from bigtx.utils.arguments import JSON_HELP, Arguments, take
from bigtx.utils.errors import CheckpointError, ConfigError, LaunchError
from bigtx.utils.log import say, say_json
from bigtx.utils.secrets import scrub_text
from bigtx.utils.shell import command
from bigtx.utils.terminal import columns, wrapped

CONFIGS: dict[str, tuple[type, str]] = {
    "pretrain": (PretrainConfig, "pretrain"),
    "finetune": (FinetuneConfig, "finetune"),
    "prepare": (PrepareConfig, "data prepare"),
}
"""Jobs whose config is checked before they are submitted, with their commands."""
JOBS = (*CONFIGS, "evaluate", "sweep")
OWN = {
    "nodes=N": "nodes of the job (1); for pretrain, finetune and sweep",
    "parts=N": "nodes of a preparation, one for each part (1); a second job merges the parts",
    "site=FILE": "the settings of the cluster (configs/site/default.sh, or the file that BIGTX_SITE names)",
}
"""Options of `submit` and `render` themselves; all other words are passed to the job."""
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
"""Variables of sbatch, and the options that they set."""
COMMENT = "bigtx "
"""The beginning of a job's comment; the run folder follows."""

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


FACTS_OF_START = {"time": "time", "job": "slurm_job", "host": "host", "ranks": "world_size", "step": "step"}
"""What `status` shows of a start, and the keys of an event in events.jsonl."""


@dataclass
class _Job:
    """A job as the user requests it.

    Attributes:
        kind: one of `JOBS`, or merge.
        arguments: the arguments of the script.
        site: the file with the settings of the cluster.
        options: options of sbatch, by their long names.
        output: the folder that the job makes or trains in, if it is known.
    """

    kind: str
    arguments: list[str]
    site: Path
    options: dict[str, str] = field(default_factory=dict)
    output: str | None = None


def submit_command(argv: Sequence[str]) -> None:
    """Submit a job, and print the next commands.

    Raises:
        ConfigError: the job's arguments cannot be used.
        LaunchError: sbatch is missing, or refuses the job.
    """
    if _asks_for_help("submit", argv):
        return
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
        return
    say(f"{name}: job {number}\nlog: {log}.log, of the command itself {log}-node0.log")
    if merge_number:
        say(f"merge: job {merge_number}, when all parts are done")
    if job.kind in ("pretrain", "finetune") and job.output:
        say(f"next: {command('bigtx', 'slurm', 'status', job.output)}")
        say(f"to stop it with a checkpoint and resume it later: {command('touch', Path(job.output) / 'STOP')}")
    say(f"to cancel it: {command('scancel', number)}")


def render_command(argv: Sequence[str]) -> None:
    """Print the batch script that `submit` would submit.

    Raises:
        ConfigError: the job's arguments cannot be used.
    """
    if not _asks_for_help("render", argv):
        say(_render(_read("render", argv)).rstrip("\n"))


def status_command(argv: Sequence[str]) -> None:
    """Print the starts of a run with their ends, and the jobs that SLURM still lists.

    Raises:
        CheckpointError: the folder is not a run, and SLURM lists no job for it.
    """
    parser = Arguments("slurm status", "Show the starts of a run with their ends, and the jobs that SLURM still lists.")
    parser.add_argument("run", metavar="RUN", help="a run's folder")
    arguments = parser.parse_args(argv)
    starts = _starts(Path(arguments.run))
    jobs = _known_jobs(Path(arguments.run), {start["job"] for start in starts})
    if not starts and not jobs and not is_run(Path(arguments.run)):
        raise CheckpointError(f"{arguments.run} is not a run, and no job is queued for it; name a run's folder")
    if arguments.json:
        say_json({"starts": starts, "jobs": jobs})
        return
    over = [each["job"] for each in jobs if each["state"] in (*ENDED, *WAITING)]
    for start in starts:
        job = f"job {start['job']} (restart {start['restart']})" if start["job"] else "outside SLURM"
        if start["end"]:
            end = f"{start['end']} at step {start['end_step']:,}"
        elif start is not starts[-1] or start["job"] in over:
            end = "no end is recorded: it was killed, or its machine failed"
        else:
            end = "no end is recorded: it is running, or was killed"
        began = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(start["time"]))
        say(f"{began}  {job} on {start['host']}, {start['ranks']} ranks, from step {start['step']:,}: {end}")
    for each in jobs:
        say(f"job {each['job']}: {each['state']}" + (f" ({each['reason']})" if each["reason"] != "None" else ""))
    if all(each["state"] in ENDED for each in jobs):
        say("no job of this run is queued or running")


def _asks_for_help(verb: str, argv: Sequence[str]) -> bool:
    if not {"-h", "--help"} & set(argv):
        return False
    what = "Submit a job" if verb == "submit" else "Print the batch script of a job"
    about = (
        f"{what}, with the scripts in slurm/. JOB is {', '.join(JOBS[:-1])} or {JOBS[-1]}. All words but those below "
        "are passed to its command: a config and settings for pretrain, finetune and prepare; RUN and options for "
        "evaluate; FILE RUNS pretrain|finetune and a config for sweep, which makes a run in RUNS for each line of "
        "settings in FILE."
    )
    example = "pretrain pretrain/gpt-125m.yaml data.sources.mine.path=corpus run_dir=runs/mine nodes=2"
    options = OWN | ({"--json": JSON_HELP} if verb == "submit" else {})
    say(f"usage: bigtx slurm {verb} JOB [NAME=VALUE ...] WORDS ...\n")
    say(wrapped(about) + "\n")
    say(wrapped(f"e.g. bigtx slurm {verb} {example}", " " * 7, "  ") + "\n")
    say("\n".join(columns(options.items())))
    return True


def _read(verb: str, argv: Sequence[str]) -> _Job:
    """Return the job of a command line; check its config as the job itself would.

    Raises:
        ConfigError: the command line or the config is wrong.
    """
    if not argv or argv[0] not in JOBS:
        what = f"{argv[0]!r} is not a job" if argv else "the job is missing"
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
            raise ConfigError(f"{name}={text}: write a number of nodes, e.g. {name}=2")
    default = os.environ.get("BIGTX_SITE") or shipped_folder() / "site" / "default.sh"
    site = Path(given["site"] or default).absolute()
    if not site.is_file():
        what = f"site={site}: no such file; copy {shipped_folder() / 'site' / 'default.sh'} and name the copy"
        raise ConfigError(what)
    _refuse_secrets(verb, words)
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


def _refuse_secrets(verb: str, words: Sequence[str]) -> None:
    """Refuse words that look like a secret, also those of a job that checks its config only when it runs."""
    if secret := next((word for word in words if scrub_text(word) != word), None):
        raise ConfigError(
            f"bigtx slurm {verb}: {scrub_text(secret)} looks like a secret, which the batch script and SLURM's list of "
            "jobs would show; pass it as an environment variable"
        )


def _checked_output(kind: str, words: Sequence[str]) -> str:
    """Check a job's config. Return the folder that it makes or trains in."""
    schema, name = CONFIGS[kind]
    config: Any = parse_command_line(schema, words, program=f"bigtx {name}").config
    return str(config.output if kind == "prepare" else config.run_dir)


def _num_lines(words: Sequence[str]) -> int:
    """Count the runs of a sweep.

    Raises:
        ConfigError: the words or the file of settings are wrong.
    """
    if len(words) < 3 or not Path(words[0]).is_file():
        raise ConfigError(
            "write a sweep as FILE RUNS pretrain|finetune ...; FILE has a line of settings for each run, RUNS is the "
            "folder for the run folders"
        )
    lines = Path(words[0]).read_text(encoding="utf-8").splitlines()
    if not lines or not all(line.strip() for line in lines):
        raise ConfigError(f"{words[0]}: each line has the settings of a run, KEY=VALUE ...; remove empty lines")
    return len(lines)


def _home() -> Path:
    """Return the folder that contains slurm/ and configs/: the clone, or the installed package."""
    return shipped_folder().parent


def _render(job: _Job) -> str:
    """Return a complete batch script, which runs from any folder."""
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
    """Return the long name of an #SBATCH line's option; None for another line."""
    found = re.match(r"#SBATCH --([\w-]+)", line)
    return found[1] if found else None


def _site_variables(site: Path) -> dict[str, str]:
    """Return the variables of sbatch that the site's file sets, by running it as the batch scripts do.

    Raises:
        ConfigError: the file fails.
    """
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
    """Submit a job. Return its number.

    Raises:
        LaunchError: sbatch is missing, or refuses the job.
    """
    variables = _site_variables(job.site)
    # The options in these variables are in the script, where options of the command line have replaced them.
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
            "there is no sbatch on this machine; submit from a login node of the cluster, or print the script with "
            "`bigtx slurm render`"
        ) from None
    if done.returncode != 0:
        raise LaunchError(f"sbatch refused the job: {done.stderr.strip()}; {job.site} has the options of the cluster")
    return done.stdout.strip().partition(";")[0]


def _starts(run_dir: Path) -> list[dict[str, Any]]:
    """Read the starts of a run, each with its end if that is recorded."""
    from bigtx.track.jsonl import read_records

    starts: list[dict[str, Any]] = []
    for event in read_records(run_dir / "events.jsonl"):
        with contextlib.suppress(ValueError, KeyError, TypeError):  # A damaged line.
            if event["kind"] == "start":
                facts = {name: event[key] for name, key in FACTS_OF_START.items()}
                starts.append(facts | {"restart": int(event["slurm_restart"]), "end": None, "end_step": None})
            elif event["kind"] == "end" and starts:
                starts[-1] |= {"end": event["status"], "end_step": event["step"]}
    return starts


def _known_jobs(run_dir: Path, numbers: set[str]) -> list[dict[str, str]]:
    """Return the jobs that SLURM lists for a run, including those that ended minutes ago; none without SLURM.

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
