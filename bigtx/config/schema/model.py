"""The Transformer: every field of its architecture, and the rules between them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Optional

from bigtx.config.nodes import Problem, idle, idle_settings
from bigtx.config.settings import field, section
from bigtx.config.shape import useless_targets


@dataclass(kw_only=True)
class RopeScalingConfig:
    """How rotary positions are extended beyond the length that they were trained on."""

    method: Literal["none", "linear", "llama3", "yarn"] = "none"
    """none; linear (interpolation, arXiv:2306.15595); llama3 (by frequency, Llama 3.1); yarn (arXiv:2309.00071)."""
    factor: float = field(1.0, minimum=1.0, maximum=1e6)
    """Factor by which the positions are extended beyond `original_length`."""
    original_length: int = field(8192, kind="count", minimum=1)
    """Positions of the original training, for llama3 and yarn."""
    low_frequency_factor: float = field(1.0, minimum=1e-3, maximum=1e6)
    """llama3: wave lengths above original_length / this are scaled fully."""
    high_frequency_factor: float = field(4.0, minimum=1e-3, maximum=1e6)
    """llama3: wave lengths below original_length / this are not changed."""
    beta_fast: float = field(32.0, minimum=1e-3, maximum=1e6)
    """yarn: rotations over original_length above which a frequency is not changed."""
    beta_slow: float = field(1.0, minimum=1e-3, maximum=1e6)
    """yarn: rotations over original_length below which a frequency is scaled fully."""

    def problems(self, positions: str) -> Iterator[Problem]:
        """Yield a problem for limits in the wrong order, and for positions that cannot be extended."""
        if positions != "rope" and self.method != "none":
            what = f"stretches rotary positions, but model.positions={positions}; write none"
            yield Problem("model.rope_scaling.method", self.method, what)
        for method, low, high in (
            ("llama3", "low_frequency_factor", "high_frequency_factor"),
            ("yarn", "beta_slow", "beta_fast"),
        ):
            if self.method == method and getattr(self, low) >= getattr(self, high):
                what = f"is not below model.rope_scaling.{high}={getattr(self, high)}; write a smaller number"
                yield Problem(
                    f"model.rope_scaling.{low}", str(getattr(self, low)), what, related=(f"model.rope_scaling.{high}",)
                )


@dataclass(kw_only=True)
class ExpertsConfig:
    """A mixture of experts in place of each block's feed-forward (arXiv:1701.06538); for decoders only."""

    num_experts: int = field(0, minimum=0, maximum=65_536)
    """Experts of each block; 0 is the plain feed-forward."""
    num_active: int = field(2, minimum=1, maximum=65_536)
    """Experts that each token is sent to."""
    expert_size: Optional[int] = field(None, minimum=1, maximum=2**24)
    """Inner width of one expert. Empty: the feed-forward's own width."""
    shared_size: int = field(0, minimum=0, maximum=2**24)
    """Inner width of an expert that every token is sent to in addition (arXiv:2401.06066); 0: none."""
    shared_gate: bool = False
    """Whether a sigmoid of each token weights the shared expert (Qwen2-MoE)."""
    normalize_weights: bool = True
    """Whether the weights of a token's experts are normalized to the sum one, as in Mixtral."""
    balance_loss: float = field(0.01, minimum=0.0, change="by_name")
    """Weight of the loss that spreads tokens over the experts (arXiv:2101.03961, equation 4)."""
    router_z_loss: float = field(0.0, minimum=0.0, change="by_name")
    """Weight of the squared log-partition of the router (arXiv:2202.08906: 1e-3)."""

    def problems(self, model: ModelConfig) -> Iterator[Problem]:
        """Yield a problem where experts do not fit the model, and for settings of experts without experts."""
        if not self.num_experts:
            yield from idle_settings(self, "model.experts", "without model.experts.num_experts=N")
            return
        count = str(self.num_experts)
        if model.shape != "decoder":
            what = f"only a decoder has experts, but model.shape={model.shape}; write 0, or model.shape=decoder"
            yield Problem("model.experts.num_experts", count, what, related=("model.shape",))
        if self.num_active > self.num_experts:
            what = f"is more than model.experts.num_experts={count}; write at most {count}"
            yield Problem(
                "model.experts.num_active", str(self.num_active), what, related=("model.experts.num_experts",)
            )
        if model.mlp_bias:
            what = "experts have no biases; write false, or model.experts.num_experts=0"
            yield Problem("model.mlp_bias", "true", what)
        if self.shared_gate and not self.shared_size:
            yield idle("model.experts.shared_gate", "true", False, "without model.experts.shared_size=N")


