"""Decoders of transformers become runs and come back: the same logits, the same weights, the same texts."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from interop.foreign import make_config, save_folder
from safetensors.torch import load_file, save_file

import bigtx
from bigtx.cli import main
from bigtx.interop.families import by_model_type, families
from bigtx.model.decode import Sampling, decode_tokens

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}
YARN = {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": 32}
EVERY_SECOND = ["full_attention", "sliding_attention", "full_attention"]
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, biases, tied": ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "llama, wide heads, a key for each": ("llama", {"head_dim": 12, "num_key_value_heads": 4}),
    "llama, linear": (
        "llama",
        {"hidden_act": "gelu", "rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 99.0}},
    ),
    "llama 3.1": ("llama", {"rope_parameters": LLAMA3}),
    "llama, yarn": ("llama", {"rope_parameters": YARN | {"beta_fast": 16.0, "beta_slow": 2.0}}),
    "mistral, window": ("mistral", {"sliding_window": 9, "head_dim": 12}),
    "mistral, no window, tied": ("mistral", {"sliding_window": None, "tie_word_embeddings": True}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2, last blocks": ("qwen2", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}),
    "qwen2, all blocks": ("qwen2", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 0}),
    "qwen3": ("qwen3", {"head_dim": 16, "attention_bias": True}),
    "qwen3, every second block": (
        "qwen3",
        {"head_dim": 8, "use_sliding_window": True, "sliding_window": 5, "layer_types": EVERY_SECOND},
    ),
    "gpt2": ("gpt2", {}),
    "gpt2, other fields": (
        "gpt2",
        {"tie_word_embeddings": False, "n_inner": 40, "scale_attn_weights": False, "activation_function": "gelu"},
    ),
    "nanochat": ("nanochat", {}),
    "nanochat, small embeddings": ("nanochat", {"attention_bias": True, "initializer_range": 0.02}),
    "nanochat, no cap, tied": ("nanochat", {"final_logit_softcapping": None, "tie_word_embeddings": True}),
    "mixtral": ("mixtral", {"num_local_experts": 4}),
    "mixtral, window": ("mixtral", {"num_local_experts": 3, "sliding_window": 9, "head_dim": 12}),
    "qwen2_moe": (
        "qwen2_moe",
        {"num_experts": 6, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 40},
    ),
    "qwen2_moe, other fields": (
        "qwen2_moe",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 40,
            "qkv_bias": False,
            "norm_topk_prob": True,
            "use_sliding_window": True,
            "sliding_window": 5,
            "layer_types": EVERY_SECOND,
        },
    ),
    "qwen3_moe": ("qwen3_moe", {"num_experts": 12, "moe_intermediate_size": 24}),
    "qwen3_moe, other fields": (
        "qwen3_moe",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "attention_bias": True,
            "norm_topk_prob": True,
            "use_sliding_window": True,
            "sliding_window": 5,
        },
    ),
}


def run_command(*arguments: object) -> None:
    """A command, which must succeed."""
    assert main([str(argument) for argument in arguments]) == 0


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def greedy(model: Any, prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
    """The likeliest tokens as transformers finds them; none ends a text."""
    # Otherwise the model's own would fill what is left open here.
    model.generation_config.eos_token_id = None
    settings = transformers.GenerationConfig(do_sample=False, max_new_tokens=num_tokens)
    texts = (torch.tensor([ids]) for ids in prompts)
    return [
        model.generate(ids, settings, attention_mask=torch.ones_like(ids))[0, ids.shape[1] :].tolist() for ids in texts
    ]


@pytest.mark.parametrize("name", CASES)
def test_there_and_back(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model_type, changes = CASES[name]
    source, run, out = tmp_path / "source", tmp_path / "run", tmp_path / "out"
    # Every second case in shards.
    shard_size = "20KB" if list(CASES).index(name) % 2 else "5GB"
    theirs = save_folder(source, make_config(model_type, **changes), shard_size=shard_size)
    assert (len(list(source.glob("*.safetensors"))) > 1) == (shard_size == "20KB")
    run_command("import", source, "-o", run)
    assert f"{model_type}: " in capsys.readouterr().out

    ours = bigtx.load(run, device="cpu")
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(0, 100, (2, 90), generator=generator)
    with torch.no_grad():
        expected, logits = theirs(ids).logits, ours.model(ids)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    # Logits near zero everywhere would agree whatever the model does.
    assert expected.std() > 0.5 or "small" in name

    prompts = [ids[0, :10].tolist(), ids[1, :23].tolist()]
    written = decode_tokens(
        ours.model, ours.config.model, prompts, max_new_tokens=64, sampling=Sampling(temperature=0.0), end_ids=()
    )
    assert written == greedy(theirs, prompts, 64)

    run_command("export", run, "--to", "hf", "-o", out, "--max-shard-size", "30 KB", "--family", model_type)
    assert "The same token ids, and " in capsys.readouterr().out
    before, after = tensors(source), tensors(out)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    config = json.loads((out / "config.json").read_text())
    assert by_model_type(model_type).read_config(config) == ours.config.model
    # A second trip changes nothing more.
    run_command("import", out, "-o", tmp_path / "again")
    assert bigtx.load(tmp_path / "again", device="cpu").config.model == ours.config.model


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "qwen3_moe, other fields"])
def test_the_load_of_experts_weighs_the_same_in_the_loss(name: str, tmp_path: Path) -> None:
    """In one block: transformers multiplies the shares of all blocks together, bigtx takes the mean of the blocks."""
    model_type, changes = CASES[name]
    config = make_config(model_type, **changes, num_hidden_layers=1, router_aux_loss_coef=0.3)
    theirs = save_folder(tmp_path / "source", config)
    run_command("import", tmp_path / "source", "-o", tmp_path / "run")
    ours = bigtx.load(tmp_path / "run", device="cpu")
    ids = torch.randint(0, 100, (2, 30), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = 0.3 * theirs(ids, output_router_logits=True).aux_loss
        routing = ours.model(ids, labels=ids).routing
    torch.testing.assert_close(ours.config.model.experts.balance_loss * routing.balance, expected)


def test_every_decoder_has_a_case() -> None:
    decoders = {name for name, family in families().items() if family.auto_class == "AutoModelForCausalLM"}
    assert decoders == {model_type for model_type, _ in CASES.values()}


SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("max_position_embeddings", "moe_intermediate_size", "shared_expert_intermediate_size"),
)
"""Fields that a decoder's config.json must have."""


