"""A training run: data, objective, length, optimizer, engine and tracking."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Optional

from bigtx.config.fields import field, section
from bigtx.config.schema.model import ModelConfig


@dataclass(kw_only=True)
class SourceConfig:
    """One prepared corpus in the mixture."""

    path: str = field("", kind="path", change="by_name")
    """Folder written by `bigtx data prepare`, here or as a URL (https://, s3://, gs://)."""
    weight: float = field(1.0, minimum=0.0, maximum=1e9)
    """Share of the sequences, relative to the other sources' weights."""
    max_epochs: Optional[float] = field(None, minimum=0.0, change="by_name")
    """Refuse to start if the run would repeat this source more often. Empty: repeat as needed."""


@dataclass(kw_only=True)
class PhaseConfig:
    """Other weights, starting at some point of the run."""

    start: Optional[int] = field(None, kind="count", minimum=1)
    """Tokens of the global order before the phase, e.g. 8B, including those of data.skip; rounded up to a sequence."""
    weights: dict[str, float] = field(factory=dict, minimum=0.0, maximum=1e9)
    """Weights by source; 0 reads none of it. Sources that are not named keep their own weight."""


@dataclass(kw_only=True)
class ForeignConfig:
    """Plain webdataset text shards, tokenized on the fly instead of data.sources; exact resume needs prepared ones."""

    paths: list[str] = field(factory=list, kind="path", change="by_name")
    """Tar shards, also compressed: files or URLs, braces in quotes, e.g. ['https://host/{0000..0099}.tar']."""
    tokenizer: str = field("", kind="path", change="by_name")
    """Folder of the tokenizer."""
    member: str = "txt"
    """Suffix of the member that holds a sample's text; json: in its field text_field."""
    text_field: str = "text"
    """Key of the text in a JSON member."""
    shuffle_buffer: int = field(1000, kind="count", minimum=0)
    """Samples of each worker from which the next one is drawn; 0 keeps the shards' order."""
    num_workers: int = field(1, minimum=1, maximum=1024)
    """Tokenizing processes of each rank, at most as many as it has shards."""


@dataclass(kw_only=True)
class DataConfig:
    """The training data."""

    sources: dict[str, SourceConfig] = field(factory=dict)
    """Prepared corpora by name."""
    phases: dict[str, PhaseConfig] = field(factory=dict)
    """Later weights of the sources, by the name of each phase; before the first phase, their own weights apply."""
    skip: list[str] = field(factory=list, change="by_name")
    """Sequences of the run to skip, e.g. after a loss spike: ranges START-END, where END is the first one that is read.
    """
    document_mask: bool = False
    """Restrict attention and positions to each document of a packed row, and never predict across a boundary."""
    prefetch_batches: int = field(4, minimum=0, maximum=65_536, change="free")
    """Micro batches read ahead in a thread; 0 reads in the training loop."""
    cache_dir: str = field("~/.cache/bigtx", change="free")
    """Folder on this machine for blocks of remote corpora; all runs may share it."""
    cache_size: int = field(21_474_836_480, kind="size", minimum=0, change="free")
    """Most bytes in cache_dir; the least recently used blocks are deleted first."""
    foreign: ForeignConfig = field(factory=ForeignConfig)


@dataclass(kw_only=True)
class ObjectiveConfig:
    """The objective: what the model reads of a row of text, and what it predicts."""

    name: Literal["causal", "fill_in_middle", "masked", "span_corruption", "prefix"] = "causal"
    """causal and fill_in_middle for a decoder, masked for an encoder, span_corruption for an encoder-decoder, prefix
    for a decoder with model.prefix_attention or an encoder-decoder."""
    fill_in_middle_rate: float = field(0.5, minimum=0.0, maximum=1.0)
    """fill_in_middle: share of the documents that are rearranged (arXiv:2207.14255); the others stay causal."""
    suffix_first_rate: float = field(0.5, minimum=0.0, maximum=1.0)
    """fill_in_middle: share of the rearranged ones whose suffix is first (SPM); in the others it is second (PSM)."""
    mask_rate: float = field(0.15, minimum=0.001, maximum=0.9)
    """masked: share of the tokens that are predicted (BERT: 0.15, arXiv:1810.04805; ModernBERT: 0.3)."""
    whole_words: bool = True
    """masked: whether all tokens of a word are chosen together."""
    noise_density: float = field(0.15, minimum=0.001, maximum=0.9)
    """span_corruption: share of the tokens that are removed (arXiv:1910.10683)."""
    mean_span_length: float = field(3.0, minimum=1.0, maximum=1e6)
    """span_corruption: mean number of tokens of a removed span."""


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
    log_every: str = field("10 steps", kind="duration", change="free")
    """How often metrics are written and shown."""
    checkpoint_every: str = field("500 steps", kind="duration", change="free")
    """How often a checkpoint is written; one is always written at the end and after a stop request."""
    keep_checkpoints: int = field(2, minimum=1, change="free")
    """Newest checkpoints that are kept."""
    max_skipped_steps: int = field(20, minimum=0, change="free")
    """Consecutive steps with a non-finite loss or gradient after which the run ends with an error."""


@dataclass(kw_only=True)
class TrainConfig(RhythmConfig):
    """The length and intervals of a run: give max_steps or max_tokens."""

    max_tokens: Optional[int] = field(None, kind="count", minimum=1, change="by_name")
    """Input tokens of the run, e.g. 10B; rounded up to whole steps."""
    sequence_length: int = field(1024, kind="count", minimum=2, maximum=2**31 - 1)
    """Tokens of a row of text; an objective that cuts it in two defines the lengths of the parts."""
    z_loss: float = field(0.0, minimum=0.0, change="by_name")
    """Weight of the loss of the squared log-partition, which keeps logits small (PaLM, arXiv:2204.02311: 1e-4)."""


@dataclass(kw_only=True)
class ValidationConfig:
    """Loss on held-out text, and samples, inside a run."""

    every: str = field("500 steps", kind="duration")
    """How often, in addition to once at the end."""
    at_start: bool = False
    """Whether to measure before the first step too."""
    sources: dict[str, SourceConfig] = field(factory=dict)
    """Corpora whose validation split is read. Empty: those of data.sources that have one."""
    max_sequences: int = field(256, kind="count", minimum=0)
    """Sequences of each source, the same each time; 0 disables validation."""
    sample_prompts: list[str] = field(factory=list)
    """Texts that the model continues at each validation; shown, written to samples.jsonl and to the W&B table."""
    sample_tokens: int = field(48, minimum=1, maximum=2**24)
    """New tokens of each sample."""
    sample_temperature: float = field(0.8, minimum=0.0, maximum=1e3)
    """Temperature of the samples; 0 takes the most likely token."""


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
    warmup: str = field("1 %", kind="duration")
    """Linear rise from 0, as steps, tokens or % of the run."""
    decay: str = field("20 %", kind="duration")
    """warmup_stable_decay: length of the last part, in which the rate decreases linearly to minimum_factor."""
    minimum_factor: float = field(0.1, minimum=0.0, maximum=1.0)
    """The rate at the end, as a factor on the peak."""


@dataclass(kw_only=True)
class EngineConfig:
    """How DeepSpeed runs the model. All of these settings may change on resume."""

    zero_stage: int = field(1, minimum=0, maximum=3)
    """What is sharded over ranks. 0: nothing; 1: optimizer states; 2: gradients too; 3: parameters too."""
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    """Arithmetic of the model; master weights, optimizer states and gradient accumulation are always fp32."""
    offload_optimizer: Literal["none", "cpu"] = "none"
    """Where the optimizer's states are kept and its step runs (stages 1 to 3)."""
    offload_parameters: Literal["none", "cpu"] = "none"
    """Where parameters that are not in use are kept (stage 3)."""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """What the backward pass recomputes: nothing, all except matrix products and attention, or each whole block."""
    compile: bool = False
    """torch.compile of each block: slower to start, faster steps."""
    deterministic: bool = False
    """Use deterministic kernels on GPUs too, so that a resumed run equals an uninterrupted one; slower."""
    overlap_communication: bool = True
    """Reduce gradients during the backward pass (CUDA)."""
    bucket_size: int = field(50_000_000, kind="count", minimum=1)
    """Elements in one reduction or gathering."""
    timeout: str = field("30 min", kind="duration")
    """How long a collective of any process group may wait for another rank: 1 s to 30 days."""


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
    """Write a profiler trace and (CUDA) a memory snapshot of this step into the run folder. Empty: none."""


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


@dataclass(kw_only=True)
class RunConfig:
    """The settings of every training."""

    begins_with: ClassVar[str]
    """The setting that names the run whose weights this run starts with."""
    run_dir: str = field("", kind="path", change="free")
    """Folder of the run; the same command with the same folder resumes the run."""
    seed: int = field(1, minimum=0, maximum=2**63 - 1, change="never")
    """Seed of the initial weights, the data order, dropout and samples."""
    allow_changes: list[str] = field(factory=list, change="free")
    """Keys that may differ from the run being resumed, e.g. [optimizer.learning_rate, train.max_steps]; recorded.
    `checkpoints`: a run whose checkpoints are missing may start again at step 0; its earlier output is kept."""
    model: ModelConfig = section(ModelConfig, change="never")
    train: RhythmConfig = section(RhythmConfig, change="never")
    optimizer: OptimizerConfig = section(OptimizerConfig, change="by_name")
    schedule: ScheduleConfig = section(ScheduleConfig, change="by_name")
    distill: DistillConfig = section(DistillConfig, change="by_name")
    engine: EngineConfig = section(EngineConfig, change="free")
    track: TrackConfig = section(TrackConfig, change="free")
    deepspeed: dict[str, Any] = field(factory=dict, change="free")
    """Raw DeepSpeed keys for experienced users; one that contradicts a typed field is an error."""


@dataclass(kw_only=True)
class PretrainConfig(RunConfig):
    """A pretraining run."""

    begins_with = "init_from"
    init_from: Optional[str] = field(None, kind="path", change="never")
    """Run or checkpoint folder whose weights start this run; data, schedule and optimizer are this run's own."""
    data: DataConfig = section(DataConfig, change="never")
    objective: ObjectiveConfig = section(ObjectiveConfig, change="never")
    train: TrainConfig = section(TrainConfig, change="never")
    validation: ValidationConfig = section(ValidationConfig, change="by_name")
