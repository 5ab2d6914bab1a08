"""Save the state of an engine, in the format of checkpoint.py.

    training      copy ─▶ steps ─▶ steps ...
    each rank          └▶ thread: write and hash the copy, fsync ─▶ store
    rank 0                                                          └▶ thread: manifest, rename, fsync ─▶ prune

A checkpoint is written under another name, made durable, checked to be complete, then renamed. The parameters that the
run does not train are written once, before the first checkpoint. See retention.py for what is kept.

This module does not import deepspeed itself; it is given an engine.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from bigtx.engine.checkpoint import FOLDER, FORMAT_VERSION, FROZEN, read_manifest, step_folders, write_manifest
from bigtx.engine.fragments import num_bytes, pieces_of, ranges_of
from bigtx.engine.manifest import Range, table_of
from bigtx.engine.retention import Policy, begin_folder, free_space, prune, raise_first, set_aside, unwritten
from bigtx.utils.errors import CheckpointError
from bigtx.utils.files import fsync_dir, json_hash, publish
from bigtx.utils.log import say
from bigtx.utils.units import format_names, format_time

if TYPE_CHECKING:
    from bigtx.engine.engine import Engine, ReadRange
    from bigtx.engine.host_copy import HostCopy
    from bigtx.engine.ranks import Ranks
    from bigtx.engine.write_weights import Entry

POLL_SECONDS = 0.05
"""How often a waiting thread looks whether others have finished."""


def save_frozen(engine: Engine, ranks: Ranks, run_dir: Path, read: ReadRange) -> None:
    """Write the parameters that the engine does not train, from their source: an engine in 16 bits has them rounded.

    Every rank must call it before the run's first checkpoint; each writes its share.

    Args:
        engine: the engine of the run.
        ranks: all ranks of the run.
        run_dir: the run's folder.
        read: reads from the source that the engine was filled from.

    Raises:
        CheckpointError: on every rank, if one could not write.
    """
    from bigtx.engine.write_weights import PART_BYTES, description_of, parts_of, write_part

    assert not step_folders(run_dir), "existing checkpoints need the frozen weights that are there"
    final = run_dir / FROZEN
    partial = final.with_name(final.name + ".partial")
    shapes = {name: shape for name, shape in engine.shapes().items() if name in engine.frozen}
    share = -(-sum(4 * math.prod(shape) for shape in shapes.values()) // ranks.world_size)
    parts = parts_of("part", shapes, min(PART_BYTES, share))
    files, failure = {}, begin_folder(partial, [partial, final], run_dir, ranks)
    raise_first(ranks.gather(failure), partial, ranks)
    try:
        for file, part in list(parts.items())[ranks.rank :: ranks.world_size]:
            weights = (read(name, "master", 0, math.prod(shape)) for name, shape in part.items())
            files[file] = write_part(partial / file, part, weights)
    except OSError as error:
        failure = f"rank {ranks.rank} could not write {partial}: {error}"
    reports = ranks.gather((failure, files))
    raise_first([report[0] for report in reports], partial, ranks)
    if ranks.rank == 0:
        try:
            files = {file: entry for _, written in reports for file, entry in written.items()}
            write_manifest(partial, {"format": FORMAT_VERSION, **description_of(parts, files)})
            publish(partial, final)
        except OSError as error:
            failure = f"could not complete {final}: {error}"
    raise_first(ranks.gather(failure), partial, ranks)


@dataclass(frozen=True)
class Saved:
    """A checkpoint that is durable, and what it has cost.

    Attributes:
        path: its folder.
        wait_seconds: how long the training waited for the previous save.
        stall_seconds: how long the training stood still in all, that wait included.
        durable_seconds: from the beginning of the save until the checkpoint had its name.
        num_bytes: the size of its files.
    """

    path: Path
    wait_seconds: float
    stall_seconds: float
    durable_seconds: float
    num_bytes: int

    def metrics(self) -> dict[str, float]:
        """Return the metrics of the save."""
        return {
            "checkpoint/wait_seconds": self.wait_seconds,
            "checkpoint/stall_seconds": self.stall_seconds,
            "checkpoint/durable_seconds": self.durable_seconds,
            "checkpoint/gib": self.num_bytes / 2**30,
        }


@dataclass
class _Save:
    """A save in progress, as one rank sees it.

    Attributes:
        name: the same on all ranks, and different for each save of this start of the run.
        final, partial: the checkpoint's folder, and its name until it is complete.
        manifest: its content before the files are known; empty on ranks other than 0.
        ranges: what this rank writes.
        trained: the parameters that a checkpoint must have.
        is_skipping: whether the step was skipped.
        began: when the save began, by the monotonic clock.
        written: the bytes that this rank has written.
        failure: why there is no checkpoint, in words, once this rank knows it.
        has_reported: whether this rank has reported what it wrote.
        is_given_up: whether the report of another rank will not arrive.
    """

    name: str
    final: Path
    partial: Path
    manifest: dict[str, Any]
    ranges: list[Range]
    trained: set[str]
    is_skipping: bool
    began: float
    wait_seconds: float = 0.0
    stall_seconds: float = 0.0
    written: int = 0
    failure: str | None = None
    has_reported: bool = False
    is_given_up: bool = False

    def note(self, num_bytes: int) -> None:
        """Count bytes that were written."""
        self.written += num_bytes


class Saver:
    """A writer of the checkpoints of a run: one at a time, in a thread of each rank, while the training continues.

    `save` copies what this rank owns into host memory and returns. The thread writes and hashes the copy. Threads do
    not use the engine, whose optimizer has other parameter groups during a step, and make no collective calls: each
    leaves its result in the store of rank 0, whose thread completes the checkpoint.
    """

    def __init__(
        self,
        engine: Engine,
        ranks: Ranks,
        run_dir: Path,
        policy: Policy,
        *,
        in_background: bool = True,
        when_saved: Callable[[Path], None] = lambda path: None,
    ) -> None:
        """Args:
        engine: the engine to save.
        ranks: all ranks of the run.
        run_dir: the run's folder.
        policy: which checkpoints are kept.
        in_background: whether to copy and return; otherwise `save` writes from the weights and waits.
        when_saved: called on rank 0 with each checkpoint's folder, once it is durable, in the thread.
        """
        self.engine, self.ranks, self.run_dir, self.policy = engine, ranks, run_dir, policy
        self.in_background, self.when_saved = in_background, when_saved
        self._copy: HostCopy | None = None
        self._num_saves, self._was_left_out = 0, False
        self._thread: threading.Thread | None = None
        self._current: _Save | None = None
        self._saved: deque[Saved] = deque()

    @property
    def has_failed(self) -> bool:
        """Return whether this rank knows that the save in progress has failed. Then all ranks must call `wait`."""
        return self._current is not None and self._current.failure is not None

    def save(self, facts: dict[str, Any], *, is_skipping: bool = False, may_wait: bool = False) -> None:
        """Begin to write a checkpoint. Every rank must call it.

        The weights and states may change only after `Optimizer.wait_for_copy`, which each update calls.

        Args:
            facts: further content of the manifest: at least `step`, and `suspect` for a suspect checkpoint.
            is_skipping: whether this step was skipped; then no good checkpoint is deleted.
            may_wait: whether a checkpoint for which the disk has no space may be left out, with a warning; not if the
                previous one was left out too.

        Raises:
            CheckpointError: on every rank, if the previous one could not be written, or this one cannot be begun; older
                checkpoints are untouched.
        """
        began = time.monotonic()
        self.wait()
        waited = time.monotonic() - began
        final = self.run_dir / FOLDER / f"step-{facts['step']:08d}"
        self._num_saves += 1
        save = _Save(
            name=f"checkpoint-{self._num_saves}",
            final=final,
            partial=final.with_name(final.name + ".partial"),
            manifest={},
            ranges=ranges_of(self.engine.owned, self.engine.optimizer.state_kinds),
            trained=set(self.engine.shapes()) - set(self.engine.frozen),
            is_skipping=is_skipping,
            began=began,
            wait_seconds=waited,
        )
        leftovers = [*(self.run_dir / FOLDER).glob("step-*.partial")]
        failure = self.ranks.from_first(begin_folder(save.partial, leftovers, self.run_dir, self.ranks))
        raise_first([failure], save.partial, self.ranks)
        if not self._has_space(save, facts, may_wait=may_wait):
            return
        if self.ranks.rank == 0:
            save.manifest = {"format": FORMAT_VERSION, **facts, **_facts_of_engine(self.engine, self.run_dir)}
        content = self._content()
        save.stall_seconds = time.monotonic() - began
        self._current = save
        self._thread = threading.Thread(target=self._write, args=(save, *content), name="checkpoint", daemon=True)
        self._thread.start()
        if not self.in_background:
            self.wait()

    def wait(self) -> None:
        """Wait until the save in progress, if any, is durable. Every rank must call it.

        Raises:
            CheckpointError: on every rank, if one could not write, or if none has written anything for
                `engine.timeout`; older checkpoints are untouched.
        """
        save, thread = self._current, self._thread
        if thread is None or save is None:
            return
        last, since, is_late = -1, time.monotonic(), False
        # A collective call in each turn notices a rank that was lost.
        while True:
            facts = [thread.is_alive(), save.failure is not None, save.written, is_late]
            num_alive, num_failed, written, is_too_late = self.ranks.sum(facts)
            if not num_alive:
                break
            if is_too_late:
                raise unwritten(self._hanging(save))
            save.is_given_up = num_failed > 0
            if written != last:
                last, since = written, time.monotonic()
            # The clock of one rank decides for all.
            is_late = self.ranks.rank == 0 and time.monotonic() - since > self.ranks.timeout_seconds
            thread.join(POLL_SECONDS)
        self._thread = None
        # Rank 0 fails for the others' sake, too: their own words say more.
        failure = next((failure for failure in reversed(self.ranks.gather(save.failure)) if failure), None)
        if failure:
            raise unwritten(failure)

    def _hanging(self, save: _Save) -> str:
        """Return which ranks have not ended their part of a save, in words. The last part is that of rank 0."""
        late = [rank for rank, has_reported in enumerate(self.ranks.gather(save.has_reported)) if not has_reported]
        return (
            f"nothing was written to {save.partial} within {format_time(self.ranks.timeout_seconds)} (engine.timeout), "
            f"and {format_names(self.ranks.describe(late or [0]))} did not finish; find out whether the disk answers"
        )

    def take_saved(self) -> Saved | None:
        """Return, once and on rank 0 only, the next checkpoint that has become durable."""
        return self._saved.popleft() if self._saved else None

    def _has_space(self, save: _Save, facts: dict[str, Any], *, may_wait: bool) -> bool:
        """Free the space for the checkpoint; return False if there is too little and the checkpoint is left out.

        Raises:
            CheckpointError: on every rank, if there is too little and the checkpoint must not be left out.
        """
        (needed,) = self.ranks.sum([num_bytes(self.engine.owned, self.engine.optimizer.state_kinds)])
        problem, best = None, facts.get("state", {}).get("best_step")
        if self.ranks.rank == 0:
            problem = free_space(self.run_dir, needed, self.policy, best=best, is_skipping=save.is_skipping)
        problem = self.ranks.from_first(problem)
        is_left_out, self._was_left_out = may_wait and problem is not None and not self._was_left_out, bool(problem)
        if is_left_out:
            if self.ranks.rank == 0:
                shutil.rmtree(save.partial, ignore_errors=True)
            say(
                f"warning: the checkpoint of step {facts['step']} was not written: {problem}; the run continues, and "
                "ends if there is no space for the next one either"
            )
        else:
            raise_first([problem], save.partial, self.ranks)
        return not is_left_out

    def _content(self) -> tuple[list[Entry], Iterable[Tensor]]:
        """Return the names, shapes and types of this rank's tensors, and their content in pieces."""
        pieces = pieces_of(self.engine.owned, self.engine.optimizer)
        entries = [(name, tuple(piece.shape), piece.dtype) for name, piece in pieces.items()]
        if not self.in_background:
            return entries, pieces.values()
        if self._copy is None:
            from bigtx.engine.host_copy import HostCopy

            self._copy = HostCopy()
        return entries, self._copy.take(list(pieces.values()), self.engine.optimizer)

    def _write(self, save: _Save, entries: list[Entry], content: Iterable[Tensor]) -> None:
        """Write this rank's file, and on rank 0 complete the checkpoint. This runs in the thread."""
        rank = self.ranks.rank
        file, failure, entry = f"rank-{rank:05d}.safetensors", None, None
        try:
            from bigtx.engine.write_weights import write_file

            entry = write_file(save.partial / file, entries, content, save.note) if entries else None
        except Exception as error:
            failure = f"rank {rank} could not write {save.partial / file}: {_said(error)}"
        try:
            self.ranks.post(save.name, [failure, file, entry, save.ranges])
            save.has_reported = True
            if rank == 0:
                self._complete(save)
        except Exception as error:
            save.failure = f"rank {rank} could not complete {save.final}: {_said(error)}"
        if rank == 0 and save.failure:
            shutil.rmtree(save.partial, ignore_errors=True)

    def _complete(self, save: _Save) -> None:
        """Write the manifest once all files are written, give the checkpoint its name, and delete older ones.

        Raises:
            OSError, CheckpointError: it cannot be completed.
        """
        while (reports := self.ranks.posted(save.name)) is None:
            if save.is_given_up:
                raise CheckpointError("the report of another rank is missing")
            time.sleep(POLL_SECONDS)
        save.failure = next((report[0] for report in reports if report[0]), None)
        if save.failure:
            return
        files = {file: entry for _, file, entry, _ in reports if entry}
        parameters, ranges = table_of({file: own for _, file, entry, own in reports if entry}, save.trained)
        facts = {"world_size": self.ranks.world_size, "parameters": parameters, "files": files, "ranges": ranges}
        manifest = save.manifest | facts
        write_manifest(save.partial, manifest)
        fsync_dir(save.partial)
        set_aside(self.run_dir, from_step=manifest["step"])
        os.rename(save.partial, save.final)
        fsync_dir(save.final.parent)
        save.note(1)  # Old checkpoints may take long to delete.
        seconds = time.monotonic() - save.began
        num_bytes = sum(entry["size"] for entry in files.values())
        stalled = save.stall_seconds if self.in_background else seconds
        self._saved.append(Saved(save.final, save.wait_seconds, stalled, seconds, num_bytes))
        self.when_saved(save.final)
        best = manifest.get("state", {}).get("best_step")
        prune(self.run_dir, self.policy, best=best, is_skipping=save.is_skipping)


def _facts_of_engine(engine: Engine, run_dir: Path) -> dict[str, Any]:
    """Return the state of the engine besides its tensors, and what a reader needs for the whole model: the hash of the
    frozen weights, and the factor of adapters."""
    facts: dict[str, Any] = {
        "zero_stage": engine.stage,
        "precision": engine.config.engine.precision,
        "loss_scale": engine.loss_scale(),
        "expert_counts": None if engine.expert_counts is None else engine.expert_counts.tolist(),
        "num_updates": engine.optimizer.num_updates,
    }
    if engine.frozen:
        facts["frozen_sha256"] = json_hash(read_manifest(run_dir / FROZEN))
    lora = engine.config.model.lora
    if lora.rank:
        facts["adapter_scale"] = lora.alpha / lora.rank
    return facts


def _said(error: Exception) -> str:
    """Return an error in words; one that is not of the disk is logged with its traceback."""
    if isinstance(error, OSError | CheckpointError):
        return str(error)
    logging.getLogger(__name__).error("a checkpoint was not written", exc_info=error)
    return f"{type(error).__name__}: {error}"
