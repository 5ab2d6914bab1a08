"""Adapters of a run on the other side: merged into what transformers loads, and on top of it by PEFT."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from interop.test_export import make_run
from safetensors.torch import load_file

import bigtx
from bigtx.cli import main
from bigtx.config.schema import LoraConfig, ModelConfig
from bigtx.engine.write_weights import save_weights
from bigtx.model.size import parameter_shapes
from bigtx.model.transformer import Transformer

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

SMALL: dict[str, Any] = {"hidden_size": 64, "num_layers": 3, "num_heads": 4, "max_sequence_length": 128}
PLAIN: dict[str, Any] = {"norm": "layer", "norm_bias": True, "mlp": "gelu", "attention_bias": True}
PLAIN |= {"attention_output_bias": True, "mlp_bias": True}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"num_kv_heads": 2},
    "qwen3": {"num_kv_heads": 2, "qk_norm": True},
    # Queries, keys and values in one matrix, and all matrices as [inputs, outputs].
    "gpt2": PLAIN | {"positions": "learned"},
    # Rotary positions that turn the other way, so that rows change places.
    "nanochat": {"norm_scale": False, "qk_norm": True, "embedding_norm": True, "mlp": "relu2", "logit_soft_cap": 15.0},
    "bert": PLAIN
    | {"shape": "encoder", "norm_placement": "post", "positions": "learned", "num_token_types": 2}
    | {"embedding_norm": True, "head_transform": True, "head_bias": True, "tie_embeddings": True, "norm_eps": 1e-12},
    "t5": {"shape": "encoder_decoder", "positions": "relative", "attention_scale": 1.0, "norm_eps": 1e-6}
    | {"mlp": "geglu_tanh"},
}


def make_runs(folder: Path, fields: dict[str, Any], lora: LoraConfig) -> tuple[Path, Path]:
    """A base and a run that stands on it with adapters, as if they had been trained; the run's weights are whole."""
    config = ModelConfig(**SMALL, **fields)
    base = make_run(folder / "base", config)
    adapted = make_run(folder / "run", dataclasses.replace(config, lora=lora))
    config = dataclasses.replace(config, lora=lora)
    shutil.rmtree(adapted / "checkpoints")
    shapes = parameter_shapes(config)
    model = Transformer(config)
    model.init_weights(1)
    generator = torch.Generator().manual_seed(2)
    weights = dict(model.named_parameters())
    with torch.no_grad():
        for name, weight in weights.items():
            if name.endswith(".adapter.b"):
                weight.copy_(0.1 * torch.randn(weight.shape, generator=generator))
    facts = {"step": 1, "adapter_scale": lora.alpha / lora.rank}
    trained = {name: shapes[name] for name in shapes if ".adapter." in name}
    save_frozen(adapted, {name: shape for name, shape in shapes.items() if name not in trained}, weights)
    from bigtx.engine.checkpoint import read_manifest
    from bigtx.utils.files import json_hash

    facts["frozen_sha256"] = json_hash(read_manifest(adapted / "frozen"))
    save_weights(adapted, facts, trained, ((name, weights[name]) for name in trained))
    return base, adapted


def save_frozen(run: Path, shapes: dict[str, tuple[int, ...]], weights: dict[str, Any]) -> None:
    made = save_weights(run, {"step": 0}, shapes, ((name, weights[name]) for name in shapes))
    made.rename(run / "frozen")


def export(*arguments: object) -> int:
    return main(["export", *map(str, arguments)])


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in ("qwen3", "bert") else name for name in FAMILIES]
)
def test_merged_and_by_peft(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`bigtx export` itself compares with logits of the run, whose adapters stand beside their matrices."""
    base, run = make_runs(tmp_path, FAMILIES[name], LoraConfig(rank=4, alpha=24))
    assert export(base, "-o", tmp_path / "hf") == 0
    assert export(run, "-o", tmp_path / "merged") == 0
    assert export(run, "--to", "peft", "-o", tmp_path / "adapters", "--base", tmp_path / "hf") == 0
    said = capsys.readouterr().out
    assert said.count("The same token ids, and ") == 2 and "logits of random tokens differ by at most" in said
    before, after = (load_file(tmp_path / folder / "model.safetensors") for folder in ("hf", "merged"))
    assert before.keys() == after.keys() and any(not torch.equal(before[key], after[key]) for key in before)
    settings = json.loads((tmp_path / "adapters" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(tmp_path / "hf") and settings["r"] == 4
    if name == "gpt2":
        assert settings["target_modules"] == ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
        assert settings["rank_pattern"] == {"attn\\.c_attn": 12} and settings["alpha_pattern"] == {"attn\\.c_attn": 72}


@pytest.mark.parametrize("name", ["llama", pytest.param("bert", marks=pytest.mark.slow)])
def test_the_advice_for_a_folder_of_adapters_works(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, run = make_runs(tmp_path, FAMILIES[name], LoraConfig(rank=4, alpha=8.0))
    assert export(base, "-o", tmp_path / "base-hf", "--no-verify") == 0
    assert export(run, "-o", tmp_path / "adapters", "--to", "peft", "--base", tmp_path / "base-hf", "--no-verify") == 0
    capsys.readouterr()
    assert main(["import", str(tmp_path / "adapters"), "-o", str(tmp_path / "new")]) == 2
    said = capsys.readouterr().err
    assert "in PEFT's format (LORA), not a model" in said
    monkeypatch.chdir(tmp_path)
    exec(said.partition("In Python: ")[2].strip())  # noqa: S102 - of this very program
    assert main(["import", "MERGED", "-o", str(tmp_path / "new")]) == 0
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        expected, found = (bigtx.load(folder, device="cpu").model(tokens) for folder in (run, tmp_path / "new"))
    assert torch.allclose(expected, found, atol=1e-4)
