"""Parameters counted from the config alone, against torch's own count and published ones."""

from __future__ import annotations

import dataclasses
import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from bigtx.config.load import load
from bigtx.config.runs import shipped_configs, shipped_folder
from bigtx.config.schema import ExpertsConfig, FinetuneConfig, ModelConfig, PretrainConfig
from bigtx.config.shape import padded_vocab_size
from bigtx.model.size import count_parameters, flops_per_row, flops_per_token, largest_block, parameter_shapes
from bigtx.model.transformer import Transformer

RECIPES = sorted((Path(__file__).parents[2] / "configs" / "model").glob("*.yaml"))
HEADER = re.compile(r"# parameters: ([\d,]+) with a vocabulary of ([\d,]+): \S.*\.\n")
SIZE = re.compile(r"^# parameters: ([\d,]+) with a vocabulary of ([\d,]+)\.$", re.MULTILINE)


def torch_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        model = Transformer(config)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("path", RECIPES, ids=[path.stem for path in RECIPES])
def test_recipes_say_their_size(path: Path) -> None:
    header = HEADER.match(path.read_text(encoding="utf-8"))
    assert header, "the first line says how many parameters, with which vocabulary, and what for"
    count, vocab_size = (int(number.replace(",", "")) for number in header.groups())
    model = load(PretrainConfig, [str(path)], check=False).model
    assert model.vocab_size is None, "the vocabulary is the tokenizer's"
    model.vocab_size = vocab_size
    assert parameter_shapes(model) == torch_shapes(model)
    assert count_parameters(model).total == count
    named = float(path.stem.rpartition("-")[2][:-1]) * {"m": 1e6, "b": 1e9}[path.stem[-1]]
    assert count == pytest.approx(named, rel=0.2)


@pytest.mark.parametrize("name", [name for name in shipped_configs() if name.startswith(("model/", "pretrain/"))])
def test_every_recipe_builds(name: str) -> None:
    """On the meta device: names and shapes as counted, without memory for any of them."""
    model = load(PretrainConfig, [str(shipped_folder() / name)], check=False).model
    model.vocab_size = model.vocab_size or 1000
    assert parameter_shapes(model) == torch_shapes(model)


def test_the_largest_block() -> None:
    """A block of a decoder that reads a source is larger than one of its encoder."""
    config = ModelConfig(shape="encoder_decoder", vocab_size=500, hidden_size=32, num_layers=2, tie_embeddings=True)
    with torch.device("meta"):
        model = Transformer(config)
    sizes = [sum(parameter.numel() for parameter in block.parameters()) for block in model.blocks]
    assert largest_block(config) == max(sizes) and len(set(sizes)) == 2


@pytest.mark.parametrize("name", [name for name in shipped_configs() if not name.startswith("model/")])
def test_other_recipes_say_their_size_right(name: str) -> None:
    line = SIZE.search((shipped_folder() / name).read_text(encoding="utf-8"))
    if line is None:
        return
    count, vocab_size = (int(number.replace(",", "")) for number in line.groups())
    schema = FinetuneConfig if name.startswith("finetune/") else PretrainConfig
    model = load(schema, [name], check=False).model
    assert count_parameters(dataclasses.replace(model, vocab_size=vocab_size)).total == count


def test_published_counts() -> None:
    """Of decoders Llama 2 7B and 13B, Llama 3.2 3B and Llama 3 70B, as their publishers' weights have it; BERT base and
    ModernBERT base as transformers counts them, and T5 1.1 small and base with the heads of their own."""
    published = {"7b": 6_738_415_616, "13b": 13_015_864_320, "3b": 3_212_749_824, "70b": 70_553_706_496}
    for name, count in published.items():
        path = next(path for path in RECIPES if path.stem == f"decoder-{name}")
        assert f"# parameters: {count:,} " in path.read_text(encoding="utf-8")
    others = {"encoder-110m": 109_514_298, "encoder-150m": 149_655_232}
    others |= {"encoder-decoder-77m": 76_961_152, "encoder-decoder-250m": 247_577_856}
    for name, count in others.items():
        model = load(PretrainConfig, [str(shipped_folder() / f"model/{name}.yaml")], check=False).model
        header = HEADER.match((shipped_folder() / f"model/{name}.yaml").read_text(encoding="utf-8"))
        assert header
        model.vocab_size = int(header[2].replace(",", ""))
        padding = padded_vocab_size(model) - model.vocab_size
        assert count_parameters(model).total == count + padding * (model.hidden_size + model.head_bias)


