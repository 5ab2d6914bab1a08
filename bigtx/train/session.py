"""One life of a run, from the first log line to the last: what the entry points are made of.

A run may have many lives, one for each time its command is started; each finds in the run folder where the last one
ended. `Session` is what all have; pretraining.py and finetuning.py say what each kind reads and how it begins.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import re
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, NoReturn, Self, TypeVar

from bigtx.config.batches import micro_batch_size_of
from bigtx.config.schema import RunConfig
from bigtx.train.run_dir import check_run_dir
from bigtx.train.stop import STOP_FILE, EarlyStop, StopRequest
from bigtx.utils import hardware, log, processes, shell
from bigtx.utils.errors import EXIT_FAILED, BigtxError, CheckpointError, LaunchError, say_from_any_rank
from bigtx.utils.locks import refuse_if_held
from bigtx.utils.units import format_count, parse_duration

if TYPE_CHECKING:
    from torch import Tensor

    from bigtx.data.stream.loader import StepLoader
    from bigtx.engine.engine import ReadRange
    from bigtx.track.tracker import Better
    from bigtx.train.loop import Run, Validation
    from bigtx.train.teacher import Teacher

Config = TypeVar("Config", bound=RunConfig)

LOST_RANK = re.compile(r"Connection (closed|reset) by peer|Broken pipe|NCCL (communicator was aborted|error)")
"""What torch.distributed's backends say when another process is gone."""
SILENT_RANK = re.compile(r"Timed out waiting|wait timeout after|collective operation timeout")
"""What they say when another process has not answered in time."""
BASE_FACTS = ("checkpoint", "manifest_sha256", "step", "wandb_run_id")
"""What links a run to the one that it began with."""