@pytest.mark.parametrize("model_type", families())
def test_a_field_that_config_json_lacks_has_the_default_of_transformers(model_type: str) -> None:
    family, values = by_model_type(model_type), transformers.AutoConfig.for_model(model_type).to_dict()
    whole = family.read_config(dict(values))
    needed = () if model_type in ("bert", "roberta", "modernbert") else SIZES
    for name in values:
        given = {key: value for key, value in values.items() if key != name}
        assert name in needed or family.read_config(given) == whole, name


@pytest.mark.parametrize(("name", "usual"), [("beta_fast", 32.0), ("beta_slow", 1.0)])
def test_the_bounds_of_yarn_that_config_json_lacks_are_those_of_its_authors(name: str, usual: float) -> None:
    values = make_config("llama").to_dict()
    for given, expected in ({}, usual), ({name: 7.0}, 7.0):
        config = by_model_type("llama").read_config(values | {"rope_parameters": YARN | given})
        assert getattr(config.rope_scaling, name) == expected


BIASES: dict[tuple[str, ...], set[str]] = {
    (): {"llama", "mistral", "qwen3", "nanochat", "mixtral", "qwen2_moe", "qwen3_moe"},
    ("attention",): {"qwen2", "qwen2_moe"},
    ("attention", "attention_output"): {"llama", "qwen3", "nanochat", "qwen3_moe"},
    ("mlp",): {"llama"},
    ("attention", "attention_output", "mlp"): {"llama"},
    # RMSNorm has no bias in any case.
    ("attention", "attention_output", "mlp", "norm"): {"gpt2", "llama"},
}
"""The decoders that have exactly these biases."""


