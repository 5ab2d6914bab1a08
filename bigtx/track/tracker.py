"""Record what happens in the training loop."""

from __future__ import annotations

import os
import textwrap
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TextIO

from bigtx.config.schema import TrackConfig
from bigtx.config.schema.tasks import Better
from bigtx.track.console import Console, open_nowhere, shorten
from bigtx.track.jsonl import MODEL_EVENT, JsonLines
from bigtx.track.wandb_run import WandbRun, read_or_make_run_id
from bigtx.utils.secrets import scrub

"""Which of two values of a metric is better."""
_SHOWN_SAMPLE_LENGTH = 600


class Tracker:
    """The record of a run's metrics, samples and events in its folder, in W&B and on the console.

    Only rank 0 writes; on the other ranks the calls have no effect. Use it from one thread.

    Attributes:
        wandb_run_id: the W&B run's id, "" where W&B is off.
    """

    def __init__(
        self,
        run_dir: Path | str,
        config: TrackConfig,
        *,
        run_config: Mapping[str, Any],
        environment: Mapping[str, Any],
        rank: int,
        total_steps: int,
        better: Mapping[str, Better],
        resumed_step: int = 0,
        name: str = "",
        job_type: str = "pretrain",
        base: Mapping[str, Any] | None = None,
        stream: TextIO | None = None,
    ) -> None:
        """Open the run's files, remove steps that will be repeated, and start W&B in the background.

        Args:
            run_dir: the run folder; it exists.
            config: the settings of tracking.
            run_config: the resolved config, for W&B.
            environment: versions, commit, hardware, for W&B under the key `environment`.
            rank: this process's rank.
            total_steps: optimizer steps of the whole run, 0 if unknown.
            better: which values are better, by the metric's name without its group. W&B's summary keeps the best value
                of metrics that have one.
            resumed_step: the step whose checkpoint was loaded; 0 starts at the beginning, and removes the records of
                earlier starts.
            name: W&B's display name; "" stands for the run folder's name.
            job_type: W&B's job type.
            base: the source of the weights: `checkpoint` (its folder), `manifest_sha256`, `step` and `wandb_run_id`
                ("" for none) of a run; W&B links the two runs.
            stream: the stream of the console lines, `bigtx.utils.log.console()` in a run; None discards them.

        Raises:
            LaunchError: The run folder cannot be written.
        """
        self.wandb_run_id = ""
        self._wandb: WandbRun | None = None
        self._is_writer = rank == 0
        if not self._is_writer:
            return
        folder = Path(run_dir).resolve()
        self._console = Console(stream or open_nowhere(), total_steps=total_steps)
        self._has_warned = False
        up_to_step = resumed_step or -1
        self._metrics = JsonLines(folder / "metrics.jsonl", warn=self._warn, up_to_step=up_to_step)
        self._samples = JsonLines(folder / "samples.jsonl", warn=self._warn, up_to_step=up_to_step)
        self._predictions = JsonLines(folder / "predictions.jsonl", warn=self._warn, up_to_step=up_to_step)
        self._events = JsonLines(folder / "events.jsonl", warn=self._warn)
        self._step = resumed_step
        if config.wandb != "off" and os.environ.get("WANDB_MODE") != "disabled":
            named = {"name": name or folder.name, "job_type": job_type}
            about = {**run_config, "environment": dict(environment)}
            self._start_wandb(folder, config, named, about, resumed_step=resumed_step, better=better, base=base)

    def _start_wandb(
        self,
        folder: Path,
        config: TrackConfig,
        named: Mapping[str, str],
        about: Mapping[str, Any],
        *,
        resumed_step: int,
        better: Mapping[str, Better],
        base: Mapping[str, Any] | None,
    ) -> None:
        """Start the process that copies the records to W&B.

        Args:
            named: the display name and the job type.
            about: the config of the run in W&B.
            resumed_step, better, base: see `__init__`.
        """
        own = read_or_make_run_id(folder)
        self.wandb_run_id = own.id
        if own.original:
            original = {"checkpoint": own.original_folder, "manifest_sha256": "", "step": resumed_step}
            base = base or original | {"wandb_run_id": own.original}
            about = {**about, "copied_from": {"wandb_run_id": own.original, "folder": own.original_folder}}
            self._note("wandb_copy", original=own.original, folder=own.original_folder)
            self._console.message(
                f"W&B: this folder is a copy of {own.original_folder}, whose run there is {own.original}; the copy is "
                f"the run {own.id}"
            )
        init = {
            "id": self.wandb_run_id,
            "dir": str(folder),
            "project": config.project,
            "entity": config.entity,
            "group": config.group,
            "tags": list(config.tags),
            **named,
            "config": scrub({**about} | ({"base_run": base} if base else {})),
        }
        task = {
            "mode": config.wandb,
            "resumed_step": resumed_step,
            "init": init,
            "base": scrub(base or {}),
            "better": dict(better),
        }
        self._wandb = WandbRun(folder, task, show=self._console.message, note=self._note)

    @property
    def wandb_mode(self) -> str:
        """Return W&B's mode: "online", "offline", "" until it is known (a few seconds), or "off"."""
        return self._wandb.mode if self._wandb else "off"

    def log(self, step: int, tokens: int, metrics: Mapping[str, float]) -> None:
        """Write metrics of a step to metrics.jsonl, from which they are copied to W&B.

        Several calls for the same step write one line.

        Args:
            step: optimizer steps done.
            tokens: input tokens seen by all ranks; W&B's x axis.
            metrics: values by name, `group/name`.
        """
        if not self._is_writer:
            return
        self._step = step
        self._metrics.merge({"step": step, "tokens": tokens, "time": _now(), **metrics})
        self._poll()

    def samples(self, step: int, tokens: int, rows: Sequence[Mapping[str, str]]) -> None:
        """Show samples and write them to samples.jsonl and to W&B's table `validation/samples`.

        Args:
            step: optimizer steps done; one call a step.
            tokens: input tokens seen by all ranks.
            rows: samples, each with a `prompt` and its `completion`.
        """
        if not self._is_writer or not rows:
            return
        self._console.message(f"samples at step {step} ({shorten(tokens)} tokens)")
        for row in rows:
            self._console.message(_shown_sample(row["prompt"], row["completion"]))
        stamp = {"step": step, "tokens": tokens, "time": _now()}
        self._samples.extend([{**stamp, **row} for row in rows])
        self._poll()

    def predictions(self, step: int, tokens: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write predictions for records to predictions.jsonl and to W&B's table `validation/predictions`.

        Args:
            step: optimizer steps done; one call a step.
            tokens: input tokens seen by all ranks.
            rows: predictions, each with the record's `input`, its `answer` and the prediction.
        """
        if not self._is_writer or not rows:
            return
        stamp = {"step": step, "tokens": tokens, "time": _now()}
        self._predictions.extend([{**stamp, **row} for row in rows])
        self._poll()

    def event(self, step: int, kind: str, **facts: Any) -> None:
        """Record an event (a resume, a skipped step, a changed setting, a signal) in events.jsonl.

        W&B's summary counts the events of each kind.

        Args:
            step: optimizer steps done.
            kind: the kind of event.
            **facts: further fields of the record.
        """
        if not self._is_writer:
            return
        self._step = step
        self._note(kind, **facts)
        self._poll()

    def model(self, step: int, checkpoint: Path, manifest_sha256: str) -> None:
        """Record the checkpoint that other runs may use. W&B keeps a reference to it as the run's model artifact.

        Args:
            step: the step of the checkpoint.
            checkpoint: its folder.
            manifest_sha256: the hash of its manifest.
        """
        self.event(step, MODEL_EVENT, checkpoint=str(Path(checkpoint).absolute()), manifest_sha256=manifest_sha256)

    def message(self, text: str) -> None:
        """Print a line for the user, above the progress bar."""
        if self._is_writer:
            self._console.message(text)

    def begin(self) -> None:
        """Show that the steps begin: on a terminal, draw the bar at the step of the resume."""
        if self._is_writer:
            self._console.begin(self._step)

    def progress(self, step: int, tokens: int, figures: Mapping[str, float]) -> None:
        """Show the progress of the run; see `Console.progress` for the figures."""
        if self._is_writer:
            self._console.progress(step, tokens, figures)
            self._poll()

    def close(self, status: Literal["finished", "stopped", "failed"], step: int | None = None) -> None:
        """Record how the run ended, and close everything. A W&B server that does not answer takes 3 s at most.

        Args:
            status: finished (all steps are done), stopped (on request, to be resumed later) or failed (an error).
            step: optimizer steps done; None for the number of the last call.
        """
        if not self._is_writer:
            return
        self._is_writer = False
        self._step = self._step if step is None else step
        self._note("end", status=status)
        self._console.close()
        if self._wandb:
            self._wandb.close(status)
        for file in (self._metrics, self._samples, self._predictions, self._events):
            file.close()

    def _note(self, kind: str, **facts: Any) -> None:
        self._events.append({"step": self._step, "time": _now(), "kind": kind, **scrub(facts)})

    def _warn(self, text: str) -> None:
        # A full disk affects all files, so one warning is enough.
        if not self._has_warned:
            self._has_warned = True
            self._console.message(f"warning: {text}")

    def _poll(self) -> None:
        if self._wandb:
            self._wandb.poll()


def _now() -> float:
    return round(time.time(), 3)


def _shown_sample(prompt: str, completion: str) -> str:
    text = f"{prompt}▸{completion}"
    if len(text) > _SHOWN_SAMPLE_LENGTH:
        text = text[:_SHOWN_SAMPLE_LENGTH] + " ..."
    return textwrap.indent(text, "  ")
