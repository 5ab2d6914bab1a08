from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from bigtx.config.schema import DataConfig, PretrainConfig, SourceConfig
from bigtx.config.schema.model import ModelConfig
from bigtx.engine.write_weights import save_weights
from bigtx.interop.card import write_card
from bigtx.interop.exporter import Exported, ExportSettings
from bigtx.interop.families import by_model_type
from bigtx.tokenizer.tokenizer import Tokenizer

MADE = Exported(
    folder=Path("Small Talk"),
    family=by_model_type("llama"),
    architecture="LlamaForCausalLM",
    auto_class="AutoModelForCausalLM",
    num_tensors=1,
    num_parameters=12_345,
    files={},
)
MODEL = ModelConfig(vocab_size=500, hidden_size=64, num_layers=3, num_heads=4, num_kv_heads=2)
RECORDS: list[dict[str, Any]] = [
    {"step": 5, "validation/held/out/loss": 5.5, "validation/held/out/bits_per_byte": 2.5},
    {"step": 8, "validation/held/out/loss": 4.25, "validation/held/out/bits_per_byte": 2.0},
    {"step": 8, "validation/other/loss": "NaN"},
    {"step": 9, "train/loss": 4.0},
    {"step": 20, "validation/held/out/loss": 1.0},
]


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    from bigtx.config.schema import TokenizerTrainConfig
    from bigtx.tokenizer.train import train

    return train(TokenizerTrainConfig(vocab_size=400), ["the quick brown fox jumps over the lazy dog " * 20])


def card(folder: Path, tokenizer: Tokenizer, config: PretrainConfig, manifest: dict[str, Any], **facts: Any) -> str:
    weights = {"embedding.weight": (2, 2)}
    checkpoint = save_weights(folder / "run", manifest, weights, ((name, torch.zeros(2, 2)) for name in weights))
    settings = ExportSettings(dtype="bf16", license=facts.pop("license", None))
    made = dataclasses.replace(MADE, **facts)
    text = write_card(folder, made, settings, checkpoint=checkpoint, config=config, tokenizer=tokenizer)
    assert (folder / "README.md").read_text(encoding="utf-8") == text
    return text


def front_matter(text: str) -> dict[str, Any]:
    return yaml.safe_load(text.split("---\n")[1])


def test_a_trained_model_tells_what_its_run_recorded(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS) + "{torn")
    sources = {"books": SourceConfig(path="/home/somebody/books", weight=3.0), "web": SourceConfig(path="/web")}
    config = PretrainConfig(
        model=MODEL, data=DataConfig(sources=sources), seed=7, init_from="/home/somebody/runs/first"
    )
    manifest = {"step": 10, "state": {"tokens": 40_960}, "precision": "fp32", "world_size": 2}
    text = card(tmp_path, tokenizer, config, manifest, license="apache-2.0")
    assert front_matter(text) == {
        "license": "apache-2.0",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["bigtx", "llama"],
    }
    for line in (
        "# Small Talk",
        "| Parameters | 12,345 |",
        "| Layers of the decoder | 3 |",
        "| Attention heads | 4, of keys and values 2, width 16 |",
        "| books | 3 |",
        "Tokens read in training: 40,960.",
        "| Steps | 10 |",
        "| Precision | fp32 |",
        "| Processes | 2 |",
        "| Seed | 7 |",
        "| held/out | 8 | 4.2500 | 2.0000 |",
        "| other | 8 | nan | not recorded |",
        "| Ids | 400 |",
        'model = AutoModelForCausalLM.from_pretrained("FOLDER")',
    ):
        assert line in text.splitlines(), line
    assert "started from the weights of `first`" in text
    assert "somebody" not in text


def test_an_imported_model_claims_no_training(tmp_path: Path, tokenizer: Tokenizer) -> None:
    manifest = {"step": 0, "tokens": 0, "imported": {"from": "gpt-tiny", "model_type": "gpt2"}}
    text = card(tmp_path, tokenizer, PretrainConfig(model=MODEL), manifest, auto_class="AutoModelForSeq2SeqLM")
    assert front_matter(text)["license"] == "unknown"
    assert front_matter(text)["pipeline_tag"] == "text2text-generation"
    assert "from a Hugging Face model, `gpt-tiny`" in text and "without training in between" in text
    assert "Before the import into bigtx: not recorded." in text
    assert "Sources: not recorded. Tokens read in training: not recorded." in text
    assert "Validation losses: not recorded." in text
    assert "Optimizer" not in text and "Seed" not in text
