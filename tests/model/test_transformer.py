"""The decoder against a plain float64 one, and what every shape of it must hold."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from bigtx.config import shape
from bigtx.config.schema import AudioConfig, ExpertsConfig, LoraConfig, ModelConfig, RopeScalingConfig
from bigtx.model.layers import Bigrams
from bigtx.model.transformer import Transformer

VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "grouped": {"num_kv_heads": 2, "qk_norm": True, "mlp": "geglu", "tie_embeddings": True},
    "gpt": {
        "positions": "learned",
        "norm": "layer",
        "norm_bias": True,
        "mlp": "gelu_tanh",
        "mlp_bias": True,
        "attention_bias": True,
        "attention_output_bias": True,
        "tie_embeddings": True,
    },
    "original": {"positions": "sinusoidal", "norm": "layer", "norm_placement": "post", "mlp": "relu2"},
    "relative": {"positions": "relative", "norm_scale": False, "logit_soft_cap": 5.0, "num_kv_heads": 1},
}
"""One of each kind of part."""


def tiny_config(**changes: Any) -> ModelConfig:
    """A config of a tiny model with weights large enough that everything matters."""
    settings: dict[str, Any] = {
        "vocab_size": 70,
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "max_sequence_length": 64,
        "init_std": 0.25,
        "init": "normal",
    }
    return ModelConfig(**settings | changes)


def tiny_model(seed: int = 1, **changes: Any) -> Transformer:
    """A tiny model in evaluation mode, with norms, biases and bigrams that are not at their trivial start."""
    made = Transformer(tiny_config(**changes))
    made.init_weights(seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if parameter.dim() == 1 or name == "bigrams.table.weight":
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
            assert torch.isfinite(parameter).all(), name
    return made.eval()


def random_tokens(rows: int, length: int, seed: int = 0, vocab_size: int = 70) -> Tensor:
    """Random token ids."""
    return torch.randint(vocab_size, (rows, length), generator=torch.Generator().manual_seed(seed))


def plain_logits(config: ModelConfig, weights: dict[str, Tensor], tokens: list[int]) -> Tensor:
    """A Llama-like decoder in float64 by loops: each attention score by itself, rotation as complex numbers."""
    weights = {name: weight.double() for name, weight in weights.items()}
    width, group = shape.head_width(config), config.num_heads // shape.num_kv_heads(config)

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + config.norm_eps) * weight

    def turned(x: Tensor, position: int) -> Tensor:
        pairs = torch.complex(x[: width // 2], x[width // 2 :])
        angles = torch.tensor([position * config.rope_theta ** (-2 * i / width) for i in range(width // 2)])
        pairs = pairs * torch.exp(1j * angles.double())
        return torch.cat((pairs.real, pairs.imag))

    stream = [weights["embedding.weight"][token] for token in tokens]
    for layer in range(config.num_layers):
        own = {name.removeprefix(f"decoder.blocks.{layer}."): weight for name, weight in weights.items()}
        queries, keys, values = [], [], []
        for position, x in enumerate(stream):
            x = norm(x, own["attention_norm.weight"])
            q, k, v = (own[f"attention.{name}.weight"] @ x for name in ("query", "key", "value"))
            q, k, v = q.view(-1, width), k.view(-1, width), v.view(-1, width)
            if config.qk_norm:
                q, k = norm(q, own["attention.query_norm.weight"]), norm(k, own["attention.key_norm.weight"])
            queries.append([turned(head, position) for head in q])
            keys.append([turned(head, position) for head in k])
            values.append(v)
        for position in range(len(stream)):
            heads = []
            for head in range(config.num_heads):
                scores = [queries[position][head] @ keys[past][head // group] for past in range(position + 1)]
                shares = torch.softmax(torch.stack(scores) / math.sqrt(width), dim=0)
                heads.append(sum(share * values[past][head // group] for past, share in enumerate(shares)))
            x = stream[position] + own["attention.output.weight"] @ torch.cat(heads)
            inner = norm(x, own["mlp_norm.weight"])
            gate, up = own["mlp.gate.weight"] @ inner, own["mlp.up.weight"] @ inner
            stream[position] = x + own["mlp.down.weight"] @ (gate * torch.sigmoid(gate) * up)
    head = weights.get("head.weight", weights["embedding.weight"])[: config.vocab_size]
    return torch.stack([head @ norm(x, weights["decoder.norm.weight"]) for x in stream])


@pytest.mark.parametrize("changes", [{}, {"num_kv_heads": 2, "qk_norm": True, "tie_embeddings": True, "head_width": 6}])
def test_equals_a_plain_float64_decoder(changes: dict[str, Any]) -> None:
    model, tokens = tiny_model(**changes), random_tokens(2, 9)
    with torch.no_grad():
        logits = model(tokens)
    weights = dict(model.named_parameters())
    for row, ids in zip(logits, tokens.tolist(), strict=True):
        torch.testing.assert_close(row.double(), plain_logits(model.config, weights, ids), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_shapes_and_padding_of_the_vocabulary(variant: str) -> None:
    model = tiny_model(**VARIANTS[variant])
    assert model.embedding.weight.shape == (128, 32)
    tokens = random_tokens(3, 11)
    logits = model(tokens)
    assert logits.shape == (3, 11, 70) and logits.dtype == torch.float32
    at = torch.tensor([0, 4, 10])
    torch.testing.assert_close(model(tokens, columns=at[:, None])[:, 0], logits[torch.arange(3), at])
    loss, cross_entropy, _ = model(tokens, labels=tokens)
    assert loss.shape == cross_entropy.shape == () and loss.requires_grad and not cross_entropy.requires_grad


@pytest.mark.parametrize("variant", VARIANTS)
def test_later_tokens_change_nothing_earlier(variant: str) -> None:
    model, tokens = tiny_model(**VARIANTS[variant]), random_tokens(2, 12)
    changed = tokens.clone()
    changed[:, 7] = (changed[:, 7] + 1) % 70
    with torch.no_grad():
        before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :7], after[:, :7])
    assert not torch.allclose(before[:, 7:], after[:, 7:])


@pytest.mark.parametrize("variant", VARIANTS)
def test_packed_documents_equal_each_alone(variant: str) -> None:
    model = tiny_model(**VARIANTS[variant])
    lengths = [5, 1, 9]
    documents = [random_tokens(1, length, seed=length) for length in lengths]
    segment_ids = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))[None]
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    with torch.no_grad():
        packed = model(torch.cat(documents, dim=1), positions=positions, segment_ids=segment_ids)
        alone = torch.cat([model(document) for document in documents], dim=1)
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("variant", VARIANTS)
def test_recomputation_gives_equal_gradients(variant: str, dropout: float) -> None:
    model, tokens = tiny_model(**VARIANTS[variant], dropout=dropout).train(), random_tokens(2, 16)
    gradients = {}
    for mode in ("none", "full", "selective"):
        model.activation_checkpointing = mode
        model.zero_grad()
        torch.manual_seed(5)
        model(tokens, labels=tokens).loss_sum.backward()
        gradients[mode] = [parameter.grad.clone() for parameter in model.parameters()]
    for mode in ("full", "selective"):
        assert all(map(torch.equal, gradients["none"], gradients[mode])), mode


def test_recomputation_keeps_less() -> None:
    """Bytes kept for the backward pass: none > selective > full."""
    model, tokens, kept = tiny_model().train(), random_tokens(4, 64), {}
    for mode in ("none", "selective", "full"):
        model.activation_checkpointing = mode
        sizes: dict[int, int] = {}

        def note(tensor: Tensor, sizes: dict[int, int] = sizes) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            model(tokens, labels=tokens)
        kept[mode] = sum(sizes.values())
    # What selective recomputation keeps lies in its own store, out of the hooks' sight.
    assert kept["full"] < 0.5 * kept["none"] and kept["selective"] < 0.5 * kept["none"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_selective_recomputation_repeats_no_products(bias: bool, dtype: torch.dtype) -> None:
    model = tiny_model(attention_bias=bias, mlp_bias=bias).to(dtype).train()
    tokens, counted = random_tokens(2, 32), {}
    for mode in ("none", "selective", "full"):
        model.activation_checkpointing = mode
        with FlopCounterMode(display=False) as counter:
            model(tokens, labels=tokens).loss_sum.backward()
        counted[mode] = counter.get_total_flops()
    assert counted["none"] == counted["selective"] < counted["full"]


def test_compiled_blocks_give_the_same() -> None:
    model, tokens = tiny_model(num_kv_heads=2).train(), random_tokens(2, 16)
    for mode in ("none", "full", "selective"):
        results = []
        for compiled in (False, True):
            other = Transformer(model.config)
            other.load_state_dict(model.state_dict())
            other.activation_checkpointing = mode
            if compiled:
                for block in other.blocks:
                    block.compile(backend="aot_eager", dynamic=False)
            loss = other(tokens, labels=tokens).loss_sum
            loss.backward()
            results.append([loss.detach()] + [parameter.grad for parameter in other.parameters()])
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_bf16_weights(variant: str) -> None:
    """Everything cast to bf16, as DeepSpeed does: the answers stay near, at far positions too."""
    model = tiny_model(**VARIANTS[variant], init_std=0.1)
    tokens, positions = random_tokens(2, 16), torch.arange(40, 56).expand(2, 16)
    with torch.no_grad():
        exact = model(tokens, positions=positions)
        rounded = model.bfloat16()(tokens, positions=positions)
    assert rounded.dtype == torch.float32
    # 8 bits of mantissa over a handful of roundings in a row.
    assert (rounded - exact).norm() < 0.03 * exact.norm()
    result = model(tokens, labels=tokens)
    result.loss_sum.backward()
    assert result.loss_sum.dtype == torch.float32
    assert all(parameter.grad.dtype == torch.bfloat16 for parameter in model.parameters())


def test_autocast() -> None:
    model, tokens = tiny_model(init_std=0.1), random_tokens(2, 16)
    exact = model(tokens, labels=tokens).loss_sum
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(tokens, labels=tokens).loss_sum
    rounded.backward()
    assert rounded.item() == pytest.approx(exact.item(), rel=5e-3)
    assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters())


def test_builds_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = Transformer(ModelConfig(vocab_size=50_000, hidden_size=8192, num_layers=4, num_heads=64))
    assert all(parameter.is_meta for parameter in model.parameters())
    assert model(torch.zeros(2, 8, dtype=torch.long, device="meta")).shape == (2, 8, 50_000)


def test_it_has_no_buffers() -> None:
    """A cast of the whole model must find nothing but weights to cast."""
    assert not [name for changes in VARIANTS.values() for name, _ in tiny_model(**changes).named_buffers()]


def test_a_tied_head_is_one_parameter() -> None:
    model = tiny_model(tie_embeddings=True)
    assert model.head.weight is model.embedding.weight
    assert "head.weight" not in dict(model.named_parameters())


# Field: (what it is changed to, what else must be set for it to matter). Defaults of `tiny_config` otherwise.
FIELDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "shape": ("encoder", {}),
    "audio": (AudioConfig(num_mel_bins=8), {"shape": "encoder"}),
    "lora": (LoraConfig(rank=2), {}),
    "num_classes": (3, {}),
    "class_head": ("pooler", {"num_classes": 3}),
    "vocab_size": (71, {}),
    "hidden_size": (40, {}),
    "num_layers": (3, {}),
    "num_decoder_layers": (3, {"shape": "encoder_decoder"}),
    "num_heads": (2, {}),
    "num_kv_heads": (2, {}),
    "head_width": (12, {}),
    "mlp": ("geglu", {}),
    "mlp_size": (48, {}),
    "experts": (ExpertsConfig(num_experts=4), {}),
    "norm": ("layer", {}),
    "norm_placement": ("post", {}),
    "embedding_norm": (True, {}),
    "bigram_rows": (99, {}),
    "bigram_size": (7, {"bigram_rows": 99}),
    "norm_eps": (0.1, {}),
    "norm_scale": (False, {}),
    "norm_bias": (True, {"norm": "layer"}),
    "qk_norm": (True, {}),
    "attention_scale": (1.0, {}),
    "attention_window": (5, {}),
    "global_attention_every": (2, {"attention_window": 5}),
    "prefix_attention": (True, {}),
    "positions": ("sinusoidal", {}),
    "position_offset": (2, {"positions": "learned"}),
    "rope_theta": (100.0, {}),
    "local_rope_theta": (100.0, {"attention_window": 5}),
    "rope_scaling": (RopeScalingConfig(method="linear", factor=2.0), {}),
    "relative_num_buckets": (16, {"positions": "relative"}),
    "relative_max_distance": (40, {"positions": "relative", "relative_num_buckets": 8}),
    "max_sequence_length": (65, {"positions": "learned"}),
    "num_token_types": (2, {}),
    "attention_bias": (True, {}),
    "attention_output_bias": (True, {}),
    "mlp_bias": (True, {}),
    "tie_embeddings": (True, {}),
    "head_bias": (True, {}),
    "head_transform": (True, {}),
    "dropout": (0.5, {}),
    "attention_dropout": (0.0, {"dropout": 0.5}),
    "logit_scale": (0.5, {}),
    "logit_soft_cap": (2.0, {}),
    "init_std": (0.5, {}),
    "init": ("scaled", {}),
}
SCALING: dict[str, tuple[Any, dict[str, Any]]] = {
    "method": ("linear", {"factor": 4.0}),
    "factor": (8.0, {"method": "linear"}),
    "original_length": (16, {"method": "llama3", "factor": 4.0}),
    "low_frequency_factor": (2.0, {"method": "llama3", "factor": 4.0, "original_length": 64}),
    "high_frequency_factor": (8.0, {"method": "llama3", "factor": 4.0, "original_length": 64}),
    "beta_fast": (2.0, {"method": "yarn", "factor": 4.0, "original_length": 4096}),
    "beta_slow": (8.0, {"method": "yarn", "factor": 4.0, "original_length": 64}),
}


def same(first: ModelConfig, second: ModelConfig) -> bool:
    """Whether two configs give the same model: names, shapes, initial weights, and answers in training."""
    answers = []
    for config in (first, second):
        model = Transformer(config).train()
        model.init_weights(1)
        torch.manual_seed(1)
        tokens = random_tokens(2, 60)
        inputs: dict[str, Tensor] = {}
        if config.shape == "encoder_decoder":
            inputs["target_tokens"] = tokens
        if config.prefix_attention:
            inputs["prefix_mask"] = torch.arange(60).expand(2, 60) < 30
        if config.num_classes:
            inputs["pool"] = torch.full((2, 60), 1 / 60)
        if config.audio.num_mel_bins:
            inputs |= {"features": torch.ones(2, 60, 8), "feature_lengths": torch.tensor([60, 60])}
        else:
            inputs["tokens"] = tokens
        answers.append((dict(model.named_parameters()), model(**inputs).detach()))
    (weights, logits), (other_weights, other_logits) = answers
    return (
        weights.keys() == other_weights.keys()
        and all(torch.equal(weights[name], other_weights[name]) for name in weights)
        and torch.equal(logits, other_logits)
    )


def test_every_field_is_tried() -> None:
    assert FIELDS.keys() == {field.name for field in dataclasses.fields(ModelConfig)}
    assert SCALING.keys() == {field.name for field in dataclasses.fields(RopeScalingConfig)}


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_matters(name: str) -> None:
    value, setting = FIELDS[name]
    assert same(tiny_config(**setting), tiny_config(**setting)), "the comparison itself is repeatable"
    assert not same(tiny_config(**setting), tiny_config(**setting | {name: value}))


@pytest.mark.parametrize("name", SCALING)
def test_every_field_of_rope_scaling_matters(name: str) -> None:
    value, setting = SCALING[name]
    first, second = (RopeScalingConfig(**changes) for changes in (setting, setting | {name: value}))
    assert not same(tiny_config(rope_scaling=first), tiny_config(rope_scaling=second))


@pytest.mark.parametrize("kind", ["swiglu", "geglu", "geglu_tanh", "gelu", "gelu_tanh", "relu", "relu2"])
def test_feed_forwards(kind: str) -> None:
    mlp = tiny_model(mlp=kind).blocks[0].mlp
    x = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(1))
    up = x @ mlp.up.weight.t()
    gate = x @ mlp.gate.weight.t() if mlp.gate is not None else None
    inner = {
        "swiglu": lambda: gate * torch.sigmoid(gate) * up,
        "geglu": lambda: gate * torch.special.ndtr(gate) * up,
        "geglu_tanh": lambda: F.gelu(gate, approximate="tanh") * up,
        "gelu": lambda: up * torch.special.ndtr(up),
        "gelu_tanh": lambda: F.gelu(up, approximate="tanh"),
        "relu": lambda: up.clamp(min=0),
        "relu2": lambda: up.clamp(min=0) ** 2,
    }[kind]()
    torch.testing.assert_close(mlp(x), inner @ mlp.down.weight.t(), rtol=1e-4, atol=1e-4)


def test_a_pair_of_tokens_keeps_its_row_in_later_releases() -> None:
    """The row of a pair is the upper part of 32 bits: of 64 rows the first 6. Before a text there is the id -1."""
    bigrams = Bigrams(ModelConfig(vocab_size=100, hidden_size=4, bigram_rows=64, bigram_size=4))
    with torch.no_grad():
        bigrams.table.weight.copy_(torch.arange(64.0)[:, None].expand(64, 4))
    pairs = [(-1, 5), (5, 7), (7, 5)]
    expected = [((before + 1) * 0x9E3779B1 + token * 0x85EBCA77) % 2**32 // 2**26 for before, token in pairs]
    before, tokens = torch.tensor([pairs]).unbind(-1)
    assert bigrams(tokens, before)[0, :, 0].tolist() == expected and len(set(expected)) == 3
