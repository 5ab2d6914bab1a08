"""`bigtx doctor`: check whether this machine, or all machines of a job, can train.

On one machine it checks what training needs. Where srun starts it once on each node of a job, the machines first
compare code, packages, clocks and the folder, as those of a run do. Then each machine checks itself, and pairs of
machines measure their all-reduce, which shows slow ones.
"""

from __future__ import annotations

import importlib.metadata
import os
import resource
import shutil
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from packaging.requirements import Requirement

from bigtx.config.load import RANKS, take_ranks
from bigtx.launch.consistency import MOST_ROUNDS, SLOW_FRACTION, Pair, Verdict, judge, nearest_folder, rounds, speeds_of
from bigtx.launch.supervisor import start_ranks
from bigtx.launch.world import World, find_world
from bigtx.utils import hardware, log
from bigtx.utils.arguments import Arguments
from bigtx.utils.errors import LaunchError
from bigtx.utils.files import write_atomic
from bigtx.utils.log import say_result
from bigtx.utils.processes import rank
from bigtx.utils.terminal import wrapped
from bigtx.utils.units import format_size

PACKAGES = ("torch", "deepspeed", "sentencepiece", "webdataset", "omegaconf", "wandb")
LEAST_DISK_BYTES, ENOUGH_DISK_BYTES = 1 << 30, 20 << 30
ENOUGH_SHARED_MEMORY_BYTES = 1 << 30
"""NCCL and data loaders keep some hundred MB there; Docker gives 64 MB by default."""
ENOUGH_FILES = 1024
FREE_GPU_FRACTION = 0.9


@dataclass(frozen=True)
class Check:
    """The result of one check.

    Attributes:
        name: what was checked.
        status: the outcome; a warning does not prevent a run from starting.
        text: what was found, and what to do if it is not sufficient.
    """

    name: str
    status: Literal["ok", "warning", "failed"]
    text: str


def check_machine(folder: Path, *, online: bool = True) -> list[Check]:
    """Run all checks of this machine.

    Args:
        folder: the folder for the runs.
        online: whether to check W&B.
    """
    checks: list[Callable[[], Iterator[Check]]] = [_packages, _devices, _compiler, lambda: _disk(folder)]
    checks += [_shared_memory, _open_files, *([_wandb] if online else [])]
    return [each for check in checks for each in check()]


def _packages() -> Iterator[Check]:
    needed, problems = _requirements(), []
    found = hardware.packages()
    for name in PACKAGES:
        wanted = needed[name]
        if name not in found:
            problems.append(f"{name} is missing; write pip install '{wanted}'")
        elif not wanted.specifier.contains(found[name], prereleases=True):
            problems.append(f"{name} {found[name]} does not fit; write pip install '{wanted}'")
    commit = hardware.git_commit()
    own = f"bigtx {found['bigtx']}" + (f" at commit {commit[:12]}" if commit else "")
    versions = ", ".join(f"{name} {found[name]}" for name in PACKAGES if name in found)
    yield Check("packages", "failed" if problems else "ok", "; ".join(problems) or f"{own}, {versions}")


def _requirements() -> dict[str, Requirement]:
    """Return the requirements of bigtx, by the names of the packages."""
    try:
        lines = importlib.metadata.requires("bigtx") or []
    except importlib.metadata.PackageNotFoundError:  # A clone need not be installed to run.
        project = Path(hardware.__file__).resolve().parents[2] / "pyproject.toml"
        lines = tomllib.loads(project.read_text(encoding="utf-8"))["project"]["dependencies"]
    found = (Requirement(line) for line in lines)
    return {each.name: each for each in found if each.marker is None}


def _devices() -> Iterator[Check]:
    import torch

    machine = f"{hardware.num_cores()} cores, {format_size(hardware.memory_bytes())} of memory"
    by_driver = len(list(Path("/proc/driver/nvidia/gpus").glob("*")))
    if not torch.cuda.is_available():
        if by_driver:
            built = f"it is built for CUDA {torch.version.cuda}" if torch.version.cuda else "it is built without CUDA"
            text = f"{by_driver} GPUs, and torch uses none of them: {built}"
            yield Check("devices", "failed", f"{text}; install the build for this machine's driver")
        else:
            yield Check("devices", "ok", f"no GPU; {machine}")
        return
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    nccl = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    yield Check("devices", "ok", f"{len(names)} GPUs ({names[0]}), CUDA {torch.version.cuda}, NCCL {nccl}; {machine}")
    for index, name in enumerate(names):
        yield from _gpu(index, name)


