"""Warnings at log steps about what will slow or end a run: a slow rank, a full disk, memory that runs out.

Each rank reports a few numbers, which are gathered at log steps only. Rank 0 prints each warning once, and again when
it has become clearly worse.
"""

from __future__ import annotations

import contextlib
import shutil
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median_low
from typing import TYPE_CHECKING, Any

import torch

from bigtx.config.runs import CHECKPOINTS
from bigtx.engine.fragments import num_bytes
from bigtx.utils import hardware
from bigtx.utils.heartbeat import Phase, own_heart
from bigtx.utils.units import format_size

if TYPE_CHECKING:
    from bigtx.engine.engine import Engine
    from bigtx.engine.ranks import Ranks
    from bigtx.track.tracker import Tracker

SLOW_RATIO = 1.5
"""A rank is slow if its own time is this many times the median."""
LEAST_SHARE = 0.05
"""Less than this share of the step's time does not count as a delay."""
LEAST_WINDOWS, LEAST_SECONDS = 3, 2.0
"""A warning needs so many log lines in a row, and so much lost time."""
LEAST_CHECKPOINTS = 2
LEAST_HOST_SHARE = 0.05
MOST_DEVICE_SHARE = 0.95
GROWTH_WINDOWS, GROWTH_SHARE, GROWTH_BYTES = 20, 1.2, 2**30
"""Memory grows steadily if none of so many log lines shows less than the previous one, and the last one shows so many
times the first, and so many bytes more."""
CLEARLY_WORSE = 2.0


@dataclass(frozen=True)
class Report:
    """What a rank knows about itself.

    Attributes:
        host: its machine.
        data: seconds per step in which it waited for data.
        compute: seconds per step of its forward passes, where no rank waits for another, except under ZeRO-3.
        anonymous: bytes of its own memory on the host, without files.
        host_free, host_total: bytes of memory of its machine or container.
        device_peak, device_total: bytes of memory of its GPU; 0 without one.
        retries: how often the GPU's memory had to be collected for an allocation.
        checkpoint: bytes that it writes to a checkpoint.
    """

    host: str
    data: float
    compute: float
    anonymous: int = 0
    host_free: int = 1
    host_total: int = 1
    device_peak: int = 0
    device_total: int = 0
    retries: int = 0
    checkpoint: int = 0


@dataclass(frozen=True)
class Notice:
    """A warning for the user.

    Attributes:
        kind: its kind in events.jsonl.
        subject: what it is about; each subject is reported once.
        badness: a number that rises as it gets worse.
        text: the message.
        facts: further fields of the event.
    """

    kind: str
    subject: str
    badness: float
    text: str
    facts: dict[str, Any]


class Stragglers:
    """The rank that the others wait for, over several log lines."""

    def __init__(self) -> None:
        self._rank, self._windows, self._lost = -1, 0, 0.0

    def note(self, reports: Sequence[Report], steps: int, step_seconds: float) -> tuple[dict[str, float], list[Notice]]:
        """Note the reports of one log line. Returns metrics and warnings.

        Args:
            reports: those of all ranks.
            steps: steps since the previous line.
            step_seconds: the mean time of a step.
        """
        if len(reports) < 2:
            return {}, []
        own = [report.data + report.compute for report in reports]
        usual, rank = max(median_low(own), 1e-9), max(range(len(own)), key=lambda each: own[each])
        ratio, excess = own[rank] / usual, own[rank] - usual
        metrics = {"perf/slowest_rank": float(rank), "perf/straggler_ratio": ratio}
        if ratio <= SLOW_RATIO or excess < LEAST_SHARE * step_seconds:
            self._rank, self._windows, self._lost = -1, 0, 0.0
            return metrics, []
        if rank != self._rank:
            self._rank, self._windows, self._lost = rank, 0, 0.0
        self._windows, self._lost = self._windows + 1, self._lost + excess * steps
        if self._windows < LEAST_WINDOWS or self._lost < LEAST_SECONDS:
            return metrics, []
        slow = reports[rank]
        waits = slow.data - median_low(report.data for report in reports)
        where = "waiting for data" if waits > excess / 2 else "computing"
        text = (
            f"rank {rank} on {slow.host} is slow: it needs {ratio:.1f} times the median for its own part of a step, "
            f"{where} ({own[rank]:.3g} s instead of {usual:.3g} s), and all other ranks wait for it"
        )
        facts = {"rank": rank, "host": slow.host, "ratio": round(ratio, 3), "where": where}
        return metrics, [Notice("slow_rank", f"slow rank {rank}", ratio, text, facts)]


class Growth:
    """The memory of each rank on its host, over several log lines."""

    def __init__(self) -> None:
        self._history: dict[int, deque[tuple[int, int]]] = {}

    def note(self, reports: Sequence[Report], step: int) -> list[Notice]:
        """Note the reports of one log line. Returns a warning for each rank whose memory grows steadily."""
        found = []
        for rank, report in enumerate(reports):
            history = self._history.setdefault(rank, deque(maxlen=GROWTH_WINDOWS))
            if history and report.anonymous < history[-1][1]:
                history.clear()
            history.append((step, report.anonymous))
            (first_step, first), grown = history[0], report.anonymous - history[0][1]
            if len(history) < GROWTH_WINDOWS or grown < max(GROWTH_BYTES, (GROWTH_SHARE - 1) * first):
                continue
            rate = grown / max(1, step - first_step)
            text = (
                f"the memory of rank {rank} on {report.host} grows: from {format_size(first)} to "
                f"{format_size(report.anonymous)} in {step - first_step:,} steps; at this rate the free "
                f"{format_size(report.host_free)} of the machine last for about {report.host_free / rate:,.0f} steps"
            )
            facts = {"rank": rank, "host": report.host, "bytes": report.anonymous, "bytes_per_step": round(rate)}
            found.append(Notice("memory_growth", f"growth {rank}", report.anonymous, text, facts))
        return found


