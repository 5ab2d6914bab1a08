"""Every setting of a run, with its type, meaning, unit and default.

A field's docstring line is its documentation: `bigtx configs explain KEY` prints it, and so do config errors.
Resume compares configs field by field; `change` says what it allows (see fields.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Optional

from bigtx.config.fields import field, section

# OmegaConf reads these annotations at run time and knows Optional, not `X | None`.


@dataclass(kw_only=True)
class RopeScalingConfig:
    """How rotary positions reach beyond the length they were trained on."""

    method: Literal["none", "linear", "llama3", "yarn"] = "none"
    """none; linear (interpolation, arXiv:2306.15595); llama3 (by frequency, Llama 3.1); yarn (arXiv:2309.00071)."""
    factor: float = field(1.0, minimum=1.0)
    """How many times longer than `original_length` the reach becomes."""
    original_length: int = field(8192, kind="count", minimum=1)
    """Positions of the original training, for llama3 and yarn."""
    low_frequency_factor: float = 1.0
    """llama3: wave lengths above original_length / this are scaled fully."""
    high_frequency_factor: float = 4.0
    """llama3: wave lengths below original_length / this are left alone."""
    beta_fast: float = 32.0
    """yarn: rotations over original_length above which a frequency is left alone."""
    beta_slow: float = 1.0
    """yarn: rotations over original_length below which a frequency is scaled fully."""


@dataclass(kw_only=True)
class ModelConfig:
    """The Transformer. Llama-like by default: pre-norm RMSNorm, rotary positions, SwiGLU, no biases."""

    vocab_size: Optional[int] = field(None, kind="count", minimum=2)
    """Token ids of the tokenizer; empty takes it from the tokenizer. Padded to a multiple of 128 inside."""
    hidden_size: int = field(512, minimum=8)
    """Width D of the residual stream."""
    num_layers: int = field(8, minimum=1)
    """Blocks in the stack."""
    num_heads: int = field(8, minimum=1)
    """Query heads H."""
    num_kv_heads: Optional[int] = field(None, minimum=1)
    """Key and value heads K; a divisor of num_heads (grouped-query attention, arXiv:2305.13245). Empty: num_heads."""
    head_width: Optional[int] = field(None, minimum=2)
    """Width C of one head. Empty: hidden_size / num_heads."""
    mlp: Literal["swiglu", "geglu", "gelu", "relu2"] = "swiglu"
    """Feed-forward: gated (swiglu, geglu: arXiv:2002.05202), gelu, or squared ReLU (relu2: arXiv:2109.08668)."""
    mlp_size: Optional[int] = field(None, minimum=1)
    """Inner width. Empty: 4 D, or for the gated ones 8/3 D rounded up to a multiple of 64."""
    norm: Literal["rms", "layer"] = "rms"
    """RMSNorm (arXiv:1910.07467) or LayerNorm."""
    norm_placement: Literal["pre", "post"] = "pre"
    """pre: before each sublayer, and one at the end; post: after each residual sum, as in the 2017 Transformer."""
    norm_eps: float = 1e-5
    """Added to the variance."""
    norm_scale: bool = True
    """Whether norms have a learned scale."""
    norm_bias: bool = False
    """Whether layer norms have a learned bias."""
    qk_norm: bool = False
    """RMSNorm of queries and keys per head before the positions are applied (arXiv:2010.04245)."""
    positions: Literal["rope", "learned", "sinusoidal", "relative"] = "rope"
    """Rotary (arXiv:2104.09864), a learned table, fixed sinusoids, or T5's bucketed bias (arXiv:1910.10683)."""
    rope_theta: float = field(10000.0, minimum=1.0)
    """Base of the rotary frequencies."""
    rope_scaling: RopeScalingConfig = section(RopeScalingConfig, change="never")
    """How rotary positions are stretched."""
    relative_num_buckets: int = field(32, minimum=2)
    """Buckets of the relative bias."""
    relative_max_distance: int = field(128, minimum=2)
    """Distance from which all positions share the last bucket."""
    max_sequence_length: int = field(2048, kind="count", minimum=1)
    """Positions of a learned table, and the longest text that generation keeps."""
    attention_bias: bool = False
    """Biases on the query, key and value projections."""
    attention_output_bias: bool = False
    """A bias on the attention's output projection."""
    mlp_bias: bool = False
    """Biases in the feed-forward."""
    tie_embeddings: bool = False
    """Whether the head is the embedding table."""
    dropout: float = field(0.0, minimum=0.0, maximum=0.9)
    """Probability of dropping embeddings, attention weights and sublayer outputs."""
    logit_soft_cap: Optional[float] = field(None, minimum=1e-3)
    """cap * tanh(logits / cap), as in Gemma 2 (arXiv:2408.00118). Empty: none."""
    init_std: float = field(0.02, minimum=0.0)
    """Standard deviation of the initial weights."""
    init: Literal["normal", "scaled", "zero_projections"] = "scaled"
    """Output projections of the sublayers start as the others do, divided by sqrt(2 num_layers) (GPT-2), or at zero."""