def _gpu(index: int, name: str) -> Iterator[Check]:
    """Yield the problems of a GPU."""
    import torch

    try:
        ones = torch.ones(256, 256, device=f"cuda:{index}")
        is_right = bool((ones @ ones == 256).all())
        free, total = torch.cuda.mem_get_info(index)
    except RuntimeError as error:
        yield Check(f"gpu {index}", "failed", f"{name} cannot be used: {str(error).splitlines()[0]}")
        return
    if not is_right:
        yield Check(f"gpu {index}", "failed", f"{name} multiplies wrongly")
    elif free < FREE_GPU_FRACTION * total:
        text = f"{format_size(total - free)} of {format_size(total)} of {name} are in use by another program"
        yield Check(f"gpu {index}", "warning", text)


def _compiler() -> Iterator[Check]:
    found = next((path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))), None)
    missing = "no C++ compiler; only torch.compile and DeepSpeed's own kernels need one"
    yield Check("compiler", "ok" if found else "warning", found or missing)


def _disk(folder: Path) -> Iterator[Check]:
    folder = nearest_folder(folder)
    free = shutil.disk_usage(folder).free
    text = f"{format_size(free)} free in {folder}"
    if not os.access(folder, os.W_OK):
        yield Check("disk", "failed", f"{folder} cannot be written; name another folder")
    elif free < ENOUGH_DISK_BYTES:
        yield Check("disk", "failed" if free < LEAST_DISK_BYTES else "warning", f"{text}; checkpoints need more")
    else:
        yield Check("disk", "ok", text)


def _shared_memory() -> Iterator[Check]:
    path = Path("/dev/shm")
    if not path.is_dir():
        yield Check("shared memory", "warning", f"there is no {path}, which NCCL and data loaders use")
        return
    free = shutil.disk_usage(path).free
    advice = "" if free >= ENOUGH_SHARED_MEMORY_BYTES else "; give a container more, e.g. docker run --shm-size=8g"
    yield Check("shared memory", "warning" if advice else "ok", f"{format_size(free)} free in {path}{advice}")


def _open_files() -> Iterator[Check]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    advice = "" if soft >= ENOUGH_FILES else f"; write ulimit -n {min(hard, 65536) if hard > 0 else 65536}"
    yield Check("open files", "warning" if advice else "ok", f"{soft:,} at most{advice}")


def _wandb() -> Iterator[Check]:
    if os.environ.get("WANDB_MODE") in ("offline", "dryrun", "disabled"):
        yield Check("W&B", "ok", "offline, as requested")
        return
    from bigtx.track.client import choose_mode

    mode, reason, host = choose_mode("auto")
    if mode == "online":
        yield Check("W&B", "ok", f"{host} answers")
    else:
        yield Check("W&B", "warning", f"offline: {reason}; runs are written here, and can be sent later")


EXIT_UNFIT = 1
MOST_SHOWN = 16
"""Up to this number of machines, the speed of each is shown."""
GIGA = 1e9


def command(argv: Sequence[str]) -> int:
    """Check what training needs.

    Returns:
        1 where a check failed, else 0.

    Raises:
        LaunchError: the machines differ, or another launcher has started this process.
    """
    num_ranks, words = take_ranks(argv)
    arguments = _parser().parse_args(words)
    world = find_world(num_ranks, divides=1)
    if world is None:
        raise LaunchError(
            "bigtx doctor starts its own ranks, and another launcher has started this process as one; start it once on "
            "each machine: srun --ntasks-per-node=1 bigtx doctor"
        )
    if world.num_nodes == 1:
        checks = [asdict(check) for check in check_machine(Path(arguments.folder))]
        return _conclude(arguments, {0: {"host": hardware.host_name(), "checks": checks}}, [hardware.host_name()], {})
    try:
        status = start_ranks(world, Path(arguments.folder))
    except LaunchError as error:
        if error.broken_hosts:
            error.exit_status = EXIT_UNFIT
        if world.node == 0:
            _write_bad(arguments.output, error.broken_hosts)
        raise
    return _be_rank(arguments, world) if status is None else status


def _parser() -> Arguments:
    parser = Arguments(
        "doctor",
        "Check whether this machine can train. `srun --ntasks-per-node=1 bigtx doctor` also checks whether "
        "all machines of a job have the same code and packages and see the same folder, and measures their all-reduce.",
        epilog=wrapped(
            f"{RANKS} N starts N ranks on each machine (one for each GPU). The status is 1 where a check failed, and 2 "
            "where the machines differ."
        ),
    )
    parser.add_argument("folder", nargs="?", default=".", metavar="FOLDER", help="the folder for the runs (.)")
    parser.add_argument(
        "--output",
        metavar="FILE",
        help="write the names of slow or broken machines to this file, in the form of sbatch's --exclude; without such "
        "machines there is no file",
    )
    parser.add_argument(
        "--least-bandwidth",
        type=float,
        default=0.0,
        metavar="GB",
        help=f"a machine is slow below this speed, in GB/s (by default only below {SLOW_FRACTION} of the median)",
    )
    return parser