CHOICES: dict[str, list[Any]] = {
    "mlp": ["swiglu", "gelu"],
    "shape": ["decoder", "encoder", "encoder_decoder"],
    "embedding_norm": [False, True],
    "num_token_types": [0, 2],
    "bigram_rows": [0, 10],
    "bigram_size": [None, 6],
    "head_bias": [False, True],
    "head_transform": [False, True],
    "num_decoder_layers": [None, 3],
    "position_offset": [0, 2],
    "norm": ["rms", "layer"],
    "norm_placement": ["pre", "post"],
    "norm_scale": [True, False],
    "norm_bias": [False, True],
    "qk_norm": [False, True],
    "positions": ["rope", "learned", "sinusoidal", "relative"],
    "attention_bias": [False, True],
    "attention_output_bias": [True, False],
    "mlp_bias": [False, True],
    "tie_embeddings": [False, True],
}


def combinations() -> list[dict[str, Any]]:
    """Every pair of choices of two settings at least once."""
    pairs = itertools.combinations(CHOICES, 2)
    return [{first: one, second: two} for first, second in pairs for one in CHOICES[first] for two in CHOICES[second]]


def test_shapes_equal_torch_for_every_pair_of_settings() -> None:
    for index, changes in enumerate(combinations()):
        sizes = {"head_width": 12} if index % 3 == 0 else {"num_kv_heads": 2, "mlp_size": 50}
        config = ModelConfig(vocab_size=300 + index, hidden_size=32, num_layers=2, num_heads=4, **sizes, **changes)
        expected = torch_shapes(config)
        assert parameter_shapes(config) == expected, changes
        counts = count_parameters(config)
        assert counts.total == sum(torch.Size(shape).numel() for shape in expected.values()) == counts.active
        assert counts.embedding + counts.non_embedding == counts.total
        assert counts.non_embedding == sum(
            torch.Size(shape).numel()
            for name, shape in expected.items()
            if name.startswith(("encoder.", "decoder.")) and ".relative_bias." not in name
        )


@pytest.mark.parametrize("mlp", ["swiglu", "relu2"])
@pytest.mark.parametrize("shared", [{}, {"shared_size": 24}, {"shared_size": 24, "shared_gate": True}])
def test_experts(mlp: Any, shared: dict[str, Any]) -> None:
    """Names and shapes as torch has them; a token meets as many parameters as if there were its own experts alone."""
    sizes: dict[str, Any] = {"vocab_size": 300, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "mlp": mlp}
    many, few = (
        ModelConfig(**sizes, experts=ExpertsConfig(num_experts=number, num_active=3, expert_size=20, **shared))
        for number in (8, 3)
    )
    assert parameter_shapes(many) == torch_shapes(many)
    counts, own = count_parameters(many), count_parameters(few)
    matrices = 3 if mlp == "swiglu" else 2
    assert counts.total - own.total == 2 * 5 * (matrices * 32 * 20 + 32)
    routing = 2 * 5 * 32  # A token meets every row of the router.
    assert counts.active == own.total + routing
    assert flops_per_token(many, 100) == flops_per_token(few, 100) + 6 * routing


@pytest.mark.parametrize(("shape", "read"), [("encoder", "source"), ("decoder", "target")])
def test_the_arithmetic_of_attention_grows_with_the_square_of_the_length(shape: Any, read: str) -> None:
    config = ModelConfig(shape=shape, vocab_size=100, hidden_size=64, num_layers=3, num_heads=4)
    none, once, twice = (
        flops_per_row(config, **({"source": 0, "target": 0} | {read: length}), predicted=0) for length in (0, 10, 20)
    )
    assert none == 0 and twice - 2 * once == 12 * 3 * 64 * (20**2 - 2 * 10**2)


def test_the_arithmetic_of_pairs_of_tokens_is_a_matrix_from_their_width() -> None:
    sizes: dict[str, Any] = {"vocab_size": 100, "hidden_size": 64, "num_layers": 3, "num_heads": 4}
    pairs = ModelConfig(**sizes, bigram_rows=50, bigram_size=16)
    assert flops_per_token(pairs, 10) - flops_per_token(ModelConfig(**sizes), 10) == 6 * 64 * 16


def test_flops() -> None:
    """6 N + 12 L D T, a tied head counted as the product that it is."""
    sizes: dict[str, Any] = {"vocab_size": 1024, "hidden_size": 64, "num_layers": 3, "num_heads": 4}
    untied, tied = ModelConfig(**sizes), ModelConfig(**sizes, tie_embeddings=True)
    matrices = count_parameters(untied).total - 1024 * 64
    assert flops_per_token(untied, 100) == 6 * matrices + 12 * 3 * 64 * 100
    assert flops_per_token(tied, 100) == flops_per_token(untied, 100)
    assert flops_per_token(ModelConfig(**sizes, head_width=32), 100) > flops_per_token(untied, 100)