@dataclass(kw_only=True)
class SourceConfig:
    """One prepared corpus in the mixture."""

    path: str = field("", change="by_name")
    """Folder written by `bigtx data prepare`, here or as a URL (https://, s3://, gs://)."""
    weight: float = field(1.0, minimum=0.0)
    """Share of the sequences, relative to the other sources' weights."""
    max_epochs: Optional[float] = field(None, minimum=0.0, change="by_name")
    """Refuse to start if the run would repeat this source more often. Empty: repeat as needed."""


@dataclass(kw_only=True)
class PhaseConfig:
    """Other weights from some point of the run on."""

    start: Optional[int] = field(None, kind="count", minimum=1)
    """Tokens of the global order before the phase, e.g. 8B, those of data.skip included; up to a whole sequence."""
    weights: dict[str, float] = field(factory=dict, minimum=0.0)
    """Weights by source; 0 reads none of it. Sources that are not named have their own weight."""


@dataclass(kw_only=True)
class ForeignConfig:
    """Plain webdataset text shards, tokenized on the fly instead of data.sources; exact resume needs prepared ones."""

    paths: list[str] = field(factory=list, change="by_name")
    """Tar shards: files or URLs, braces for numbers in quotes, e.g. ['https://host/{0000..0099}.tar']."""
    tokenizer: str = field("", change="by_name")
    """Folder of the tokenizer."""
    member: str = "txt"
    """Suffix of the member that holds a sample's text; json: in its field text_field."""
    text_field: str = "text"
    """Key of the text in a JSON member."""
    shuffle_buffer: int = field(1000, kind="count", minimum=0)
    """Samples of each worker among which the next one is drawn; 0 keeps the shards' order."""
    num_workers: int = field(1, minimum=1)
    """Tokenizing processes of each rank, at most as many as it has shards."""


@dataclass(kw_only=True)
class DataConfig:
    """What the model reads."""

    sources: dict[str, SourceConfig] = field(factory=dict)
    """Prepared corpora by name."""
    phases: dict[str, PhaseConfig] = field(factory=dict)
    """Later weights of the sources, by a name of each phase; before the first of them, their own weights hold."""
    skip: list[str] = field(factory=list, change="by_name")
    """Sequences of the run to pass over, e.g. after a loss spike: ranges START-END, where END is read again."""
    document_mask: bool = False
    """Keep attention and positions inside each document of a packed row, and never predict across a boundary."""
    prefetch_batches: int = field(4, minimum=0, change="free")
    """Micro batches read ahead in a thread; 0 reads in the loop."""
    cache_dir: str = field("~/.cache/bigtx", change="free")
    """Folder on this machine for blocks of remote corpora; all runs may share it."""
    cache_size: int = field(21_474_836_480, kind="size", minimum=0, change="free")
    """Most bytes in cache_dir; blocks that were not used for longest make room."""
    foreign: ForeignConfig = field(factory=ForeignConfig)


