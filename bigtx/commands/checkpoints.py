"""`bigtx checkpoints`: show the checkpoints of a run, check their hashes, and delete those that are not needed."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bigtx.config.load import load_run_config
from bigtx.config.runs import run_dir_of
from bigtx.engine.checkpoint import FOLDER, MANIFEST, Checkpoint, is_suspect, read_manifest, step_folders, step_of
from bigtx.engine.retention import Policy, delete, read_good_and_suspect
from bigtx.utils.arguments import Arguments
from bigtx.utils.errors import BigtxError, CheckpointError, ConfigError, LaunchError
from bigtx.utils.locks import FolderLock
from bigtx.utils.log import say_result
from bigtx.utils.units import format_count, format_size, format_time

EXIT_SOME_DAMAGED = 1
DAMAGED = ".damaged"


@dataclass(frozen=True)
class Row:
    """A checkpoint as the command shows it.

    Attributes:
        tokens: the tokens of the run so far; None if it does not say.
        age_seconds: since it was written.
        size_bytes: of its own files; those of frozen weights are not its own.
        zero_stage, ranks: of the run that wrote it; None for one that was imported.
        is_best: whether the run's measurement says so.
        is_permanent: whether `train.keep_every` keeps it.
        is_suspect: whether it was written while steps were being skipped.
        is_set_aside: whether it was damaged, and the run has renamed it, so that nothing reads it.
        problems: why it cannot be used; without `--verify` only what names, sizes and the manifest show.
    """

    name: str
    step: int | None = None
    tokens: int | None = None
    age_seconds: float = 0.0
    size_bytes: int = 0
    zero_stage: int | None = None
    ranks: int | None = None
    is_best: bool = False
    is_permanent: bool = False
    is_suspect: bool = False
    is_set_aside: bool = False
    problems: tuple[str, ...] = ()

    def line(self) -> str:
        """Return the row of the table."""
        marks = {
            "best": self.is_best,
            "permanent": self.is_permanent,
            "suspect": self.is_suspect,
            "set aside": self.is_set_aside,
            "DAMAGED": bool(self.problems),
        }
        words = [name for name, is_set in marks.items() if is_set]
        tokens = "" if self.tokens is None else format_count(self.tokens)
        stage, ranks = ("" if value is None else str(value) for value in (self.zero_stage, self.ranks))
        size, age = format_size(self.size_bytes), format_time(self.age_seconds)
        return f"{self.name:<22}{tokens:>8}{age:>10}{size:>12}{stage:>6}{ranks:>7}  {', '.join(words)}".rstrip()


HEADING = f"{'checkpoint':<22}{'tokens':>8}{'age':>10}{'size':>12}{'ZeRO':>6}{'ranks':>7}"


def command(argv: Sequence[str]) -> int:
    """Show, check or prune the checkpoints of a run.

    Raises:
        BigtxError: it is not a run, or another process uses it.
    """
    parser = Arguments(
        "checkpoints", "Show the checkpoints of a run, newest first; check their hashes; delete those not needed."
    )
    parser.add_argument("run", metavar="RUN", help="the run's folder")
    parser.add_argument("--verify", action="store_true", help="read all files and compare them with their hashes")
    parser.add_argument(
        "--prune",
        metavar="N",
        type=int,
        help="delete all but the newest N good ones, the best, the permanent ones (train.keep_every) and damaged ones",
    )
    options = parser.parse_args(argv)
    run_dir, config = Path(options.run), load_run_config(options.run)
    if run_dir_of(run_dir) != run_dir.resolve():
        raise ConfigError(f"{run_dir} is a checkpoint; name its run: {run_dir_of(run_dir)}")
    every = config.train.keep_every
    deleted: list[str] = []
    if options.prune is not None:
        if options.prune < 1:
            raise ConfigError(f"prune={options.prune}: the newest checkpoint is always kept; write prune=1 or more")
        deleted = _prune(run_dir, Policy(options.prune, every))
    rows = list(_rows(run_dir, Policy(1, every), verify=options.verify))
    facts = {"run": str(run_dir.absolute()), "deleted": deleted, "checkpoints": [asdict(row) for row in rows]}
    say_result(options.json, lambda: facts, lambda: _lines(run_dir, rows, deleted, verified=options.verify))
    return EXIT_SOME_DAMAGED if any(row.problems for row in rows) else 0


def _prune(run_dir: Path, policy: Policy) -> list[str]:
    """Delete the checkpoints that a policy does not need, and return their names.

    Raises:
        LaunchError: another process uses the run, or a folder cannot be deleted.
    """
    try:
        with FolderLock(run_dir):
            good, _ = read_good_and_suspect(run_dir)
            needless = policy.needless(run_dir, best=_best_step(good))
            for path in needless:
                delete(path, run_dir)
    except OSError as error:
        raise LaunchError(f"the checkpoints of {run_dir} cannot be deleted: {error}") from error
    return [path.name for path in needless]


def _best_step(good: Mapping[Path, dict[str, Any]]) -> int | None:
    """Return the step of the best checkpoint, as the newest good one knows it."""
    newest = next(iter(good.values()), {})
    step: int | None = newest.get("state", {}).get("best_step")
    return step


def _rows(run_dir: Path, policy: Policy, *, verify: bool) -> Iterator[Row]:
    good, _ = read_good_and_suspect(run_dir)
    permanent, best = policy.permanent(good), _best_step(good)
    for path in step_folders(run_dir):
        try:
            manifest = read_manifest(path)
        except CheckpointError as error:
            yield Row(path.name, step_of(path), problems=(str(error),))
            continue
        yield Row(
            name=path.name,
            step=manifest["step"],
            tokens=manifest.get("state", {}).get("tokens"),
            age_seconds=max(0.0, time.time() - (path / MANIFEST).stat().st_mtime),
            size_bytes=sum(entry["size"] for entry in manifest["files"].values()),
            zero_stage=manifest.get("zero_stage"),
            ranks=manifest.get("world_size"),
            is_best=step_of(path) == best,
            is_permanent=path in permanent,
            is_suspect=is_suspect(manifest),
            problems=_problems(path, verify=verify),
        )
    for path in sorted((run_dir / FOLDER).glob(f"step-*{DAMAGED}"), reverse=True):
        size = sum(file.stat().st_size for file in path.iterdir())
        yield Row(path.name, size_bytes=size, is_set_aside=True)


def _problems(path: Path, *, verify: bool) -> tuple[str, ...]:
    try:
        opened = Checkpoint(path)
    except BigtxError as error:
        return (str(error),)
    return tuple(f"{path}: {problem}" for problem in opened.verify()) if verify else ()


def _lines(run_dir: Path, rows: Sequence[Row], deleted: Sequence[str], *, verified: bool) -> Iterator[str]:
    yield from (f"deleted {name}" for name in deleted)
    if not rows:
        yield f"{run_dir} has no checkpoint"
        return
    yield HEADING
    yield from (row.line() for row in rows)
    yield from (problem for row in rows for problem in row.problems)
    if verified and not any(row.problems for row in rows):
        yield "all files have the hashes of their manifests"