@pytest.mark.parametrize("biases", BIASES, ids=" ".join)
def test_biases_that_a_family_does_not_have_are_a_problem(biases: tuple[str, ...]) -> None:
    """Otherwise an export would leave them out, or a model without them would be taken for one with them."""
    config = by_model_type("llama").read_config(make_config("llama").to_dict())
    config = dataclasses.replace(config, **{f"{name}_bias": True for name in biases})
    decoders = {model_type for model_type, _ in CASES.values()}
    assert BIASES[biases] == {
        name for name in decoders if not any("_bias=" in text for text in by_model_type(name).problems(config))
    }


def test_an_export_takes_the_plainest_family(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_folder(tmp_path / "source", make_config("mistral", sliding_window=None))
    run_command("import", tmp_path / "source", "-o", tmp_path / "run")
    run_command("export", tmp_path / "run", "-o", tmp_path / "out")
    assert " as LlamaForCausalLM: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("scaling", "expected"),
    [
        (None, ("none", 1.0)),
        ({"type": "linear", "factor": 2.0}, ("linear", 2.0)),
        ({k: v for k, v in LLAMA3.items() if k != "rope_theta"}, ("llama3", 4.0)),
        ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}, ("yarn", 4.0)),
    ],
)
def test_rotary_fields_of_transformers_4(scaling: dict[str, Any] | None, expected: tuple[str, float]) -> None:
    values = make_config("llama").to_dict()
    del values["rope_parameters"]
    config = by_model_type("llama").read_config(values | {"rope_theta": 500.0, "rope_scaling": scaling})
    assert (config.rope_theta, config.rope_scaling.method, config.rope_scaling.factor) == (500.0, *expected)
    if scaling and scaling.get("original_max_position_embeddings"):
        assert config.rope_scaling.original_length == 32


def test_both_spellings_of_rotary_fields_are_written() -> None:
    family = by_model_type("llama")
    config = family.read_config(make_config("llama", rope_parameters=LLAMA3).to_dict())
    written = family.write_config(config, _Ids())  # type: ignore[arg-type]
    assert written["rope_parameters"] == LLAMA3 and written["rope_theta"] == 500.0
    assert written["rope_scaling"] == {key: value for key, value in LLAMA3.items() if key != "rope_theta"}


class _Ids:
    begin_id = end_id = pad_id = 0
    end_ids = (0,)


def test_the_layout_of_the_first_gpt2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Keys without the model's prefix, causal masks among them, and a copy of the tied head."""
    theirs = save_folder(tmp_path / "source", make_config("gpt2"))
    path = tmp_path / "source" / "model.safetensors"
    old = {key.removeprefix("transformer."): tensor for key, tensor in load_file(path).items()}
    old |= {"h.0.attn.bias": torch.ones(1, 1, 8, 8, dtype=torch.uint8), "lm_head.weight": old["wte.weight"].clone()}
    save_file(old, path, metadata={"format": "pt"})
    run_command("import", tmp_path / "source", "-o", tmp_path / "run")
    assert "Dropped, because the model does not need them: h.0.attn.bias, lm_head.weight" in capsys.readouterr().out
    ids = torch.arange(40)[None]
    with torch.no_grad():
        torch.testing.assert_close(
            bigtx.load(tmp_path / "run", device="cpu").model(ids), theirs(ids).logits, rtol=1e-4, atol=1e-4
        )


def test_weights_in_bf16_become_fp32_masters(tmp_path: Path) -> None:
    theirs = save_folder(tmp_path / "source", make_config("llama"))
    theirs.to(torch.bfloat16).save_pretrained(str(tmp_path / "source"))
    run_command("import", tmp_path / "source", "-o", tmp_path / "run")
    weight = bigtx.load(tmp_path / "run", device="cpu").model.embedding.weight
    assert weight.dtype == torch.float32 and weight.shape == (128, 32)
    assert torch.equal(weight[:100], theirs.model.embed_tokens.weight.float()) and not weight[100:].any()