@dataclass(kw_only=True)
class TrainConfig:
    """The length and rhythm of a run."""

    max_steps: Optional[int] = field(None, kind="count", minimum=0, change="by_name")
    """Optimizer steps of the run; give this or max_tokens."""
    max_tokens: Optional[int] = field(None, kind="count", minimum=1, change="by_name")
    """Input tokens of the run, e.g. 10B; rounded up to whole steps."""
    sequence_length: int = field(1024, kind="count", minimum=2)
    """Tokens T of a row."""
    global_batch_size: int = field(32, kind="count", minimum=1)
    """Sequences of one optimizer step over all ranks: the invariant of a run."""
    micro_batch_size: int = field(4, minimum=1, change="free")
    """Sequences of one forward pass on one rank; global_batch_size / (ranks * micro_batch_size) of them make a step."""
    gradient_clipping: float = field(1.0, minimum=0.0, change="by_name")
    """Largest global norm of the gradient; 0 clips nothing."""
    z_loss: float = field(0.0, minimum=0.0, change="by_name")
    """Weight of the squared log-partition that keeps logits small (PaLM, arXiv:2204.02311: 1e-4)."""
    log_every: str = field("10 steps", kind="duration", change="free")
    """How often metrics are written and shown."""
    checkpoint_every: str = field("500 steps", kind="duration", change="free")
    """How often a checkpoint is written; one is always written at the end and after a stop request."""
    keep_checkpoints: int = field(2, minimum=1, change="free")
    """Newest checkpoints that are kept."""
    max_skipped_steps: int = field(20, minimum=0, change="free")
    """Consecutive steps with a non-finite loss or gradient after which the run ends with an error."""


@dataclass(kw_only=True)
class ValidationConfig:
    """Loss on held-out text, and samples, inside a run."""

    every: str = field("500 steps", kind="duration")
    """How often, beside once at the end."""
    at_start: bool = False
    """Whether also before the first step."""
    sources: dict[str, SourceConfig] = field(factory=dict)
    """Corpora whose validation split is read. Empty: those of data.sources that have one."""
    max_sequences: int = field(256, kind="count", minimum=0)
    """Sequences read of each source, the same each time; 0 validates nothing."""
    sample_prompts: list[str] = field(factory=list)
    """Texts that the model continues at each validation; shown, written to samples.jsonl and to the W&B table."""
    sample_tokens: int = field(48, minimum=1)
    """New tokens of each sample."""
    sample_temperature: float = field(0.8, minimum=0.0)
    """0 takes the likeliest token."""


@dataclass(kw_only=True)
class OptimizerConfig:
    """AdamW (arXiv:1711.05101), or Muon for the blocks' matrices with AdamW for all other parameters."""

    name: Literal["adamw", "muon"] = field("adamw", change="never")
    """adamw or muon."""
    learning_rate: float = field(3e-4, minimum=0.0)
    """Peak rate of AdamW."""
    beta1: float = field(0.9, minimum=0.0, maximum=0.999999)
    """AdamW's decay of the mean gradient."""
    beta2: float = field(0.95, minimum=0.0, maximum=0.999999)
    """AdamW's decay of the mean squared gradient."""
    eps: float = field(1e-8, minimum=0.0)
    """AdamW's addition to the denominator."""
    weight_decay: float = field(0.1, minimum=0.0)
    """Decoupled decay of matrices; norms and biases are spared."""
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
    ema_decay: Optional[float] = field(None, minimum=0.0, maximum=0.9999999, change="never")
    """Keep an exponential average of the weights with this decay per step, beside the weights. Empty: none."""


@dataclass(kw_only=True)
class ScheduleConfig:
    """The learning rate over the run, as a factor on each peak rate."""

    name: Literal["cosine", "warmup_stable_decay", "constant"] = "cosine"
    """Shape after the warm-up."""
    warmup: str = field("1 %", kind="duration")
    """Linear rise from 0, as steps, tokens or % of the run."""
    decay: str = field("20 %", kind="duration")
    """warmup_stable_decay: length of the last part, in which the rate falls linearly to minimum_factor."""
    minimum_factor: float = field(0.1, minimum=0.0, maximum=1.0)
    """The rate at the end, as a factor on the peak."""