@dataclass(kw_only=True)
class AudioConfig:
    """The input of an audio encoder: a log-mel spectrogram through convolutions (arXiv:2212.04356)."""

    num_mel_bins: int = field(0, minimum=0, maximum=4096)
    """Bands of the spectrogram, usually 80; 0: the encoder reads tokens."""
    sample_rate: int = field(16_000, kind="count", minimum=1000, maximum=1_000_000)
    """Samples per second; recordings of another rate are resampled."""
    window_ms: float = field(25.0, minimum=1.0, maximum=10_000.0)
    """Milliseconds of one window of the spectrogram."""
    hop_ms: float = field(10.0, minimum=1.0, maximum=10_000.0)
    """Milliseconds from one frame to the next."""
    strides: list[int] = field(factory=lambda: [1, 2], minimum=1, maximum=64)
    """Strides of the convolutions over frames, of width 3; as many frames as their product become one column."""

    def problems(self, model: ModelConfig) -> Iterator[Problem]:
        """Yield a problem where audio does not fit the model, and for settings of audio without audio."""
        if not self.num_mel_bins:
            yield from idle_settings(self, "model.audio", "without model.audio.num_mel_bins=N")
            return
        if model.shape == "decoder":
            what = "audio needs an encoder, but model.shape=decoder; write 0, or model.shape=encoder_decoder or encoder"
            yield Problem("model.audio.num_mel_bins", str(self.num_mel_bins), what, related=("model.shape",))
        if not self.strides:
            yield Problem("model.audio.strides", "[]", "at least one convolution is needed; write its stride, e.g. [2]")
        if model.shape == "encoder" and model.tie_embeddings:
            yield Problem("model.tie_embeddings", "true", "an audio encoder has no table of tokens; write false")
        if model.shape == "encoder" and model.bigram_rows:
            yield Problem("model.bigram_rows", str(model.bigram_rows), "an audio encoder reads no tokens; write 0")


@dataclass(kw_only=True)
class LoraConfig:
    """Low-rank adapters for matrices of the blocks (arXiv:2106.09685): W x + alpha / rank * B A x. If there are
    any, the model's own weights do not change; see also optimizer.train_also."""

    rank: int = field(0, minimum=0, maximum=65_536)
    """Rows of A and columns of B; 0: no adapters."""
    alpha: float = field(16.0, minimum=1e-6)
    """The output of the adapters is multiplied by alpha / rank."""
    dropout: float = field(0.0, minimum=0.0, maximum=0.9)
    """Probability of dropping an input of an adapter."""
    targets: list[str] = field(factory=list)
    """Globs of matrices in a block (attention.query, mlp.*) or in the model (decoder.blocks.3.*). Empty: all."""

    def problems(self, model: ModelConfig) -> Iterator[Problem]:
        """Yield a problem for a glob that matches no matrix, and for settings of adapters without adapters."""
        if not self.rank:
            yield from idle_settings(self, "model.lora", "without model.lora.rank=N")
            return
        for glob, near in useless_targets(model).items():
            what = f"matches no matrix of a block; the names are {', '.join(near)}"
            if model.experts.num_experts and "mlp".startswith(glob.rpartition(".")[0]):
                what += " (the matrices of a mixture's experts, and its router, have no adapters)"
            yield Problem("model.lora.targets", glob, what)