class Session(ABC, Generic[Config]):
    """Opens everything that training needs, in order, and closes it whatever happens.

    Use as a context, and call `run`.

    Attributes:
        total_steps: optimizer steps of the run.
        tokens_per_step: of a global batch, at least about.
        patience: see `Run`.
        facts: what every checkpoint's manifest records of what the run reads.
        base_facts: the run that the weights came from, if they did: `facts_of`, and more.
    """

    job_type: ClassVar[str]
    """W&B's."""
    total_steps: int
    tokens_per_step: int
    patience: int | None = None
    facts: dict[str, Any]
    tokenizer: Any
    task: Any

    def __init__(self, config: Config, *, dry_run: bool, files: Iterable[Path] = ()) -> None:
        """Args:
        config: checked, but with the vocabulary's size still to be taken from the tokenizer.
        dry_run: one step in a temporary folder, and nothing is kept.
        files: that the config was read from.
        """
        self.config, self.dry_run, self.files = config, dry_run, list(files)
        self.status: Literal["finished", "stopped", "failed"] = "failed"
        self.tracker: Any = None
        self.loader: Any = None
        self.lock: Any = None
        self.ranks: Any = None
        self.checkpoint: Any = None
        self.teacher: Teacher | None = None
        self.base_facts: dict[str, Any] = {}
        self._is_training = False

    def __enter__(self) -> Self:
        """Start the log, and listen to requests to stop.

        Raises:
            LaunchError: the run folder cannot be written.
            BigtxError: see `check_folder`.
        """
        if self.dry_run:
            self._scratch = tempfile.mkdtemp(prefix="bigtx-dry-run-")
            self.config = dataclasses.replace(
                self.config, run_dir=self._scratch, track=dataclasses.replace(self.config.track, wandb="off")
            )
        self.run_dir = Path(self.config.run_dir)
        try:
            if not self.dry_run and not processes.is_supervised():
                check_folder(self.config, self.files)
            log.setup(self.run_dir, processes.rank())
        except OSError as error:
            raise LaunchError(
                f"run_dir={self.config.run_dir!r} cannot be written: {error}; name another folder"
            ) from error
        launcher, nodes = processes.launcher_name(), processes.num_nodes()
        where = f" on {nodes} machines" if nodes > 1 else ""
        started = f", started by {launcher}" if launcher else ""
        log.say(f"bigtx: {num_ranks(processes.world_size())}{where}{started}; run folder {self.run_dir}")
        self.stop = StopRequest(self._tell_request)
        return self

    def _tell_request(self, came_early: bool) -> None:
        """Answer a request to stop at once: the step that runs may take long."""
        if came_early:
            log.report(stopped=True)
            log.say_stopped("stopped before the first step; nothing to save")
        elif self._is_training:
            self.tracker.message("stopping: a checkpoint is saved after this step")

    def run(self) -> int:
        """Do all that is left of the run. Returns the exit status.

        Raises:
            BigtxError: see the methods below.
        """
        self.join_ranks()
        self.open_data()
        self.open_folder()
        if self.is_finished():
            return 0
        self.build_engine()
        self.load_weights()
        return self.train()

    def join_ranks(self) -> None:
        """Meet the other ranks.

        Raises:
            LaunchError: see `Ranks`.
        """
        from bigtx.engine.ranks import Ranks

        self.ranks = Ranks(timeout_seconds=parse_duration(self.config.engine.timeout).value)
        for note in self.ranks.notes_on_devices():
            log.say(note)
        train = self.config.train
        self._given_micro_batch_size = train.micro_batch_size
        size = micro_batch_size_of(train, self.ranks.world_size)
        if size != train.micro_batch_size:
            share = train.global_batch_size // self.ranks.world_size
            log.say(f"micro batches of {size}: train.micro_batch_size={train.micro_batch_size} does not divide {share}")
            self.config = dataclasses.replace(self.config, train=dataclasses.replace(train, micro_batch_size=size))

    @staticmethod
    @abstractmethod
    def check_inputs(config: Any, num_ranks: int) -> None:
        """Refuse what `open_data` would refuse, as far as a quick look tells. Called before the ranks are started, and
        imports no torch."""

    @abstractmethod
    def open_data(self) -> None:
        """Open what the run reads, and complete the config and `facts` from it."""

    def open_folder(self) -> None:
        """Take the run folder, and find the checkpoint to go on from.

        Raises:
            LaunchError, ConfigError, CheckpointError: see `open_run_folder` and `checkpoint.choose`.
        """
        from bigtx.engine import checkpoint
        from bigtx.train.run_folder import open_run_folder

        self.environment = hardware.describe()
        opened = self.ranks.on_first(
            lambda: open_run_folder(self.config, files=self.files, environment=self.environment)
        )
        self.lock = opened.lock if opened else None
        if opened and opened.aside:
            log.say(
                f"starts again at step 0, because its checkpoints are gone; what it wrote before is in {opened.aside}"
            )
        self.changed = self.ranks.from_first(opened.changed if opened else None)
        self.damaged: list[str] = []
        self.checkpoint = checkpoint.choose(self.run_dir, self.ranks, self._note_damaged)
        if not self.checkpoint:
            return
        for key, what, own in (
            ("tokenizer", "with another tokenizer", "data"),
            ("data", "on other data (or in another state)", "data"),
            ("teacher", "under another teacher", "teacher (distill.teacher may name a checkpoint)"),
        ):
            before, now = self.checkpoint.manifest.get(key), self.facts.get(key)
            if before != now:
                raise CheckpointError(
                    f"{self.checkpoint.path} was trained {what} than it now names: it had {before}, here is {now}; "
                    f"give it its own {own} back, or begin another run_dir with "
                    f"{self.config.begins_with}=THIS_RUN"
                )

    def open_teacher(self) -> None:
        """Find the teacher, if there is one, and complete the config from it.

        Raises:
            BigtxError: there is none at `distill.teacher`.
        """
        name = self.config.distill.teacher
        if name is None:
            return
        from bigtx.engine.checkpoint import preferred
        from bigtx.train.teacher import Teacher

        # One choice for all ranks: the teacher may still be training.
        self.teacher = Teacher(self.ranks.from_first(self.ranks.on_first(lambda: preferred(name))))
        self.config = self.teacher.complete(self.config)

    def admit_teacher(self, longest: int) -> None:
        """Make sure that the teacher, if there is one, fits what was opened.

        Args:
            longest: columns of the longest row.

        Raises:
            ConfigError: it does not.
        """
        if self.teacher is None:
            return
        self.teacher.check(self.config, self.tokenizer, longest)
        self.facts["teacher"] = self.teacher.manifest_sha256
        settings = self.config.distill
        log.say(
            f"teacher: {self.teacher.describe()}; its share in the loss {settings.weight:g}, at temperature "
            f"{settings.temperature:g}"
        )

    def flops_of(self, *, source: int, target: int, predicted: int) -> float:
        """Of a training step per row, the teacher's part included; arguments as of `flops_per_row`."""
        from bigtx.plan.parameters import flops_per_row

        lengths = {"source": source, "target": target, "predicted": predicted}
        own = flops_per_row(self.config.model, **lengths)
        return own if self.teacher is None else own + self.teacher.flops_per_row(**lengths)

    @abstractmethod
    def is_finished(self) -> bool:
        """Whether nothing of the run is left to do; says so, before the model is built for nothing."""

    def build_engine(self) -> None:
        """Build the model under DeepSpeed; its weights are not set yet.

        Raises:
            ConfigError: optimizer.freeze or train_also match nothing, or leave nothing to train.
        """
        from bigtx.engine.engine import Engine
        from bigtx.engine.trainable import frozen_parameters
        from bigtx.interop.target import export_note
        from bigtx.model.transformer import Transformer
        from bigtx.plan.parameters import count_parameters, parameter_shapes

        shapes = parameter_shapes(self.config.model)
        frozen = set(frozen_parameters(self.config, shapes))  # Globs that match nothing are refused before it is built.
        count = count_parameters(self.config.model)
        log.say(
            f"model: {format_count(count.total)} parameters; engine: ZeRO {self.config.engine.zero_stage}, "
            f"{self.config.engine.precision}, {self.config.optimizer.name}"
        )
        if note := export_note(self.config, self.tokenizer):
            log.say(note)
        if frozen:
            num_trained = sum(math.prod(shape) for name, shape in shapes.items() if name not in frozen)
            rank = self.config.model.lora.rank
            what = f"adapters of rank {rank} and all else that is trained have" if rank else "of them are trained"
            log.say(
                f"{what} {format_count(num_trained)} parameters ({num_trained / count.total:.2%}); "
                f"{len(frozen)} of {len(shapes)} tensors stay as they are"
            )
        self.engine = Engine(self.config, lambda: Transformer(self.config.model))

    def load_weights(self) -> None:
        """Set the weights: from the run's checkpoint, else as the run begins.

        Raises:
            CheckpointError, ConfigError: weights that do not fit.
        """
        from bigtx.train.state import HARMLESS_SKIPS, RunState

        harmless = HARMLESS_SKIPS.get(self.config.engine.precision, 0)
        if not self.checkpoint:
            self.state = RunState(harmless_skips=harmless)
            self.begin()
            return
        self.state = RunState.from_dict(self.checkpoint.manifest["state"] | {"harmless_skips": harmless})
        if self.changed:
            self.state.skipped_in_a_row = 0  # Other settings may be the cure, and have all of max_skipped_steps.
        self.engine.fill(self.checkpoint.read, states=True)
        self.engine.optimizer.num_updates = self.checkpoint.manifest["num_updates"]
        self.engine.set_loss_scale(self.checkpoint.manifest["loss_scale"])
        self.engine.set_expert_counts(self.checkpoint.manifest.get("expert_counts"))
        self.checkpoint.close()
        self.resume()
        log.say(f"resumed from {self.checkpoint.path} ({format_count(self.state.tokens)} tokens)")

    @abstractmethod
    def begin(self) -> None:
        """Set the weights and the state of a run that has made no step."""

    def resume(self) -> None:
        """Check the state that a checkpoint gave."""

    def begin_with(self, read: ReadRange) -> None:
        """Set the weights of a run that has made no step; those that it will not train are kept in its folder, so that
        no checkpoint has to.

        Raises:
            CheckpointError: they could not be written.
        """
        from bigtx.engine.saving import save_frozen

        self.engine.fill(read, states=False)
        if self.engine.frozen and not self.dry_run and not self.checkpoint:  # Checkpoints hold on to what was kept.
            save_frozen(self.engine, self.ranks, self.run_dir, read)

    def initial_weights(self) -> ReadRange:
        """The weights that the seed gives, or the teacher's layers, as `Engine.fill` reads them.

        Raises:
            ConfigError: the teacher's do not fit.
        """
        from bigtx.model.initial import initial_value

        shapes = self.engine.shapes()

        def of_seed(name: str, kind: str, start: int, stop: int) -> Tensor:
            return initial_value(name, shapes[name], self.config.model, self.config.seed, start, stop)

        if self.teacher is None or not self.config.distill.copy_layers:
            return of_seed
        return self.teacher.layers(shapes, of_seed)

    def train(self) -> int:
        """Train to the end or to a stop request. Returns the exit status."""
        from bigtx.train.loop import train

        if self.dry_run:
            return self._one_step()
        run = self._run()
        self.stop.defer()
        if self.ranks.rank == 0:
            self.stop.watch(self.run_dir / STOP_FILE)
        self._is_training = True
        finished = train(run, self.stop)
        self._is_training = False
        if finished:
            self.conclude(run)
            if self.ranks.rank == 0:
                self._tell_model()
            self._close_tracker("finished")
            log.say(
                f"finished: {self.state.step:,} steps, {format_count(self.state.tokens)} tokens, in {self.run_dir}\n"
                f"next: {self.next_command()}"
            )
            return 0
        self._close_tracker("stopped")
        self.stop.forget_file()
        log.report(stopped=True)
        log.say(f"stopped at step {self.state.step:,} with a checkpoint; the same command resumes from it")
        return self.stop.exit_status

    def _close_tracker(self, status: Literal["finished", "stopped"]) -> None:
        """End what is drawn and said on the screen, W&B's last words too, so that the run's own come last."""
        self.status = status
        self.tracker.close(status, self.state.step)

    def _tell_model(self) -> None:
        """Name the checkpoint that others use the run by."""
        from bigtx.engine.checkpoint import Checkpoint, preferred

        given = Checkpoint(preferred(self.run_dir))
        self.tracker.model(given.manifest["step"], given.path, given.manifest_sha256)

    def conclude(self, run: Run) -> None:
        """What is left to do after the last step."""

    @abstractmethod
    def next_command(self) -> str:
        """What a user may do with the finished run."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close what was opened. An error of the user is printed by the first rank that meets it."""
        self.stop.defer()
        if self.stop.came_early:
            self.status = "stopped"
        if self.loader:
            self.loader.close()
        if self.tracker:
            self.tracker.close(self.status, self.state.step)
        if self.lock:
            self.lock.release()
        if error is not None:
            self._explain(error)
        elif self.ranks:
            self.ranks.barrier()  # Leaving first would look like a failure to the others.
            self.ranks.close()
        # Other errors are explained by the log.
        if self.dry_run and (error is None or isinstance(error, BigtxError | EarlyStop)):
            shutil.rmtree(self._scratch, ignore_errors=True)

    def _run(self) -> Run:
        """Everything that the loop uses."""
        from bigtx.engine.schedules import Schedule
        from bigtx.track.tracker import Tracker
        from bigtx.train.loop import Run
        from bigtx.train.meter import Meter
        from bigtx.train.run_folder import describe_run, dump

        config = self.config
        environment = self.environment
        # Another number of ranks may take the micro batches that were asked for.
        asked = dataclasses.replace(config.train, micro_batch_size=self._given_micro_batch_size)
        self.ranks.on_first(
            lambda: describe_run(
                dataclasses.replace(config, train=asked),
                tokenizer=self.tokenizer,
                deepspeed=self.engine.deepspeed_config,
                environment=environment,
            )
        )
        self.loader = self.make_loader()
        self.tracker = Tracker(
            self.run_dir,
            config.track,
            run_config=dump(config),
            environment=environment,
            rank=self.ranks.rank,
            total_steps=self.total_steps,
            better=self.better(),
            resumed_step=self.state.step,
            job_type=self.job_type,
            base={key: self.base_facts[key] for key in BASE_FACTS} if self.base_facts else None,
            stream=log.console(),
        )
        self._tell_history()
        meter = Meter(flops_per_token=self.flops_per_token(), peak_flops=self._peak_flops())
        if self.checkpoint:
            meter.restore(self.checkpoint.manifest["meter"])
        self.facts["wandb_run_id"] = self.ranks.from_first(self.tracker.wandb_run_id)
        return Run(
            config=config,
            run_dir=self.run_dir,
            ranks=self.ranks,
            engine=self.engine,
            task=self._taught_task(),
            loader=self.loader,
            schedule=Schedule(config.schedule, total_steps=self.total_steps, tokens_per_step=self.tokens_per_step),
            validation=self.make_validation(),
            tracker=self.tracker,
            meter=meter,
            state=self.state,
            facts=self.facts,
            validate_every=self.validate_every(),
            patience=self.patience,
        )

    def _taught_task(self) -> Any:
        """The task as the loop trains it; what measures within the run asks the student alone."""
        if self.teacher is None:
            return self.task
        engine = self.config.engine
        return self.teacher.teach(self.task, self.config.distill, self.engine.device, engine.precision)

    @abstractmethod
    def make_loader(self) -> StepLoader:
        """The batches from the state's place on."""

    @abstractmethod
    def make_validation(self) -> Validation:
        """What measures the model within the run."""

    @abstractmethod
    def better(self) -> Mapping[str, Better]:
        """Which values of its metrics are better, by their names without group."""

    @abstractmethod
    def flops_per_token(self) -> float:
        """Of a training step, per token that counts."""

    @abstractmethod
    def validate_every(self) -> str:
        """How often the model is measured."""

    def _one_step(self) -> int:
        from bigtx.train.loop import train_step

        run = self._run()
        micro_batches = next(self.loader)
        num_labels, num_tokens = self.ranks.sum(
            [sum(batch.num_labels for batch in micro_batches), self.loader.num_tokens(micro_batches)]
        )
        result = train_step(run, micro_batches, num_labels, num_tokens)
        metrics = run.meter.metrics()
        self.status = "finished"
        log.say(
            f"dry run: one step, loss {metrics['train/loss']:.4f}, gradient norm {result.grad_norm:.3f}, "
            f"{metrics['perf/memory_gib']:.2f} GiB; nothing was kept"
        )
        return 0

    def _tell_history(self) -> None:
        """Record how this life began."""
        self.tracker.event(
            self.state.step,
            "start",
            host=self.environment["host"],
            world_size=self.ranks.world_size,
            launcher=processes.launcher_name(),
            **processes.slurm_place(),
        )
        for text in self.damaged:
            self.tracker.event(self.state.step, "refused_checkpoint", text=text)
        if self.checkpoint:
            self.tracker.event(
                self.state.step,
                "resume",
                checkpoint=self.checkpoint.path.name,
                world_size=self.ranks.world_size,
                zero_stage=self.config.engine.zero_stage,
            )
        for change in self.changed:
            self.tracker.event(self.state.step, "config_change", **change)

    def _note_damaged(self, text: str) -> None:
        log.say(f"warning: {text}")
        self.damaged.append(text)

    def open_other_run(self, folder: str) -> Any:
        """The newest whole checkpoint of another run, or the one that is named, open for reading: adapters that it has
        are merged into the weights.

        Raises:
            CheckpointError: there is none.
        """
        from bigtx.engine import checkpoint
        from bigtx.engine.merged import MergedCheckpoint

        # One choice for all ranks: the other run may be alive and save meanwhile.
        path = self.ranks.from_first(self.ranks.on_first(lambda: checkpoint.preferred(folder)))
        source = checkpoint.choose(path, self.ranks, self._note_damaged)
        assert source is not None
        return MergedCheckpoint(source.path)

    @staticmethod
    def facts_of(source: Any) -> dict[str, Any]:
        """What is kept of a checkpoint of another run that this one begins with."""
        return {
            "checkpoint": str(source.path.absolute()),
            "manifest_sha256": source.manifest_sha256,
            "step": source.manifest["step"],
            "wandb_run_id": source.manifest.get("wandb_run_id", ""),
        }

    def _peak_flops(self) -> float | None:
        """Of all ranks together; None where no maker has published it. A CPU's is not known: what a measurement gives
        depends on what else the cores do, and steps have passed it."""
        import torch

        if not torch.cuda.is_available():
            return None
        peak = hardware.peak_flops(torch.cuda.get_device_name(), self.config.engine.precision)
        return None if peak is None else peak * self.ranks.world_size

    def _explain(self, error: BaseException) -> None:
        """Say why this life ends, once for all ranks; other errors keep their traceback."""
        if hasattr(self, "state"):
            log.report(step=self.state.step)
        if self.stop.came_early:
            if not isinstance(error, EarlyStop):  # Another rank's end was noticed before this one's own.
                raise EarlyStop(self.stop.exit_status) from error
        elif self.ranks and isinstance(error, RuntimeError) and SILENT_RANK.search(str(error)):
            self._explain_silence(error)
        elif self.ranks and isinstance(error, RuntimeError) and LOST_RANK.search(str(error)):
            lost = LaunchError(
                "lost the connection to another rank, which has ended; its last words are above or in "
                f"{self.run_dir / 'logs'}. The same command resumes from the last checkpoint"
            )
            lost.exit_status = EXIT_FAILED
            if log.report(lost=True, error=str(lost)):
                lost.reported = True  # The supervisor knows which rank ended, and says so.
            else:
                self._say_once(lost)
            raise lost from error
        elif isinstance(error, BigtxError) and self.ranks:
            self._say_once(error)

    def _explain_silence(self, error: RuntimeError) -> NoReturn:
        """Name the ranks that did not answer in time; each of the others leaves its stack in its log."""
        logging.getLogger(__name__).error("this rank waited for another until engine.timeout", exc_info=error)
        silent = self.ranks.silent()
        who = f"rank {', '.join(map(str, silent))}" if silent else "a rank, or the network,"
        lost = LaunchError(
            f"{who} did not answer within engine.timeout={self.config.engine.timeout}: it is stopped, hangs or is too "
            f"slow; {self.run_dir / 'logs'} shows where each of the others waited for it. The same command resumes "
            "from the last checkpoint"
        )
        lost.exit_status = EXIT_FAILED
        if silent is not None:
            say_from_any_rank(lost)
        lost.reported = True
        raise lost from error

    def _say_once(self, error: BigtxError) -> None:
        if self.ranks.is_first_to_fail():
            say_from_any_rank(error)
        error.reported = True