@dataclass(kw_only=True)
class EngineConfig:
    """How DeepSpeed runs the model. Everything here may change at resume."""

    zero_stage: int = field(1, minimum=0, maximum=3)
    """What is sharded over ranks: 0 nothing, 1 optimizer states, 2 and gradients, 3 and parameters."""
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    """Arithmetic of the model; master weights, optimizer states and gradient accumulation are always fp32."""
    offload_optimizer: Literal["none", "cpu"] = "none"
    """Where the optimizer's states live and its step runs (stages 1 to 3)."""
    offload_parameters: Literal["none", "cpu"] = "none"
    """Where idle parameters live (stage 3)."""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """Recompute in the backward pass: nothing, all but matrix products and attention, or each whole block."""
    compile: bool = False
    """torch.compile of each block: slower to start, faster steps."""
    deterministic: bool = False
    """Kernels that give the same bits each time also on GPUs, so that a resumed run equals an unbroken one; slower."""
    overlap_communication: bool = True
    """Reduce gradients while the backward pass goes on (CUDA)."""
    bucket_size: int = field(50_000_000, kind="count", minimum=1)
    """Elements in one reduction or gathering."""
    timeout: str = field("30 min", kind="duration")
    """How long a collective may wait for another rank."""


@dataclass(kw_only=True)
class TrackConfig:
    """Where a run's numbers go; metrics.jsonl is always written."""

    wandb: Literal["auto", "online", "offline", "off"] = "auto"
    """auto: online with a key and a host that answers, else offline."""
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
class PretrainConfig:
    """A pretraining run."""

    run_dir: str = field("", change="free")
    """Folder of the run; the same command on the same folder goes on where it was."""
    seed: int = field(1, minimum=0, maximum=2**63 - 1, change="never")
    """Seed of the initial weights, the data order, dropout and samples."""
    init_from: Optional[str] = field(None, change="never")
    """Run or checkpoint folder whose weights start this run; data, schedule and optimizer are this run's own."""
    allow_changes: list[str] = field(factory=list, change="free")
    """Keys that may differ from the run being resumed, e.g. [optimizer.learning_rate, train.max_steps]; recorded."""
    model: ModelConfig = section(ModelConfig, change="never")
    data: DataConfig = section(DataConfig, change="never")
    train: TrainConfig = section(TrainConfig, change="never")
    validation: ValidationConfig = section(ValidationConfig, change="by_name")
    optimizer: OptimizerConfig = section(OptimizerConfig, change="by_name")
    schedule: ScheduleConfig = section(ScheduleConfig, change="by_name")
    engine: EngineConfig = section(EngineConfig, change="free")
    track: TrackConfig = section(TrackConfig, change="free")
    deepspeed: dict[str, Any] = field(factory=dict, change="free")
    """Raw DeepSpeed keys for experts; one that contradicts a typed field is an error."""


@dataclass(kw_only=True)
class InputConfig:
    """Raw text: which files, and where in them the text is."""

    paths: list[str] = field(factory=list)
    """Files, folders, globs, {000..010}: text, .jsonl, .csv, .tsv, .parquet, .tar; also https://, s3://, gs://."""
    text_field: str = "text"
    """Key or column of the text; a name with dots leads through nested records: article.body."""
    id_field: str = ""
    """Key or column of a document's own id. Empty: none; text files have their path within the folder."""
    source_field: str = ""
    """Key or column that says where a document is from. Empty: none."""
    language_field: str = ""
    """Key or column of a document's language. Empty: none."""
    quoted_fields: bool = True
    """Whether fields of .csv and .tsv may stand in quotation marks (RFC 4180); false takes the marks as text."""
    text_suffixes: list[str] = field(factory=lambda: [".txt", ".md"])
    """Suffixes of files that are one document each; other files of a folder are passed over, and counted."""
    exclude: list[str] = field(factory=list)
    """What to leave out of folders and globs: names at any depth (test, '*.min.md') or paths ('api/*.txt')."""
    document_per_line: bool = False
    """Whether each line of a text file is a document of its own."""
    max_rejects: float = field(0.001, minimum=0.0, maximum=1.0)
    """Share of unreadable documents above which the job ends with an error; each is listed in rejects.jsonl."""