REALISTIC: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9}
    | {"num_key_value_heads": 3, "vocab_size": 49152, "max_position_embeddings": 2048, "tie_word_embeddings": True},
    "mistral": {"hidden_size": 512, "intermediate_size": 1792, "num_hidden_layers": 12, "num_attention_heads": 8}
    | {"num_key_value_heads": 2, "vocab_size": 32000, "sliding_window": 64},
    "qwen2": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 8, "num_attention_heads": 14}
    | {"num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True, "max_position_embeddings": 32768},
    "qwen3": {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 6, "num_attention_heads": 16}
    | {"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "tie_word_embeddings": True},
    "gpt2": {"n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024, "vocab_size": 50257},
    "nanochat": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 6}
    | {"num_key_value_heads": 6, "vocab_size": 50304},
    "mixtral": {"hidden_size": 512, "intermediate_size": 896, "num_hidden_layers": 10, "num_attention_heads": 8}
    | {"num_key_value_heads": 2, "vocab_size": 32000, "num_local_experts": 8},
    "qwen2_moe": {"hidden_size": 512, "moe_intermediate_size": 352, "num_hidden_layers": 8, "num_attention_heads": 8}
    | {"num_key_value_heads": 8, "vocab_size": 32000, "num_experts": 16, "shared_expert_intermediate_size": 1408},
    "qwen3_moe": {"hidden_size": 512, "moe_intermediate_size": 192, "num_hidden_layers": 8, "num_attention_heads": 8}
    | {"num_key_value_heads": 2, "head_dim": 64, "vocab_size": 32000, "num_experts": 32, "norm_topk_prob": True},
}


@pytest.mark.slow
@pytest.mark.parametrize("model_type", REALISTIC)
def test_realistic_shapes(model_type: str, tmp_path: Path) -> None:
    config = make_config(model_type, **(REALISTIC[model_type] | {"initializer_range": 0.02}))
    theirs = save_folder(tmp_path / "source", config, shard_size="200MB")
    run_command("import", tmp_path / "source", "-o", tmp_path / "run")
    ids = torch.randint(0, config.vocab_size, (1, 256), generator=torch.Generator().manual_seed(3))
    ours = bigtx.load(tmp_path / "run", device="cpu")
    with torch.no_grad():
        expected, logits = theirs(ids).logits, ours.model(ids)
    assert (logits - expected).abs().max() < 1e-4 * max(1.0, float(expected.abs().max()))
    prompts = [ids[0, :32].tolist()]
    written = decode_tokens(
        ours.model, ours.config.model, prompts, max_new_tokens=64, sampling=Sampling(temperature=0.0), end_ids=()
    )
    assert written == greedy(theirs, prompts, 64)
    del ours, theirs
    run_command("export", tmp_path / "run", "-o", tmp_path / "out", "--max-shard-size", "200 MB")
    before, after = tensors(tmp_path / "source"), tensors(tmp_path / "out")
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


NEEDED = {
    "vocab_size": 99,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 16,
}


def test_mixtral_has_the_defaults_of_transformers() -> None:
    theirs = transformers.MixtralConfig()
    own = by_model_type("mixtral").read_config(NEEDED | {"max_position_embeddings": 64})
    assert own.num_kv_heads == theirs.num_key_value_heads == 8
    assert own.experts.num_experts == theirs.num_local_experts == 8
    assert own.experts.num_active == theirs.num_experts_per_tok == 2


def test_yarn_without_a_factor_has_the_ratio_of_both_lengths() -> None:
    scaling = {"rope_type": "yarn", "original_max_position_embeddings": 1024}
    config = by_model_type("llama").read_config(NEEDED | {"max_position_embeddings": 4096, "rope_scaling": scaling})
    assert config.rope_scaling.factor == 4.0