def _be_rank(arguments: Any, world: World) -> int:
    """Check and measure as a rank of one of several machines. The first rank prints the result."""
    from bigtx.engine.bandwidth import ROUND_SECONDS, Meeting

    is_first_of_machine = rank() % world.num_local == 0
    checks = check_machine(Path(arguments.folder), online=rank() == 0) if is_first_of_machine else []
    meeting, turns = Meeting(world.num_nodes, world.node), rounds(world.num_nodes)
    speeds = meeting.measure(turns)
    if is_first_of_machine:
        links = [[*pair, speed] for pair, speed in speeds.items()]
        meeting.report({"host": hardware.host_name(), "checks": [asdict(each) for each in checks], "links": links})
    if rank() > 0:
        return 0
    reports = meeting.reports(ROUND_SECONDS)
    names = dict(enumerate(world.hosts)) | {node: report["host"] for node, report in reports.items()}
    hosts = [names.get(node, f"node {node}") for node in range(world.num_nodes)]
    measured = {pair: _slower(pair, reports) for pairs in turns for pair in pairs}
    status = _conclude(arguments, reports, hosts, measured)
    log.report(said=True)
    return status


def _slower(pair: Pair, reports: Mapping[int, Mapping[str, Any]]) -> float:
    """Return the lower of the two speeds that a pair of machines reports for its link, or 0 without a report."""
    links = (link for node in pair if node in reports for link in reports[node]["links"])
    return min((speed for low, high, speed in links if (low, high) == pair), default=0.0)


def _conclude(
    arguments: Any, reports: Mapping[int, Mapping[str, Any]], hosts: Sequence[str], links: Mapping[Pair, float]
) -> int:
    """Print the result. Returns the exit status."""
    verdict = judge(links, arguments.least_bandwidth * GIGA) if links else Verdict((), (), (), 0.0)
    unfit = [node for node, report in reports.items() if any(each["status"] == "failed" for each in report["checks"])]
    silent = [node for node in range(len(hosts)) if node not in reports]
    bad = [hosts[node] for node in sorted({*verdict.bad, *unfit, *silent})]
    _write_bad(arguments.output, bad)
    machines = [{"host": report["host"], "checks": report["checks"]} for report in reports.values()]
    shown = [
        {"hosts": [hosts[low], hosts[high]], "gb_per_second": speed / GIGA} for (low, high), speed in links.items()
    ]
    facts = {"fit": not bad, "bad": bad, "machines": machines, "links": shown}
    lines = [*_lines_of_checks(reports, len(hosts) > 1), *_lines_of_links(hosts, links, verdict, silent)]
    say_result(arguments.json, lambda: facts, lambda: lines)
    return EXIT_UNFIT if bad else 0


def _lines_of_checks(reports: Mapping[int, Mapping[str, Any]], are_several: bool) -> list[str]:
    """Return a line for each check of the first machine, and for the checks of other machines that are not ok."""
    lines = []
    for node, report in reports.items():
        for check in report["checks"]:
            if node == 0 or check["status"] != "ok":
                host = f"{report['host']}: " if are_several else ""
                lines.append(f"{check['status']:<9}{host}{check['name']}: {check['text']}")
    return lines


def _lines_of_links(
    hosts: Sequence[str], links: Mapping[Pair, float], verdict: Verdict, silent: Sequence[int]
) -> list[str]:
    """Return lines about the speed of the machines' all-reduces."""
    if not links:
        return []
    speeds, bad = speeds_of(links), {*verdict.bad, *silent}
    shown = [f"{hosts[node]} {_gb(speed)}" for node, speed in speeds.items() if len(hosts) <= MOST_SHOWN or node in bad]
    each, others = f" ({', '.join(shown)})" if shown else "", min(MOST_ROUNDS, len(hosts) - 1)
    lines = [f"{'failed' if bad else 'ok':<9}all-reduce: median {_gb(verdict.median)}{each}"]
    for node in sorted({*verdict.silent, *silent}):
        lines.append(f"{'failed':<9}{hosts[node]} does not answer in all-reduces, tried with {others} others")
    for node in verdict.slow:
        speed = f"{_gb(speeds[node])} at best, tried with {others} others"
        lines.append(f"{'failed':<9}{hosts[node]} is slow: {speed}; the median is {_gb(verdict.median)}")
    if verdict.either:
        both = f"{hosts[0]} or {hosts[1]} is slow or broken: {_gb(links[0, 1])} between them"
        lines.append(f"{'failed':<9}{both}; only a third machine can show which")
    return lines


def _gb(speed: float) -> str:
    return f"{speed / GIGA:.3g} GB/s" if speed else "no answer"


def _write_bad(output: str | None, hosts: Sequence[str]) -> None:
    if output and hosts:
        write_atomic(output, ",".join(hosts) + "\n")