@dataclass(kw_only=True)
class TokenizerTrainConfig:
    """Learn a sentencepiece tokenizer from text files."""

    input: InputConfig = field(factory=InputConfig)
    output: str = ""
    """Folder of the new tokenizer."""
    vocab_size: int = field(16_384, kind="count", minimum=512)
    """Ids, the reserved ones (105 and the chat roles) and the 256 bytes included."""
    method: Literal["bpe", "unigram"] = "bpe"
    """Byte-pair encoding (arXiv:1508.07909) or a unigram language model (arXiv:1804.10959)."""
    max_bytes: int = field(100_000_000, kind="size", minimum=1)
    """Text to learn from; of a larger input a seeded sample of this size is drawn, by the hashes of its parts."""
    split_digits: bool = True
    """Whether each digit is a piece of its own."""
    whitespace_pieces: bool = True
    """Whether runs of white space may be one piece (good for source code)."""
    chat_roles: list[str] = field(factory=lambda: ["system", "user", "assistant", "tool"])
    """Names of chat roles; each gets a reserved id."""
    seed: int = 1
    """Seed of the sample."""


@dataclass(kw_only=True)
class CleanConfig:
    """What is changed in each text before anything else. Nothing by default."""

    repair_unicode: bool = False
    """Mend wrongly decoded text, stray HTML entities and control characters, by ftfy; the extra `clean`."""
    replace_emails: bool = False
    """Put email@example.com in place of mail addresses."""
    replace_ip_addresses: bool = False
    """Put 192.0.2.1 or 2001:db8::1 in place of public IP addresses (also of version numbers that look like one)."""


@dataclass(kw_only=True)
class FilterConfig:
    """Which documents are left out. Nothing by default; a group switches on its paper's limits.

    A limit that is given counts instead of its group's, and on its own where the group is off; one that cannot bind,
    such as min_words=0 or max_bullet_lines=1, takes a rule out of its group. Words are separated by white space.
    """

    gopher_quality: bool = False
    """Gopher's rules of quality (arXiv:2112.11446, A.1): min_words to min_stop_words below."""
    gopher_repetition: bool = False
    """Gopher's rules of repetition (arXiv:2112.11446, table A1): max_duplicate_lines to max_duplicate_ngrams below."""
    c4: bool = False
    """C4's rules (arXiv:1910.10683, 2.2), without its word list: unfit lines are cut out, unfit pages left out."""
    languages: list[str] = field(factory=list)
    """Languages to keep, e.g. [en, de], as the document's own language says, else detected (the extra `language`)."""
    min_language_probability: float = field(0.65, minimum=0.0, maximum=1.0)
    """Least probability of a detected language (FineWeb's, arXiv:2406.17557)."""

    min_words: Optional[int] = field(None, kind="count", minimum=0)
    """Fewest words of a document; Gopher: 50."""
    max_words: Optional[int] = field(None, kind="count", minimum=1)
    """Most words of a document; Gopher: 100,000."""
    min_mean_word_length: Optional[float] = field(None, minimum=0.0)
    """Least mean of characters in a word; Gopher: 3."""
    max_mean_word_length: Optional[float] = field(None, minimum=0.0)
    """Largest mean of characters in a word; Gopher: 10."""
    max_symbol_ratio: Optional[float] = field(None, minimum=0.0)
    """Most hash signs a word, and most ellipses a word; Gopher: 0.1."""
    max_bullet_lines: Optional[float] = field(None, minimum=0.0, maximum=1.0)
    """Largest share of lines that begin with a bullet; Gopher: 0.9."""
    max_ellipsis_lines: Optional[float] = field(None, minimum=0.0, maximum=1.0)
    """Largest share of lines that end with an ellipsis; Gopher: 0.3."""
    min_alphabetic_words: Optional[float] = field(None, minimum=0.0, maximum=1.0)
    """Least share of words with a letter in them; Gopher: 0.8."""
    min_stop_words: Optional[int] = field(None, minimum=0, maximum=8)
    """How many of `the be to of and that have with` must be in the text; Gopher: 2. For English alone."""

    max_duplicate_lines: Optional[float] = field(None, minimum=0.0, maximum=1.0)
    """Largest share of lines that stand earlier in the document already; Gopher: 0.3."""
    max_duplicate_line_characters: Optional[float] = field(None, minimum=0.0, maximum=1.0)
    """The same by characters; Gopher: 0.2."""
    max_duplicate_paragraphs: Optional[float] = field(None, minimum=0.0, maximum=1.0)
    """Largest share of paragraphs that stand earlier in the document already; Gopher: 0.3."""
    max_duplicate_paragraph_characters: Optional[float] = field(None, minimum=0.0, maximum=1.0)
    """The same by characters; Gopher: 0.2."""
    max_top_ngrams: list[float] = field(factory=list, minimum=0.0, maximum=1.0)
    """Largest share of characters in the most frequent 2-, 3- ... gram of words; Gopher: [0.2, 0.18, 0.16]."""
    max_duplicate_ngrams: list[float] = field(factory=list, minimum=0.0, maximum=1.0)
    """Largest share of characters in repeated 5-, 6- ... grams; Gopher: [0.15, 0.14, 0.13, 0.12, 0.11, 0.1]."""

    terminal_punctuation: Optional[bool] = None
    """Cut out lines that end without a terminal punctuation mark; C4: true (FineWeb uses C4's rules without it)."""
    min_line_words: Optional[int] = field(None, minimum=0)
    """Cut out lines of fewer words; C4: 5."""
    min_sentences: Optional[int] = field(None, minimum=0)
    """Fewest sentences of what the lines leave; C4: 3."""


