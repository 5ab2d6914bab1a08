"""BERT, RoBERTa and ModernBERT: read and written so that transformers and bigtx give the same logits."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import bigtx
from bigtx.cli import main
from bigtx.config.schema import TokenizerTrainConfig
from bigtx.config.schema.model import ExpertsConfig, ModelConfig, RopeScalingConfig
from bigtx.finetuning.base import plan_transfer
from bigtx.interop.families import by_model_type, choose
from bigtx.interop.importer import _converted
from bigtx.model.initial import initial_value
from bigtx.model.transformer import Transformer
from bigtx.tokenizer.tokenizer import Tokenizer
from bigtx.tokenizer.train import train
from bigtx.utils.errors import CheckpointError, ConfigError
from tests.interop.both_sides import TOLERANCE, distance, padded_tokens, randomize, save, tensors, to_bigtx, to_foreign

transformers = pytest.importorskip("transformers")

TINY = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 40}
LENGTHS = (40, 17, 5)

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("Bert", {}),
    "bert, untied": ("Bert", {"tie_word_embeddings": False, "num_attention_heads": 2, "layer_norm_eps": 1e-3}),
    "bert, three token types": ("Bert", {"type_vocab_size": 3, "num_hidden_layers": 1, "max_position_embeddings": 41}),
    "roberta": ("Roberta", {"type_vocab_size": 1}),
    "roberta, untied": ("Roberta", {"tie_word_embeddings": False, "type_vocab_size": 2}),
    "roberta, tanh": ("Roberta", {"hidden_act": "gelu_new", "num_attention_heads": 8}),
    "roberta, relu": ("Roberta", {"hidden_act": "relu", "intermediate_size": 64}),
    "modernbert": ("ModernBert", {"local_attention": 8}),
    "modernbert, odd window": ("ModernBert", {"local_attention": 7, "global_attn_every_n_layers": 2}),
    "modernbert, biases": (
        "ModernBert",
        {"norm_bias": True, "attention_bias": True, "mlp_bias": True, "classifier_bias": True, "local_attention": 4},
    ),
    "modernbert, untied": ("ModernBert", {"tie_word_embeddings": False, "decoder_bias": False, "local_attention": 4}),
    "modernbert, windows only": ("ModernBert", {"layer_types": ["sliding_attention"] * 3, "local_attention": 6}),
    "modernbert, no windows": ("ModernBert", {"layer_types": ["full_attention"] * 3, "hidden_activation": "silu"}),
    "modernbert, five layers": (
        "ModernBert",
        {
            "num_hidden_layers": 5,
            "global_attn_every_n_layers": 3,
            "local_attention": 6,
            "hidden_activation": "gelu_pytorch_tanh",
            "rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": 500.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 20.0},
            },
        },
    ),
}


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    words = [f"{a}{b}{c}" for a in "bdklmnprst" for b in "aeiou" for c in ("", "n", "rs")]
    return train(TokenizerTrainConfig(vocab_size=450), [" ".join(words[i:] + words[:i]) for i in range(0, 150, 3)])


def make(kind: str, tokenizer: Tokenizer, head: str = "ForMaskedLM", **fields: Any) -> Any:
    """A model of transformers with random weights, in evaluation mode."""
    ids = {"pad_token_id": tokenizer.pad_id, "bos_token_id": tokenizer.begin_id, "eos_token_id": tokenizer.end_id}
    if kind == "ModernBert":
        ids |= {"cls_token_id": tokenizer.begin_id, "sep_token_id": tokenizer.end_id}
    fields = {"vocab_size": tokenizer.vocab_size, "max_position_embeddings": 64} | TINY | ids | fields
    model = getattr(transformers, kind + head)(getattr(transformers, f"{kind}Config")(**fields)).eval()
    randomize(model)
    return model


@pytest.mark.parametrize("variant", VARIANTS)
def test_both_sides_give_the_same_logits(variant: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    kind, fields = VARIANTS[variant]
    foreign = make(kind, tokenizer, **fields)
    loaded, imported = to_bigtx(save(foreign, tokenizer, tmp_path / "foreign"), tmp_path / "run")
    assert imported.model_type == kind.lower()

    tokens, real = padded_tokens(LENGTHS, tokenizer.vocab_size, tokenizer.pad_id)
    types = torch.randint(fields.get("type_vocab_size", 2), tokens.shape, generator=torch.Generator().manual_seed(3))
    has_types = kind != "ModernBert"
    inputs = {"input_ids": tokens, "attention_mask": real.long()} | ({"token_type_ids": types} if has_types else {})
    with torch.no_grad():
        theirs = foreign(**inputs).logits
        ours = loaded.model(tokens, segment_ids=real.long(), token_types=types if has_types else None)
        assert distance(ours[real], theirs[real]) < TOLERANCE

        # Without padding and without token types, as a single text is read.
        theirs = foreign(input_ids=tokens[:1]).logits
        assert distance(loaded.model(tokens[:1]), theirs) < TOLERANCE


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_export_is_what_was_imported(variant: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    kind, fields = VARIANTS[variant]
    foreign = make(kind, tokenizer, **fields)
    folder = save(foreign, tokenizer, tmp_path / "foreign")
    loaded, imported = to_bigtx(folder, tmp_path / "run")
    exported = to_foreign(loaded, tmp_path / "exported")

    before, after = tensors(folder), tensors(exported)
    assert after.keys() == before.keys() - set(imported.match.dropped)
    idle = {key for key in after if key.endswith(("predictions.bias", "lm_head.bias"))}
    assert [key for key in after.keys() - idle if not torch.equal(after[key], before[key])] == []

    auto = transformers.AutoModelForMaskedLM.from_pretrained(exported, trust_remote_code=False).eval()
    assert type(auto) is type(foreign)
    tokens, real = padded_tokens(LENGTHS, tokenizer.vocab_size, tokenizer.pad_id)
    with torch.no_grad():
        again = auto(input_ids=tokens, attention_mask=real.long()).logits
        assert torch.equal(again, foreign(input_ids=tokens, attention_mask=real.long()).logits)

    family = by_model_type(imported.model_type)
    written = json.loads((exported / "config.json").read_text())
    assert family.problems(imported.config) == []
    assert family.read_config(written) == imported.config


def test_a_window_hides_what_lies_beyond_it(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """The test above would miss a window that is read as none, if texts were shorter than it."""
    fields = {"layer_types": ["sliding_attention"], "num_hidden_layers": 1, "local_attention": 6}
    loaded, _ = to_bigtx(save(make("ModernBert", tokenizer, **fields), tokenizer, tmp_path / "a"), tmp_path / "run")
    tokens, _ = padded_tokens((20,), tokenizer.vocab_size, tokenizer.pad_id)
    changed = tokens.clone()
    changed[0, 10] = tokens[0, 10] % (tokenizer.vocab_size - 2) + 1
    with torch.no_grad():
        differs = (loaded.model(tokens) != loaded.model(changed)).any(-1)[0]
    assert differs.nonzero().flatten().tolist() == [7, 8, 9, 10, 11, 12, 13]


def test_roberta_counts_positions_from_the_padding(tokenizer: Tokenizer) -> None:
    family = by_model_type("roberta")
    config = family.read_config({"vocab_size": 99, "max_position_embeddings": 514, "pad_token_id": 1})
    assert (config.position_offset, config.max_sequence_length) == (2, 512)
    assert family.problems(config) == []
    assert tokenizer.pad_id == 0
    with pytest.raises(ConfigError, match=r"model.position_offset=2 needs the id 1, but .* padding.* is 0"):
        family.write_config(config, tokenizer)


@pytest.mark.parametrize("kind", ["Bert", "Roberta", "ModernBert"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_body_without_its_head_gets_a_new_one(
    kind: str, tied: bool, tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    foreign = make(kind, tokenizer, tie_word_embeddings=tied)
    whole, _ = to_bigtx(save(foreign, tokenizer, tmp_path / "whole"), tmp_path / "of-whole")
    body = save(foreign.base_model, tokenizer, tmp_path / "body")
    capsys.readouterr()
    assert main(["import", str(body), "-o", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().out
    assert re.search(
        "New and untrained, because the model was saved without its head: .*tuning does not need this", said
    )
    loaded = bigtx.load(tmp_path / "run", device="cpu")
    classifier = Transformer(dataclasses.replace(loaded.model.config, num_classes=2))
    shapes = [
        {name: tuple(value.shape) for name, value in each.named_parameters()} for each in (classifier, loaded.model)
    ]
    transfer = plan_transfer(*shapes, name="run")
    head = {name for name in shapes[1] if name.startswith("head.")}
    assert head and set(transfer.dropped) <= head
    assert transfer.new == ["head.classes.weight", "head.classes.bias"]
    expected, found = (dict(run.model.named_parameters()) for run in (whole, loaded))
    assert expected.keys() == found.keys()
    for name, value in found.items():
        if name.startswith("head."):
            assert torch.isfinite(value).all()
            assert name.endswith("bias") or value.abs().sum() > 0
        else:
            assert torch.equal(value, expected[name]), name
    exported = to_foreign(loaded, tmp_path / "exported")
    assert type(transformers.AutoModelForMaskedLM.from_pretrained(exported)) is type(foreign)


@pytest.mark.parametrize(
    "missing", [["bert.encoder.layer.0.output.dense.bias"], ["cls.predictions.transform.dense.bias"]]
)
def test_a_body_or_head_with_holes_is_refused(missing: list[str], tokenizer: Tokenizer, tmp_path: Path) -> None:
    folder = save(make("Bert", tokenizer), tokenizer, tmp_path / "foreign")
    held = {key: tensor for key, tensor in tensors(folder).items() if key not in missing}
    save_file(held, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=f"1 missing: {missing[0]}"):
        to_bigtx(folder, tmp_path / "run")


def test_what_pretraining_added_to_bert_is_dropped_by_name(tokenizer: Tokenizer, tmp_path: Path) -> None:
    foreign = make("Bert", tokenizer, head="ForPreTraining")
    folder = save(foreign, tokenizer, tmp_path / "foreign")
    # As the first release spelled them, and with the copies that releases before safetensors wrote.
    spelled = {
        key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for key, tensor in tensors(folder).items()
    }
    copies = {
        "cls.predictions.decoder.weight": spelled["bert.embeddings.word_embeddings.weight"].clone(),
        "bert.embeddings.position_ids": torch.arange(64)[None],
    }
    save_file(spelled | copies, folder / "model.safetensors", {"format": "pt"})
    loaded, imported = to_bigtx(folder, tmp_path / "run")
    assert sorted(imported.match.dropped) == sorted(
        [
            *copies,
            "bert.pooler.dense.bias",
            "bert.pooler.dense.weight",
            "cls.seq_relationship.bias",
            "cls.seq_relationship.weight",
        ]
    )
    tokens, _ = padded_tokens((30,), tokenizer.vocab_size, tokenizer.pad_id)
    with torch.no_grad():
        theirs = foreign(input_ids=tokens).prediction_logits
        assert distance(loaded.model(tokens), theirs) < TOLERANCE


def test_a_copy_of_a_tied_table_is_dropped(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """As releases before safetensors wrote it; of ModernBERT, the head is beside the model."""
    foreign = make("ModernBert", tokenizer)
    folder = save(foreign, tokenizer, tmp_path / "foreign")
    copies = {"decoder.weight": tensors(folder)["model.embeddings.tok_embeddings.weight"].clone()}
    save_file(tensors(folder) | copies, folder / "model.safetensors", {"format": "pt"})
    loaded, imported = to_bigtx(folder, tmp_path / "run")
    assert imported.match.dropped == ["decoder.weight"]
    tokens, _ = padded_tokens((30,), tokenizer.vocab_size, tokenizer.pad_id)
    with torch.no_grad():
        assert distance(loaded.model(tokens), foreign(input_ids=tokens).logits) < TOLERANCE


def test_modernbert_of_transformers_4_is_read_alike() -> None:
    """The fields of the published ModernBERT-base."""
    family = by_model_type("modernbert")
    old = {"global_attn_every_n_layers": 3, "global_rope_theta": 160000.0, "local_rope_theta": 10000.0}
    config = family.read_config(old | {"vocab_size": 99, "local_attention": 128, "num_hidden_layers": 22})
    assert (config.attention_window, config.global_attention_every) == (64, 3)
    assert (config.rope_theta, config.local_rope_theta) == (160000.0, 10000.0)
    assert family.read_config(transformers.ModernBertConfig(vocab_size=99).to_dict()) == config
    assert family.read_config(old | {"vocab_size": 99, "local_rope_theta": None}).local_rope_theta == 160000.0


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        ("full full full", {"global_attn_every_n_layers": 1}),
        ("full sliding full", {"global_attn_every_n_layers": 2, "local_attention": 6}),
        ("sliding sliding sliding", {"local_attention": 6}),
    ],
)
def test_layers_with_a_window_are_written_for_transformers_4(
    tokenizer: Tokenizer, kinds: str, expected: dict[str, int]
) -> None:
    """It assumes that every third layer has no window, unless a config says otherwise."""
    family = by_model_type("modernbert")
    values = {"layer_types": [f"{kind}_attention" for kind in kinds.split()], "local_attention": 6}
    config = family.read_config(TINY | values | {"vocab_size": tokenizer.vocab_size})
    written = family.write_config(config, tokenizer)
    names = ("global_attn_every_n_layers", "local_attention")
    assert {name: written[name] for name in names if name in written} == expected


@pytest.mark.parametrize(
    ("model_type", "values", "named"),
    [
        ("bert", {"hidden_act": "relu"}, ["hidden_act='relu'"]),
        ("bert", {"position_embedding_type": "relative_key", "is_decoder": True}, ["relative_key", "is_decoder=True"]),
        ("roberta", {"hidden_act": "silu"}, ["hidden_act='silu'"]),
        ("modernbert", {"classifier_bias": True, "classifier_activation": "relu"}, ["_bias=True", "_activation='relu"]),
        ("modernbert", {"layer_types": ["sliding_attention", "full_attention"] * 11}, ["layer_types"]),
        (
            "modernbert",
            {"rope_parameters": {"full_attention": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 10.0}}},
            ["rope_parameters.full_attention.rope_type='yarn'"],
        ),
    ],
)
def test_a_config_that_bigtx_does_not_express_is_refused(
    model_type: str, values: dict[str, Any], named: list[str]
) -> None:
    with pytest.raises(ConfigError) as error:
        by_model_type(model_type).read_config(values)
    assert [part for part in named if part not in str(error.value)] == []


def test_differing_dropouts_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    config = by_model_type("bert").read_config({"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.0})
    assert (config.dropout, config.attention_dropout) == (0.2, 0.0)
    assert not capsys.readouterr().out
    config = by_model_type("modernbert").read_config({"embedding_dropout": 0.2, "mlp_dropout": 0.1})
    assert (config.dropout, config.attention_dropout) == (0.2, 0.0)
    assert "mlp_dropout=0.1" in capsys.readouterr().out


OTHERWISE: dict[str, Any] = {
    "shape": "decoder",
    "num_kv_heads": 1,
    "head_width": 32,
    "mlp": "relu2",
    "experts": ExpertsConfig(num_experts=4),
    "norm": "rms",
    "embedding_norm": False,
    "norm_scale": False,
    "qk_norm": True,
    "attention_scale": 1.0,
    "positions": "relative",
    "bigram_rows": 9,
    "head_transform": False,
    "logit_scale": 0.5,
    "logit_soft_cap": 30.0,
    "attention_output_bias": None,
}
"""Values that none of the encoders expresses; None: the opposite of what it is."""

OF_BERT = {
    "norm_placement": "pre",
    "norm_bias": False,
    "attention_window": 5,
    "num_token_types": 0,
    "attention_bias": False,
    "mlp_bias": False,
    "head_bias": False,
}
CANNOT: dict[str, dict[str, Any]] = {
    "bert": OTHERWISE | OF_BERT | {"position_offset": 2},
    "roberta": OTHERWISE | OF_BERT | {"position_offset": 0},
    "modernbert": OTHERWISE
    | {"norm_placement": "post", "num_token_types": 2, "rope_scaling": RopeScalingConfig(method="linear", factor=2.0)},
}
IDLE = {"num_decoder_layers", "prefix_attention", "relative_num_buckets", "relative_max_distance", "init"}
IDLE |= {"bigram_size"}
IDLE |= {"audio", "lora", "num_classes", "class_head"}  # Of other models, or merged: see target.py and classes.py.
"""Fields without a meaning in these models, or without one once they are trained."""
FREE: dict[str, set[str]] = {
    "bert": {"global_attention_every", "rope_theta", "local_rope_theta", "rope_scaling"},
    "roberta": {"global_attention_every", "rope_theta", "local_rope_theta", "rope_scaling"},
    "modernbert": {"position_offset"},
}
"""Fields without a meaning in one of them."""


@pytest.mark.parametrize("model_type", CANNOT)
def test_every_field_is_expressed_or_named_as_a_problem(model_type: str, tokenizer: Tokenizer) -> None:
    family = by_model_type(model_type)
    config = family.read_config({"vocab_size": 99, "pad_token_id": tokenizer.pad_id, "local_attention": 6})
    assert family.problems(config) == []
    assert choose(config).model_type == model_type
    for name, value in CANNOT[model_type].items():
        value = not getattr(config, name) if value is None else value
        problems = family.problems(dataclasses.replace(config, **{name: value}))
        assert any(problem.startswith(f"model.{name}") for problem in problems), name

    changes: dict[str, Any] = {
        "vocab_size": 98,
        "hidden_size": 384,
        "num_layers": 5,
        "num_heads": 6,
        "mlp_size": 50,
        "norm_eps": 1e-3,
        "max_sequence_length": 77,
        "tie_embeddings": False,
        "dropout": 0.3,
        "attention_dropout": 0.1,
        "init_std": 0.5,
    }
    if model_type == "modernbert":
        changes |= {"norm_bias": True, "mlp": "swiglu", "mlp_bias": True, "head_bias": False, "rope_theta": 70.0}
        changes |= {"attention_window": 9, "global_attention_every": 4, "local_rope_theta": 60.0}
        changes |= {"attention_bias": {"attention_bias": True, "attention_output_bias": True}}
    else:
        changes |= {"num_token_types": 5}
    for name, value in changes.items():
        changed = dataclasses.replace(config, **(value if isinstance(value, dict) else {name: value}))
        assert family.problems(changed) == [], name
        assert family.read_config(family.write_config(changed, tokenizer)) == changed, name
    expressed = {field for value in changes.values() if isinstance(value, dict) for field in value} | changes.keys()
    fields = {field.name for field in dataclasses.fields(ModelConfig)}
    assert fields - IDLE - FREE[model_type] - CANNOT[model_type].keys() - expressed == set()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("Bert", {"vocab_size": 30522}),
        ("Roberta", {"vocab_size": 50265, "type_vocab_size": 1}),
        ("ModernBert", {"vocab_size": 50368, "num_hidden_layers": 22, "intermediate_size": 1152}),
    ],
)
def test_published_shapes(kind: str, fields: dict[str, Any], tokenizer: Tokenizer, tmp_path: Path) -> None:
    """The sizes of bert-base, roberta-base and ModernBERT-base, on texts longer than the window."""
    base = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
    foreign = make(kind, tokenizer, **(base | {"max_position_embeddings": 512} | fields))
    randomize(foreign, std=0.03)
    loaded, _ = to_bigtx(save(foreign, tokenizer, tmp_path / "foreign"), tmp_path / "run")
    tokens, real = padded_tokens((300, 120), fields["vocab_size"], tokenizer.pad_id)
    with torch.no_grad():
        theirs = foreign(input_ids=tokens, attention_mask=real.long()).logits
        ours = loaded.model(tokens, segment_ids=real.long())
    assert distance(ours[real], theirs[real]) < TOLERANCE


def test_parameters_that_are_new_begin_with_the_values_of_seed_1() -> None:
    config = ModelConfig(vocab_size=128, hidden_size=8)
    link: Any = SimpleNamespace(keys=["lm_head.weight"], names=["head.weight"])
    weights: Any = None
    ((name, value),) = _converted([link], {}, weights, config)
    assert name == "head.weight" and torch.equal(value, initial_value(name, (128, 8), config, seed=1))