def memory_warnings(reports: Sequence[Report]) -> list[Notice]:
    """Return a warning for each host and each GPU whose memory is nearly full."""
    found = []
    for host, report in {report.host: report for report in reports}.items():
        if report.host_free < LEAST_HOST_SHARE * report.host_total:
            largest = max((each.anonymous, number) for number, each in enumerate(reports) if each.host == host)
            text = (
                f"the memory of {host} is nearly full: {format_size(report.host_free)} of "
                f"{format_size(report.host_total)} are free; its largest rank is {largest[1]} with "
                f"{format_size(largest[0])}"
            )
            facts = {"host": host, "free_bytes": report.host_free}
            found.append(
                Notice("low_memory", f"memory {host}", report.host_total / max(1, report.host_free), text, facts)
            )
    for rank, report in enumerate(reports):
        is_near = report.device_peak > MOST_DEVICE_SHARE * report.device_total
        if report.device_total and (is_near or report.retries):
            text = (
                f"the GPU of rank {rank} on {report.host} is nearly out of memory: at most "
                f"{format_size(report.device_peak)} of {format_size(report.device_total)} were in use, and "
                f"{report.retries} allocations had to collect free memory first, which is slow; a smaller "
                "train.micro_batch_size or engine.activation_checkpointing=selective needs less"
            )
            facts = {"rank": rank, "host": report.host, "peak_bytes": report.device_peak, "retries": report.retries}
            found.append(Notice("low_device_memory", f"device {rank}", 1.0 + report.retries, text, facts))
    return found


def disk_warnings(folder: Path, free: int, checkpoint: int) -> list[Notice]:
    """Return a warning if the disk has space for few more checkpoints.

    Args:
        folder: the folder of the checkpoints.
        free: free bytes of its disk.
        checkpoint: bytes of a checkpoint.
    """
    fits = free // max(1, checkpoint)
    if fits >= LEAST_CHECKPOINTS:
        return []
    more = "no more checkpoint" if fits == 0 else "1 more checkpoint"
    text = (
        f"the disk of {folder} is nearly full: {format_size(free)} are free, and {more} of {format_size(checkpoint)} "
        "fits; an old checkpoint is deleted only after the next one is complete"
    )
    facts = {"free_bytes": free, "checkpoint_bytes": checkpoint, "fits": fits}
    return [Notice("low_disk", "disk", checkpoint / max(1, free), text, facts)]


class Health:
    """The warnings of a run."""

    def __init__(self, ranks: Ranks, engine: Engine, run_dir: Path) -> None:
        self._ranks, self._engine, self._run_dir = ranks, engine, run_dir
        self._stragglers, self._growth = Stragglers(), Growth()
        self._reported: dict[str, float] = {}
        self._before = (0.0, 0.0, 0)
        self._checkpoint = num_bytes(engine.owned, engine.optimizer.state_kinds)

    def look(self, step: int, step_seconds: float, tracker: Tracker) -> dict[str, float]:
        """Gather the reports of all ranks, print new warnings, and return metrics. Every rank must call it.

        Args:
            step: optimizer steps done.
            step_seconds: the mean time of a step since the previous log line.
            tracker: where warnings go.
        """
        own, steps = self._own_report()
        reports = self._ranks.gather(own)
        if self._ranks.rank != 0:
            return {}
        metrics, warnings = self._stragglers.note(reports, steps, step_seconds)
        folder = self._run_dir / CHECKPOINTS
        with contextlib.suppress(OSError):
            free = shutil.disk_usage(folder if folder.is_dir() else self._run_dir).free
            metrics["perf/disk_free_gib"] = free / 2**30
            warnings += disk_warnings(folder, free, sum(report.checkpoint for report in reports))
        metrics["perf/host_free_gib"] = own.host_free / 2**30
        for warning in [*warnings, *memory_warnings(reports), *self._growth.note(reports, step)]:
            if warning.badness >= CLEARLY_WORSE * self._reported.get(warning.subject, 0.0):
                self._reported[warning.subject] = warning.badness
                tracker.message(f"warning: {warning.text}")
                tracker.event(step, warning.kind, **warning.facts)
        return metrics

    def _own_report(self) -> tuple[Report, int]:
        """Return this rank's report, and the steps since the previous one."""
        heart = own_heart()
        now = (heart.seconds[Phase.DATA], heart.seconds[Phase.FORWARD], heart.entries[Phase.LOGGING])
        (data, forward, steps), self._before = (new - old for new, old in zip(now, self._before, strict=True)), now
        steps = max(1, round(steps))
        on_device = self._engine.forward_seconds()
        peak, total, retries = device_memory()
        report = Report(
            host=hardware.host_name(),
            data=data / steps,
            compute=forward / steps if on_device is None else on_device,
            anonymous=hardware.anonymous_bytes(),
            host_free=hardware.free_memory_bytes(),
            host_total=hardware.memory_bytes(),
            device_peak=peak,
            device_total=total,
            retries=retries,
            checkpoint=self._checkpoint,
        )
        return report, steps


def device_memory() -> tuple[int, int, int]:
    """Return the peak and total bytes of this rank's GPU, and how often an allocation had to collect memory first."""
    if not torch.cuda.is_available():
        return 0, 0, 0
    retries = torch.cuda.memory_stats().get("num_alloc_retries", 0)
    return torch.cuda.max_memory_allocated(), torch.cuda.mem_get_info()[1], retries