@dataclass(kw_only=True)
class NearDuplicateConfig:
    """Leave out documents that are almost equal to an earlier one: MinHash (Broder 1997) with locality-sensitive bands.

    Two documents with the Jaccard similarity s of their n-grams are compared with the probability
    1 - (1 - s^rows_per_band)^num_bands, and the later one is left out if their signatures agree by `threshold`.
    """

    enabled: bool = False
    """Whether near duplicates are looked for."""
    threshold: float = field(0.8, minimum=0.0, maximum=1.0)
    """Similarity from which a document counts as a near duplicate."""
    ngram: int = field(5, minimum=1)
    """Words of an n-gram; they are compared in lower case and without punctuation."""
    num_bands: int = field(14, minimum=1)
    """Bands of a signature (FineWeb: 14 of 8 rows, arXiv:2406.17557); documents that share one are compared."""
    rows_per_band: int = field(8, minimum=1)
    """Hashes of a band; num_bands times as many are a signature, 2 bytes each."""
    seed: int = field(1, minimum=0, maximum=2**63 - 1)
    """Seed of the hash functions."""


@dataclass(kw_only=True)
class DecontaminateConfig:
    """Leave out documents that share an n-gram of words with evaluation sets. Nothing by default."""

    paths: list[str] = field(factory=list)
    """Evaluation sets: files, folders or globs, in the formats of input.paths."""
    text_field: str = "text"
    """Key of the text in JSON lines."""
    document_per_line: bool = False
    """Whether each line of a text file is a text of its own."""
    ngram: int = field(13, minimum=2)
    """Words in a row that must be equal, in lower case and without punctuation (GPT-3, arXiv:2005.14165: 13)."""
    min_words: int = field(8, minimum=2)
    """Evaluation texts shorter than an n-gram count as a whole if they have so many words (GPT-3: 8), else not."""


@dataclass(kw_only=True)
class PrepareConfig:
    """Turn text files into tokenized shards."""

    input: InputConfig = field(factory=InputConfig)
    output: str = ""
    """Folder of the prepared corpus."""
    tokenizer: str = ""
    """Folder of the tokenizer."""
    clean: CleanConfig = field(factory=CleanConfig)
    filters: FilterConfig = field(factory=FilterConfig)
    near_duplicates: NearDuplicateConfig = field(factory=NearDuplicateConfig)
    decontaminate: DecontaminateConfig = field(factory=DecontaminateConfig)
    validation_fraction: float = field(0.005, minimum=0.0, maximum=0.5)
    """Share of the documents held out, chosen by a hash of the text."""
    block_tokens: int = field(262_144, kind="count", minimum=16)
    """Tokens of a block, the unit of reading and shuffling."""
    shard_size: int = field(67_108_864, kind="size", minimum=1)
    """Least bytes of a shard, but the last; whole blocks. A shard is written by one process."""
    seed: int = 1
    """Seed of the document shuffle."""
    exact_duplicates: Literal["remove", "keep"] = "remove"
    """Whether each text is kept once, the first in reading order."""
    memory: int = field(2_147_483_648, kind="size", minimum=1 << 26)
    """Bytes that all processes together may hold in buffers, beside some 100 MiB for each process itself."""
    num_processes: int = field(0, minimum=0)
    """Tokenizing processes; 0 uses every core."""