@dataclass(kw_only=True)
class ModelConfig:
    """The Transformer. Llama-like by default: a pre-norm decoder, RMSNorm, rotary positions, SwiGLU, no biases."""

    shape: Literal["decoder", "encoder", "encoder_decoder"] = "decoder"
    """decoder (predicts what follows), encoder (reads both ways), or both, joined by cross attention."""
    vocab_size: Optional[int] = field(None, kind="count", minimum=2, maximum=2**31 - 1)
    """Token ids of the tokenizer; empty takes it from the tokenizer. Padded to a multiple of 128 internally."""
    hidden_size: int = field(512, minimum=8, maximum=2**20)
    """Width D of the residual stream."""
    num_layers: int = field(8, minimum=1, maximum=10_000)
    """Blocks in the stack; in an encoder-decoder, the blocks in the encoder."""
    num_decoder_layers: Optional[int] = field(None, minimum=1, maximum=10_000)
    """Blocks in the decoder of an encoder-decoder. Empty: num_layers."""
    num_heads: int = field(8, minimum=1, maximum=65_536)
    """Query heads H."""
    num_kv_heads: Optional[int] = field(None, minimum=1, maximum=65_536)
    """Key and value heads K; a divisor of num_heads (grouped-query attention, arXiv:2305.13245). Empty: num_heads."""
    head_width: Optional[int] = field(None, minimum=2, maximum=65_536)
    """Width C of one head. Empty: hidden_size / num_heads."""
    mlp: Literal["swiglu", "geglu", "geglu_tanh", "gelu", "gelu_tanh", "relu", "relu2"] = "swiglu"
    """Feed-forward: gated (swiglu, geglu: arXiv:2002.05202), gelu, relu, or its square (relu2: arXiv:2109.08668)."""
    mlp_size: Optional[int] = field(None, minimum=1, maximum=2**24)
    """Inner width. Empty: 4 D, or for the gated ones 8/3 D rounded up to a multiple of 64."""
    experts: ExpertsConfig = section(ExpertsConfig, change="never")
    """Several feed-forwards in each block, of which each token uses a few."""
    audio: AudioConfig = section(AudioConfig, change="never")
    """The audio input of an encoder, in place of tokens."""
    norm: Literal["rms", "layer"] = "rms"
    """RMSNorm (arXiv:1910.07467) or LayerNorm."""
    norm_placement: Literal["pre", "post"] = "pre"
    """pre: a norm before each sublayer, and one at the end; post: after each residual sum, as in the 2017 Transformer.
    """
    embedding_norm: bool = False
    """A norm of the embeddings; the first block of a pre-norm stack then has no norm with a scale before its attention.
    """
    bigram_rows: int = field(0, minimum=0, maximum=2**31 - 1)
    """Rows of a table of pairs of adjacent tokens, which is added to the embeddings; pairs share rows by a
    hash (arXiv:2501.16975). It costs memory and almost no arithmetic. 0: none."""
    bigram_size: Optional[int] = field(None, minimum=1, maximum=2**20)
    """Width of the rows; a matrix projects narrower ones to hidden_size. Empty: hidden_size."""
    norm_eps: float = field(1e-5, minimum=1e-15, maximum=1.0)
    """The constant that norms add to the variance."""
    norm_scale: bool = True
    """Whether norms have a learned scale."""
    norm_bias: bool = False
    """Whether layer norms have a learned bias."""
    qk_norm: bool = False
    """RMSNorm of queries and keys per head before the positions are applied (arXiv:2010.04245)."""
    attention_scale: Optional[float] = field(None, minimum=1e-6)
    """Factor on the products of queries and keys; T5 has 1. Empty: 1 / sqrt(head_width)."""
    attention_window: Optional[int] = field(None, kind="count", minimum=1)
    """Most positions between a token and the tokens that it attends to, in each direction. Empty: no limit."""
    global_attention_every: Optional[int] = field(None, minimum=1)
    """Blocks 0, n, 2 n ... attend to all tokens despite attention_window. Empty: none of them."""
    prefix_attention: bool = False
    """In a decoder, the tokens of a prefix attend to each other in both directions (prefix language model,
    arXiv:1910.10683).
    """
    positions: Literal["rope", "learned", "sinusoidal", "relative"] = "rope"
    """Rotary (arXiv:2104.09864), a learned table, fixed sinusoids, or T5's bucketed bias (arXiv:1910.10683)."""
    position_offset: int = field(0, minimum=0, maximum=65_536)
    """Rows of a learned table before the row of the first position; RoBERTa has 2."""
    rope_theta: float = field(10000.0, minimum=2.0)
    """Base of the rotary frequencies."""
    local_rope_theta: Optional[float] = field(None, minimum=2.0)
    """Base of the rotary frequencies in blocks with an attention_window. Empty: rope_theta."""
    rope_scaling: RopeScalingConfig = section(RopeScalingConfig, change="never")
    """How rotary positions are stretched."""
    relative_num_buckets: int = field(32, minimum=4, maximum=65_536)
    """Buckets of the relative bias."""
    relative_max_distance: int = field(128, minimum=2)
    """Distance from which all positions share the last bucket."""
    max_sequence_length: int = field(2048, kind="count", minimum=1)
    """Positions of a learned table, and the longest context of generation."""
    num_token_types: int = field(0, minimum=0, maximum=65_536)
    """Rows of a learned table of token types, which distinguish the texts of a pair (BERT: 2); 0: none."""
    attention_bias: bool = False
    """Biases on the query, key and value projections."""
    attention_output_bias: bool = False
    """A bias on the attention's output projection."""
    mlp_bias: bool = False
    """Biases in the feed-forward."""
    tie_embeddings: bool = False
    """Whether the head and the embedding table are the same matrix."""
    head_bias: bool = False
    """A bias on the logits."""
    head_transform: bool = False
    """A linear map, GELU and a norm before the head, as in BERT."""
    num_classes: Optional[int] = field(None, minimum=2, maximum=2**24)
    """Number of classes of a classifier, whose head replaces that of tokens. Empty: the head of tokens."""
    class_head: Optional[Literal["transform", "pooler", "score"]] = None
    """How that head computes logits of a summary. transform: through head_transform, if the model has it, and a matrix
    with a bias (ModernBERT); pooler: a linear map, tanh, and a matrix with a bias (BERT); score: a matrix alone
    (Llama). Empty: transform; task=classify takes score in a decoder, pooler in an encoder with norm_placement=post."""
    dropout: float = field(0.0, minimum=0.0, maximum=0.9)
    """Probability of dropping embeddings, attention weights and sublayer outputs."""
    attention_dropout: Optional[float] = field(None, minimum=0.0, maximum=0.9)
    """Probability of dropping attention weights. Empty: as dropout. 0 allows the fastest kernels, which have no
    dropout.
    """
    lora: LoraConfig = section(LoraConfig, change="never")
    """Adapters that are trained in place of the weights. Not inherited from a base, whose own adapters are merged."""
    logit_scale: float = field(1.0, minimum=1e-6)
    """Factor on the input of the head; T5 with a tied head has 1 / sqrt(hidden_size)."""
    logit_soft_cap: Optional[float] = field(None, minimum=1e-3)
    """cap * tanh(logits / cap), as in Gemma 2 (arXiv:2408.00118). Empty: none."""
    init_std: float = field(0.02, minimum=1e-9, maximum=1e3)
    """Standard deviation of the initial weights."""
    init: Literal["normal", "scaled", "zero_projections"] = "scaled"
    """Initial output projections of the sublayers: as the others, divided by sqrt(2 num_layers) (GPT-2), or zero."""

    def problems(self) -> Iterator[Problem]:
        """Yield a problem for settings that do not fit each other, or that would have no effect."""
        yield from self.head_problems()
        if self.norm == "rms" and self.norm_bias:
            yield Problem("model.norm_bias", "true", "an RMSNorm has no bias; write false, or model.norm=layer")
        if self.positions == "relative" and self.relative_max_distance <= self.relative_num_buckets // 2:
            what = (
                f"half of model.relative_num_buckets={self.relative_num_buckets} are exact distances; write a larger "
                "one"
            )
            yield Problem("model.relative_max_distance", str(self.relative_max_distance), what)
        yield from self.rope_scaling.problems(self.positions)
        yield from self.experts.problems(self)
        yield from self.lora.problems(self)
        yield from self.audio.problems(self)
        has_window = self.attention_window is not None
        for name, has_effect, needed in (
            ("num_decoder_layers", self.shape == "encoder_decoder", "shape=encoder_decoder"),
            ("prefix_attention", self.shape == "decoder", "shape=decoder"),
            ("global_attention_every", has_window, "attention_window=N"),
            ("local_rope_theta", has_window and self.positions == "rope", "attention_window=N"),
            ("bigram_size", self.bigram_rows > 0, "bigram_rows=N"),
            ("position_offset", self.positions == "learned", "positions=learned"),
        ):
            if not has_effect:
                yield from idle_settings(self, "model", f"without model.{needed}", [name])

    def head_problems(self) -> Iterator[Problem]:
        """Yield a problem for numbers with which no model can be built."""
        width, heads = self.hidden_size, self.num_heads
        if self.head_width is None and width % heads:
            is_halved = self.positions == "rope" and width % 2 == 0  # Heads of an odd width would be refused next.
            near = _nearby_divisors(width // 2 if is_halved else width, heads)
            what = f"does not divide model.hidden_size={width}; {near} do, or set model.head_width"
            yield Problem("model.num_heads", str(heads), what)
        elif self.positions == "rope" and (head_width := self.head_width or width // heads) % 2:
            what = f"gives heads {head_width} wide, and rotary positions need an even width"
            yield Problem(
                "model.num_heads" if self.head_width is None else "model.head_width",
                str(self.head_width or heads),
                what,
            )
        if self.num_kv_heads is not None and heads % self.num_kv_heads:
            near = _nearby_divisors(heads, self.num_kv_heads)
            yield Problem(
                "model.num_kv_heads", str(self.num_kv_heads), f"does not divide model.num_heads={heads}; {near} do"
            )


def _nearby_divisors(number: int, wanted: int) -> str:
    divisors = [size for size in range(1, number + 1) if number % size == 0]
    nearest = sorted(divisors, key=lambda size: abs(size - wanted))[:2]
    return " and ".join(str(size) for size in sorted(nearest))