def say_finished(step: int, settings: Sequence[str], results: str = "") -> None:
    """Say that nothing is left to do.

    Args:
        settings: those that ended the run.
        results: where they are, as a part of the sentence.
    """
    longer = shell.settings({name: "N" for name in settings} | {"allow_changes": settings})
    log.say(f"the run is finished: {step:,} steps{results}. To train on: {longer}; to start over, name another run_dir")


def check_folder(config: RunConfig, files: Iterable[Path]) -> None:
    """Refuse a run folder that another run holds, or in which the run would destroy something.

    Called before anything is written there, and before the ranks find the port of the other run taken.

    Raises:
        LaunchError, ConfigError, CheckpointError: see `refuse_if_held` and `check_run_dir`.
    """
    refuse_if_held(config.run_dir)
    if processes.rank() == 0:
        check_run_dir(config, files)


def check_teacher(config: RunConfig) -> None:
    """Refuse a teacher that is no run, or has no checkpoint, before torch is imported to read it.

    Raises:
        BigtxError: see `find_with_tokenizer`.
    """
    from bigtx.engine.trained import find_with_tokenizer

    if config.distill.teacher:
        find_with_tokenizer(config.distill.teacher)


def num_ranks(count: int) -> str:
    """So many ranks, in words."""
    return f"{count} rank" + "s" * (count != 1)
