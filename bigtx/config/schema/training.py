"""What every training has: its steps, optimizer, schedule, engine, tracking and teacher, and the rules between them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Optional

from bigtx.config.deepspeed import raw_problems
from bigtx.config.nodes import Problem, idle_settings
from bigtx.config.runs import CHECKPOINTS, has_steps, why_no_checkpoint, why_no_run
from bigtx.config.schema.model import ModelConfig
from bigtx.config.settings import field, find, section, similar_keys
from bigtx.utils.files import is_url, url_problem
from bigtx.utils.processes import world_size
from bigtx.utils.shell import setting
from bigtx.utils.units import INTERVALS, duration_of

LEAST_TIMEOUT_SECONDS, LARGEST_TIMEOUT_SECONDS = 1, 30 * 86_400


@dataclass(kw_only=True)
class RhythmConfig:
    """The steps of a run, and the intervals of what happens repeatedly."""

    max_steps: Optional[int] = field(None, kind="count", minimum=0, change="by_name")
    """Optimizer steps of the run."""
    global_batch_size: int = field(32, kind="count", minimum=1, maximum=2**24)
    """Sequences (in fine-tuning: records) of one optimizer step over all ranks; constant within a run."""
    micro_batch_size: int = field(4, minimum=1, maximum=2**24, change="free")
    """Most sequences of one forward pass on one rank. The largest number up to this that divides a rank's share of
    global_batch_size is used, with as many passes as a step needs."""
    gradient_clipping: float = field(1.0, minimum=0.0, change="by_name")
    """Largest global norm of the gradient; 0 disables clipping."""
    log_every: str = field("10 steps", kind="duration", units=INTERVALS, change="free")
    """How often metrics are written and shown."""
    checkpoint_every: str = field("500 steps", kind="duration", units=INTERVALS, change="free")
    """How often a checkpoint is written; one is always written at the end and after a stop request."""
    keep_checkpoints: int = field(2, minimum=1, change="free")
    """Newest checkpoints that are kept."""
    keep_every: Optional[str] = field(None, kind="duration", units=("steps", "tokens"), change="free")
    """Also keep the first checkpoint at or after each multiple of this, in steps or tokens, e.g. 10000 steps. Empty:
    none."""
    copy_checkpoints_to: Optional[str] = field(None, kind="path", change="free")
    """Folder, or URL of an object store (s3://, gs://), to which each checkpoint is copied in the background, with what
    else makes a run of it. Nothing is deleted there, and an error is a warning. Empty: no copy."""
    async_checkpoints: bool = field(True, change="free")
    """Write checkpoints while the training continues, from a copy in host memory. false needs no memory for the copy,
    e.g. with offloaded states, and stops the training meanwhile."""
    max_skipped_steps: int = field(20, minimum=0, change="free")
    """Consecutive steps with a non-finite loss or gradient after which the run ends with an error."""

    def problems(self) -> Iterator[Problem]:
        """Yield a problem for intervals that are not intervals of steps, tokens or time."""
        for name in ("log_every", "checkpoint_every"):
            yield from interval_problems(f"train.{name}", getattr(self, name))
        if self.keep_every is not None:
            yield from interval_problems("train.keep_every", self.keep_every)
            duration = duration_of(self.keep_every)
            if duration and duration.unit == "seconds":
                yield Problem(
                    "train.keep_every", self.keep_every, "is a time; write steps or tokens, such as 10B tokens"
                )

        if self.copy_checkpoints_to and is_url(self.copy_checkpoints_to):
            problem = url_problem(self.copy_checkpoints_to)
            if problem is None and not self.copy_checkpoints_to.startswith(("s3://", "gs://")):
                problem = "cannot be written; write s3:// or gs://, or a folder"
            if problem:
                yield Problem("train.copy_checkpoints_to", self.copy_checkpoints_to, problem)

    def division_problems(self, num_ranks: int) -> Iterator[Problem]:
        """Yield a problem where so many ranks cannot share the global batch evenly."""
        total = self.global_batch_size
        if total % num_ranks:
            below, above = total // num_ranks * num_ranks, -(-total // num_ranks) * num_ranks
            fitting = f"{below} or {above}" if below else str(above)
            what = f"cannot be divided over {num_ranks} ranks; {fitting} can, or use another number of ranks"
            yield Problem("train.global_batch_size", str(total), what)


@dataclass(kw_only=True)
class OptimizerConfig:
    """AdamW (arXiv:1711.05101), or Muon for the blocks' matrices with AdamW for all other parameters."""

    name: Literal["adamw", "muon"] = field("adamw", change="never")
    """adamw or muon."""
    learning_rate: Optional[float] = field(3e-4, minimum=0.0)
    """Peak rate of AdamW. Empty: 0.15 / model.hidden_size, which suits fine-tuning: 2e-4 for a width of 768."""
    beta1: float = field(0.9, minimum=0.0, maximum=0.999999)
    """AdamW's decay of the mean gradient."""
    beta2: float = field(0.95, minimum=0.0, maximum=0.999999)
    """AdamW's decay of the mean squared gradient."""
    eps: float = field(1e-8, minimum=1e-20, maximum=1.0)
    """AdamW's addition to the denominator."""
    weight_decay: float = field(0.1, minimum=0.0)
    """Decoupled decay of matrices; norms and biases have none."""
    decay_embeddings: bool = True
    """Whether the embedding table and the head decay too."""
    embedding_learning_rate_scale: float = field(1.0, minimum=0.0)
    """Factor on AdamW's rate for the embedding table and the head."""
    muon_learning_rate: float = field(0.02, minimum=0.0)
    """Peak rate of Muon; an update's root mean square is this * sqrt(max(1, rows / columns)) / sqrt(columns)."""
    muon_momentum: float = field(0.95, minimum=0.0, maximum=0.999999)
    """Muon's Nesterov momentum, held in fp32."""
    muon_num_iterations: int = field(5, minimum=1, maximum=20)
    """Newton-Schulz iterations."""
    muon_weight_decay: float = field(0.0, minimum=0.0)
    """Decoupled decay of Muon's matrices."""
    freeze: list[str] = field(factory=list, change="never")
    """Globs of parameters that are not trained, e.g. [embedding.*, 'decoder.blocks.[0-5].*']."""
    train_also: list[str] = field(factory=list, change="never")
    """With model.lora: globs of parameters trained in addition to the adapters and the head of classes, e.g.
    ['*norm*'].
    """
    layer_decay: float = field(1.0, minimum=0.1, maximum=1.0)
    """Factor on the rate from each block to the one below it (arXiv:1801.06146); embeddings have one more; 1: none."""
    ema_decay: Optional[float] = field(None, minimum=0.0, maximum=0.9999999, change="never")
    """Decay per step of an exponential average of the weights, which is kept in addition. Empty: none."""


@dataclass(kw_only=True)
class ScheduleConfig:
    """The learning rate over the run, as a factor on each peak rate."""

    name: Literal["cosine", "warmup_stable_decay", "constant"] = "cosine"
    """Shape after the warm-up."""
    warmup: str = field("1 %", kind="duration", units=("steps", "tokens", "fraction"))
    """Linear rise from 0, as steps, tokens or % of the run."""
    decay: str = field("20 %", kind="duration", units=("steps", "tokens", "fraction"))
    """warmup_stable_decay: length of the last part, in which the rate decreases linearly to minimum_factor."""
    minimum_factor: float = field(0.1, minimum=0.0, maximum=1.0)
    """The rate at the end, as a factor on the peak."""

    def problems(self, num_steps: int | None, tokens_per_step: int | None) -> Iterator[Problem]:
        """Yield a problem where warm-up and decay are times, or are longer than a run whose length is known.

        Args:
            num_steps: the steps of the run; None if they are not known yet.
            tokens_per_step: the tokens of a step; None if they are not known.
        """
        parts = {"schedule.warmup": self.warmup, "schedule.decay": self.decay}
        shares = {}
        for key, text in parts.items():
            duration = duration_of(text)
            if duration and duration.unit == "seconds":
                yield Problem(key, text, "is a time; write steps, tokens or a share of the run, such as 5 %")
            elif duration and (share := duration.share_of(num_steps, tokens_per_step)) is not None:
                shares[key] = share
        if self.name != "warmup_stable_decay":
            shares.pop("schedule.decay", None)
        # The lengths of the run in steps and in tokens differ by rounding.
        if sum(shares.values()) > 1 + 1e-6:
            key = max(shares, key=lambda name: shares[name])
            whole = " and ".join(f"{name}={parts[name]}" for name in shares)
            what = f"{whole} are longer than the whole run; shorten them"
            yield Problem(key, parts[key], what, related=("train.max_steps", *shares))


@dataclass(kw_only=True)
class EngineConfig:
    """How DeepSpeed runs the model. All of these settings may change on resume."""

    zero_stage: int = field(1, minimum=0, maximum=3)
    """What is sharded over ranks. 0: nothing; 1: optimizer states; 2: gradients too; 3: parameters too."""
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    """Arithmetic of the model (fp32: without TF32); master weights, states and gradient sums are always fp32."""
    offload_optimizer: Literal["none", "cpu"] = "none"
    """Where the optimizer's states are kept and its step runs (stages 1 to 3)."""
    offload_parameters: Literal["none", "cpu"] = "none"
    """Where parameters that are not in use are kept (stage 3)."""
    activation_checkpointing: Literal["auto", "none", "selective", "full"] = "none"
    """What the backward pass recomputes: nothing, all except matrix products and attention, or each whole block. auto:
    the first of these that fits the GPU's memory, by the estimate of `bigtx configs plan`."""
    compile: Literal["auto", "true", "false"] = "auto"
    """torch.compile of blocks and, on a GPU, of the loss: faster steps, slower start. auto: pretraining on a GPU."""
    deterministic: bool = False
    """Use deterministic kernels on GPUs too, so that a resumed run equals an uninterrupted one; slower."""
    overlap_communication: bool = True
    """Reduce gradients during the backward pass, not after it (stages 1 to 3)."""
    bucket_size: int = field(50_000_000, kind="count", minimum=1)
    """Elements in one reduction or gathering (stages 1 to 3)."""
    timeout: str = field("30 min", kind="duration", units=("seconds",))
    """How long a collective of any process group may wait for another rank: 1 s to 30 days."""

    def problems(self) -> Iterator[Problem]:
        """Yield a problem for settings that DeepSpeed does not support together, and for an impossible timeout."""
        if self.precision == "fp16" and self.zero_stage == 0:
            what = "needs engine.zero_stage of 1 to 3 (1 costs nothing): without ZeRO DeepSpeed adds gradients in fp16"
            yield Problem("engine.precision", self.precision, what, related=("engine.zero_stage",))
        if self.offload_optimizer != "none" and self.zero_stage == 0:
            yield Problem(
                "engine.offload_optimizer", self.offload_optimizer, "needs engine.zero_stage 1, 2 or 3; it is 0"
            )
        if self.offload_parameters != "none" and self.zero_stage != 3:
            why = f"needs engine.zero_stage=3; it is {self.zero_stage}"
            yield Problem("engine.offload_parameters", self.offload_parameters, why)
        if self.zero_stage == 0:
            why = "at engine.zero_stage=0, where DeepSpeed reduces all gradients after the backward pass"
            yield from idle_settings(self, "engine", why, ("overlap_communication", "bucket_size"))
        waits = duration_of(self.timeout)
        if waits and waits.unit != "seconds":
            yield Problem("engine.timeout", self.timeout, "is not a time; write one such as 30 min")
        elif waits and not LEAST_TIMEOUT_SECONDS <= waits.value <= LARGEST_TIMEOUT_SECONDS:
            what = "is not between 1 s and 30 days; write a time such as 30 min"
            yield Problem("engine.timeout", self.timeout, what)


@dataclass(kw_only=True)
class GuardsConfig:
    """What a run does about spikes of the loss, and about ranks whose copies of the weights differ."""

    spike: Literal["off", "warn", "skip", "roll_back"] = "warn"
    """What happens at a step whose loss is a spike. warn: it is reported; skip: its update is also left out; roll_back:
    after guards.patience spikes in a row the run also returns to its last good checkpoint and skips the data since."""
    window: int = field(128, minimum=8, maximum=4096)
    """The latest steps that a loss is compared with. No loss is a spike before half of them were made."""
    deviations: float = field(6.0, minimum=1.0)
    """A spike is so many standard deviations above the window's median. A standard deviation is estimated as 1.4826
    times the median absolute deviation, but as at least 1 % of the median."""
    gradient_deviations: Optional[float] = field(None, minimum=1.0)
    """The same for the norm of the gradient. Empty: it is not compared."""
    patience: int = field(3, minimum=1)
    """roll_back: spikes in a row after which the run returns; the update of each is left out."""
    skip_steps: int = field(0, kind="count", minimum=0)
    """roll_back: further steps whose data is skipped, after the last spike."""
    max_roll_backs: int = field(5, minimum=0)
    """How often a run may return to a checkpoint: for spikes, for more than train.max_skipped_steps (both only with
    roll_back), and for different copies of the weights. The next time it ends with an error."""
    verify_replicas_every: Optional[str] = field("1000 steps", kind="duration", units=INTERVALS)
    """How often, and before each checkpoint, ranks compare checksums of their copies of the weights; at ZeRO stage 3
    there are no copies. If they differ, the run returns to its last checkpoint. Empty: never."""

    def problems(self) -> Iterator[Problem]:
        """Yield a problem for an interval that is not one of steps, tokens or time, and for too much patience."""
        if 2 * self.patience > self.window:
            what = (
                f"is more than half of guards.window={self.window}: a loss that stays high for so long is not a spike "
                f"any more; write {setting('guards.patience', self.window // 2)} or less"
            )
            yield Problem("guards.patience", str(self.patience), what, related=("guards.window",))
        if self.verify_replicas_every is not None:
            yield from interval_problems("guards.verify_replicas_every", self.verify_replicas_every)


@dataclass(kw_only=True)
class TrackConfig:
    """Where a run's metrics are sent; metrics.jsonl is always written."""

    wandb: Literal["auto", "online", "offline", "off"] = "auto"
    """auto: online if there is a key and the host responds, else offline."""
    project: str = "bigtx"
    """W&B project."""
    entity: Optional[str] = None
    """W&B team or user. Empty: the key's default."""
    group: Optional[str] = None
    """W&B group. Empty: none."""
    tags: list[str] = field(factory=list)
    """W&B tags."""
    profile_step: Optional[int] = field(None, minimum=1)
    """Write a profiler trace and (CUDA) a memory snapshot of this step into the run folder, of the first rank of the
    first two machines. Empty: none."""


@dataclass(kw_only=True)
class DistillConfig:
    """Distillation: the student also learns the probabilities that a trained run predicts (arXiv:1503.02531)."""

    teacher: Optional[str] = field(None, kind="path", change="by_name")
    """Run or checkpoint folder of the teacher, with the same tokenizer; every rank holds a full copy. Empty: none."""
    weight: float = field(0.5, minimum=0.0, maximum=1.0)
    """Share of the teacher's loss; the rest is the loss on the labels."""
    temperature: float = field(1.0, minimum=0.01, maximum=1e3)
    """Temperature that divides the logits of both before they are compared; above 1 unlikely answers weigh more."""
    copy_layers: bool = field(False, change="never")
    """Start with the teacher's embeddings, head and evenly spaced blocks (arXiv:1910.01108), not with random weights.
    """

    def problems(self, begins_with: str, started_from: str | None) -> Iterator[Problem]:
        """Yield a problem for a teacher that is not a run, and for settings of a teacher without a teacher.

        Args:
            begins_with: the setting that names the run whose weights the run starts with.
            started_from: its value.
        """
        if self.teacher is None:
            yield from idle_settings(self, "distill", "without distill.teacher")
            return
        if problem := why_no_run(self.teacher):
            yield Problem("distill.teacher", self.teacher, problem)
        if self.copy_layers and started_from is not None:
            what = f"the weights already come from {begins_with}={started_from}; write false, or {begins_with}=null"
            yield Problem("distill.copy_layers", "true", what, related=(begins_with,))


@dataclass(kw_only=True)
class RunConfig:
    """The settings of every training."""

    begins_with: ClassVar[str]
    """The setting that names the run whose weights this run starts with."""
    free_in_fork: ClassVar[tuple[str, ...]] = ()
    """Settings that can never change within a run, but between a run and its fork."""
    run_dir: str = field("", kind="path", change="free")
    """Folder of the run; the same command with the same folder resumes the run."""
    seed: int = field(1, minimum=0, maximum=2**63 - 1, change="never")
    """Seed of the initial weights, the data order, dropout and samples."""
    fork_from: Optional[str] = field(None, kind="path", change="never")
    """Continue another run in this run_dir, from its checkpoint: RUN@STEP, a checkpoint's folder, or RUN for the newest
    one, with its optimizer states, step and position in the data; the schedule may differ. Empty: a new run."""
    allow_changes: list[str] = field(factory=list, change="free")
    """Keys that may differ from the run being resumed, e.g. [optimizer.learning_rate, train.max_steps]; recorded.
    `checkpoints`: a run whose checkpoints are missing may start again at step 0; its earlier output is kept."""
    model: ModelConfig = section(ModelConfig, change="never")
    train: RhythmConfig = section(RhythmConfig, change="never")
    optimizer: OptimizerConfig = section(OptimizerConfig, change="by_name")
    schedule: ScheduleConfig = section(ScheduleConfig, change="by_name")
    distill: DistillConfig = section(DistillConfig, change="by_name")
    engine: EngineConfig = section(EngineConfig, change="free")
    guards: GuardsConfig = section(GuardsConfig, change="free")
    track: TrackConfig = section(TrackConfig, change="free")
    deepspeed: dict[str, Any] = field(factory=dict, change="free")
    """Raw DeepSpeed keys for experienced users; one that contradicts a typed field is an error."""

    def problems(self) -> Iterator[Problem]:
        """Yield a problem for settings that do not fit each other, and for files that do not exist."""
        if not self.run_dir:
            yield Problem("run_dir", "", "is not given; name the folder of the run, e.g. run_dir=runs/first")
        for key in self.allow_changes:
            yield from self._allowed_change(key)
        started_from = getattr(self, self.begins_with)
        yield from self.model.problems()
        yield from self.train.division_problems(world_size())
        yield from self.train.problems()
        yield from self.distill.problems(self.begins_with, started_from)
        yield from self.engine.problems()
        yield from self.guards.problems()
        yield from raw_problems(self)
        # A run with steps has left its origin, which may be gone.
        is_fork = self.fork_from is not None and not has_steps(Path(self.run_dir))
        if is_fork and (problem := why_no_checkpoint(str(self.fork_from))):
            yield Problem("fork_from", str(self.fork_from), problem)
        if self.model.lora.rank and started_from is None and self.fork_from is None:
            what = f"adapters need trained weights; name a run that has them, e.g. {self.begins_with}=runs/mine"
            yield Problem("model.lora.rank", str(self.model.lora.rank), what, related=(self.begins_with,))
        if self.optimizer.train_also and not self.model.lora.rank:
            what = (
                "has no effect without model.lora.rank=N, because all parameters are trained; write "
                f"{setting('optimizer.train_also', [])}, and see optimizer.freeze"
            )
            yield Problem("optimizer.train_also", str(self.optimizer.train_also), what)

    def _allowed_change(self, key: str) -> Iterator[Problem]:
        if key == CHECKPOINTS:
            return  # Allows the run to start again without them.
        found = find(type(self), key)
        if found is None:
            similar = similar_keys(type(self), key)
            hint = f"; did you mean {' or '.join(similar)}?" if similar else ""
            yield Problem("allow_changes", key, f"no such setting{hint}")
        elif found.section:
            yield Problem("allow_changes", key, "is a section; name its settings")
        elif found.change == "never":
            what = (
                f"can never change within a run; start a new one in another run_dir, with {self.begins_with}=THIS_RUN"
            )
            yield Problem("allow_changes", key, what)


def run_length_problems(lengths: Mapping[str, float | None], example: str) -> Iterator[Problem]:
    """Yield a problem where a run does not have exactly one length.

    Args:
        lengths: the values of the two settings that may give the length.
        example: one of the settings with a value.
    """
    first, second = lengths
    related = tuple(lengths)
    if None not in lengths.values():
        what = f"{second} is given too; write only one of them, or unset one by {first}=null or {second}=null"
        yield Problem(first, "", what, related=related)
    elif set(lengths.values()) == {None}:
        yield Problem(first, "", f"is not given, nor is {second}; write one, e.g. {example}", related=related)
    for key, length in lengths.items():
        if length == 0:
            yield Problem(key, "0", "trains nothing; write a number above 0")


def interval_problems(key: str, text: str, *, shares: bool = False) -> Iterator[Problem]:
    """Yield a problem for a text that is not an interval of a run.

    Args:
        shares: whether it may be a share of the run.
    """
    duration = duration_of(text)
    if duration and duration.value == 0:
        yield Problem(key, text, "is not an interval; write a duration above 0, such as 100 steps")
    elif duration and duration.unit == "fraction" and not shares:
        yield Problem(key, text, "is a share of the run; write steps, tokens or a time, such as 100 steps")
