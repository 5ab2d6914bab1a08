"""T5 1.0 and 1.1: read and written so that transformers and bigtx give the same logits and write the same texts."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bigtx.config.schema import TokenizerTrainConfig
from bigtx.config.schema.model import ExpertsConfig, ModelConfig
from bigtx.interop.families import by_model_type, choose
from bigtx.model.decode import Sampling, decode_tokens
from bigtx.tokenizer.tokenizer import Tokenizer
from bigtx.tokenizer.train import train
from bigtx.utils.errors import ConfigError
from tests.interop.both_sides import TOLERANCE, distance, padded_tokens, randomize, save, tensors, to_bigtx, to_foreign

transformers = pytest.importorskip("transformers")

TINY = {"d_model": 32, "d_kv": 8, "d_ff": 40, "num_layers": 3, "num_heads": 4}
SOURCES, TARGETS = (40, 17, 5), (12, 30, 7)

VARIANTS: dict[str, dict[str, Any]] = {
    "1.0": {},
    "1.1": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "1.1, made anew": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "untied": False},
    "gated and tied": {"feed_forward_proj": "gated-silu"},
    "plain and untied": {"feed_forward_proj": "gelu_new", "tie_word_embeddings": False},
    "narrow heads, a deeper decoder": {"d_kv": 6, "num_heads": 2, "num_decoder_layers": 4, "layer_norm_epsilon": 0.1},
    "few buckets": {
        "relative_attention_num_buckets": 8,
        "relative_attention_max_distance": 20,
        "num_decoder_layers": 2,
    },
}


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    words = [f"{a}{b}{c}" for a in "bdklmnprst" for b in "aeiou" for c in ("", "n", "rs")]
    return train(TokenizerTrainConfig(vocab_size=450), [" ".join(words[i:] + words[:i]) for i in range(0, 150, 3)])


def make(tokenizer: Tokenizer, *, std: float = 0.2, untied: bool = True, **fields: Any) -> Any:
    """A model of transformers with random weights, in evaluation mode.

    Args:
        untied: whether a 1.1 gets a head of its own, as the published ones have it.
    """
    ids = {"pad_token_id": tokenizer.pad_id, "eos_token_id": tokenizer.end_id}
    ids["decoder_start_token_id"] = tokenizer.pad_id
    config = transformers.T5Config(**({"vocab_size": tokenizer.vocab_size} | TINY | ids | fields))
    model = transformers.T5ForConditionalGeneration(config).eval()
    # transformers 5 ties every T5 that it makes anew, and unties one whose file has another head.
    if untied and not config.scale_decoder_outputs:
        model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.lm_head.weight))
    randomize(model, std=std)
    return model


def texts(tokenizer: Tokenizer) -> dict[str, Any]:
    """Sources and targets of different lengths, as transformers wants them."""
    sources, real = padded_tokens(SOURCES, tokenizer.vocab_size, tokenizer.pad_id)
    targets, _ = padded_tokens(TARGETS, tokenizer.vocab_size, tokenizer.pad_id)
    return {"input_ids": sources, "attention_mask": real.long(), "decoder_input_ids": targets}


@pytest.mark.parametrize("variant", VARIANTS)
def test_both_sides_give_the_same_logits(variant: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    foreign = make(tokenizer, **VARIANTS[variant])
    loaded, imported = to_bigtx(save(foreign, tokenizer, tmp_path / "foreign"), tmp_path / "run")
    assert imported.model_type == "t5"
    inputs = texts(tokenizer)
    with torch.no_grad():
        theirs = foreign(**inputs).logits
        # The decoder's tokens are of segment 0 unless it is said otherwise.
        hidden = 1 - inputs["attention_mask"]
        ours = loaded.model(inputs["input_ids"], segment_ids=hidden, target_tokens=inputs["decoder_input_ids"])
    assert distance(ours, theirs) < TOLERANCE


def test_packed_pairs_are_each_pair_alone(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """One row of several sources and their targets, as bigtx trains on them."""
    foreign = make(tokenizer, **VARIANTS["few buckets"])
    loaded, _ = to_bigtx(save(foreign, tokenizer, tmp_path / "foreign"), tmp_path / "run")
    inputs = texts(tokenizer)
    sources = [row[:length] for row, length in zip(inputs["input_ids"], SOURCES, strict=True)]
    targets = [row[:length] for row, length in zip(inputs["decoder_input_ids"], TARGETS, strict=True)]
    packed = [
        {
            "tokens": torch.cat(parts)[None],
            "positions": torch.cat([torch.arange(len(part)) for part in parts])[None],
            "segment_ids": torch.cat([torch.full_like(part, number) for number, part in enumerate(parts)])[None],
        }
        for parts in (sources, targets)
    ]
    with torch.no_grad():
        ours = loaded.model(**packed[0], **{f"target_{name}": part for name, part in packed[1].items()})[0]
        for source, target, own in zip(sources, targets, ours.split(TARGETS), strict=True):
            theirs = foreign(input_ids=source[None], decoder_input_ids=target[None]).logits[0]
            assert distance(own, theirs) < TOLERANCE


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_export_is_what_was_imported(variant: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    foreign = make(tokenizer, **VARIANTS[variant])
    folder = save(foreign, tokenizer, tmp_path / "foreign")
    loaded, imported = to_bigtx(folder, tmp_path / "run")
    exported = to_foreign(loaded, tmp_path / "exported")

    before, after = tensors(folder), tensors(exported)
    assert after.keys() == before.keys()
    assert [key for key, tensor in after.items() if not torch.equal(tensor, before[key])] == []

    auto = transformers.AutoModelForSeq2SeqLM.from_pretrained(exported, trust_remote_code=False).eval()
    inputs = texts(tokenizer)
    with torch.no_grad():
        assert torch.equal(auto(**inputs).logits, foreign(**inputs).logits)

    family = by_model_type("t5")
    assert family.problems(imported.config) == []
    written = family.read_config(json.loads((exported / "config.json").read_text()))
    assert family.settled(written, after) == imported.config


@pytest.mark.parametrize("variant", ["1.0", "1.1"])
def test_greedy_texts_are_the_same(variant: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    foreign = make(tokenizer, std=0.3, **VARIANTS[variant])
    loaded, _ = to_bigtx(save(foreign, tokenizer, tmp_path / "foreign"), tmp_path / "run")
    inputs = texts(tokenizer)
    prompts = [row[:length].tolist() for row, length in zip(inputs["input_ids"], SOURCES, strict=True)]
    greedy = Sampling(temperature=0.0)
    options: dict[str, Any] = {"max_new_tokens": 64, "sampling": greedy, "start_id": tokenizer.pad_id}
    ours = decode_tokens(loaded.model, loaded.config.model, prompts, end_ids=(), **options)
    foreign.generation_config.eos_token_id = None
    theirs = foreign.generate(
        input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=64, do_sample=False
    )
    assert ours == theirs[:, 1:].tolist()
    assert all(len(set(ids)) > 3 for ids in ours)
    assert len({tuple(ids) for ids in ours}) == len(ours)


def test_an_export_writes_the_texts_that_the_run_writes(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """With nothing but what stands in the folder: tokenizer, start id, end id."""
    foreign = make(tokenizer, std=0.5, **VARIANTS["1.1"])
    loaded, _ = to_bigtx(save(foreign, tokenizer, tmp_path / "foreign"), tmp_path / "run")
    folder = to_foreign(loaded, tmp_path / "exported")
    reader = transformers.AutoTokenizer.from_pretrained(folder)
    writer = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    prompts = ["ba ben birs", "ka", "tu ton surs run na"]
    ours = loaded.generate_batch(prompts, max_new_tokens=20, temperature=0.0)
    for prompt, text in zip(prompts, ours, strict=True):
        ids = writer.generate(**reader(prompt, return_tensors="pt"), max_new_tokens=20, do_sample=False)[0]
        # As the run writes: `decode` makes U+FFFD of every byte of a run that is no UTF-8, also of whole characters.
        stream = loaded.tokenizer.stream()
        assert "".join(map(stream.push, ids.tolist())) + stream.flush() == text
    assert len(set(ours)) == len(ours)


def test_releases_of_transformers_told_a_tied_head_differently() -> None:
    family = by_model_type("t5")
    old, new = {"tie_word_embeddings": False}, {"tie_word_embeddings": True, "scale_decoder_outputs": False}
    assert family.read_config(old) == family.read_config(new)
    assert not family.read_config(old).tie_embeddings
    assert family.read_config(old).logit_scale == 1.0
    tied = family.read_config({})
    assert (tied.tie_embeddings, tied.logit_scale) == (True, 512**-0.5)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"feed_forward_proj": "gated-relu"}, "feed_forward_proj='gated-relu'"),
        ({"is_encoder_decoder": False}, "is_encoder_decoder=False"),
        ({"pad_token_id": 0, "decoder_start_token_id": 2}, "decoder_start_token_id=2"),
    ],
)
def test_a_config_that_bigtx_does_not_express_is_refused(values: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError) as error:
        by_model_type("t5").read_config(values)
    assert named in str(error.value)


CANNOT: dict[str, Any] = {
    "shape": "decoder",
    "num_kv_heads": 1,
    "mlp": "geglu",
    "experts": ExpertsConfig(num_experts=4),
    "norm": "layer",
    "norm_placement": "post",
    "embedding_norm": True,
    "norm_scale": False,
    "qk_norm": True,
    "attention_scale": None,
    "attention_window": 5,
    "positions": "rope",
    "num_token_types": 2,
    "bigram_rows": 9,
    "attention_bias": True,
    "attention_output_bias": True,
    "mlp_bias": True,
    "head_bias": True,
    "head_transform": True,
    "logit_scale": 0.5,
    "logit_soft_cap": 30.0,
}
FREE: dict[str, Any] = {
    "vocab_size": 98,
    "hidden_size": 48,
    "num_layers": 5,
    "num_decoder_layers": 4,
    "num_heads": 6,
    "head_width": 10,
    "mlp_size": 50,
    "norm_eps": 1e-3,
    "relative_num_buckets": 16,
    "relative_max_distance": 64,
    "max_sequence_length": 77,
    "dropout": 0.3,
}
IDLE = {"global_attention_every", "prefix_attention", "position_offset", "norm_bias", "rope_theta", "local_rope_theta"}
IDLE |= {"rope_scaling", "init", "init_std", "bigram_size"}
IDLE |= {"attention_dropout"}  # T5 has one rate.
IDLE |= {"audio", "lora", "num_classes", "class_head"}  # Of other models, or merged: see target.py and classes.py.
"""Fields without a meaning in a T5, or without one once it is trained."""


def test_every_field_is_expressed_or_named_as_a_problem(tokenizer: Tokenizer) -> None:
    family = by_model_type("t5")
    config = family.read_config({"vocab_size": 99, "tie_word_embeddings": False})
    assert family.problems(config) == []
    assert choose(config) is family
    for name, value in CANNOT.items():
        problems = family.problems(dataclasses.replace(config, **{name: value}))
        assert any(problem.startswith(f"model.{name}") for problem in problems), name
    for name, value in FREE.items():
        changed = dataclasses.replace(config, **{name: value})
        assert family.problems(changed) == [], name
        assert family.read_config(family.write_config(changed, tokenizer)) == changed, name
    assert family.problems(dataclasses.replace(config, tie_embeddings=True)) == []
    fields = {field.name for field in dataclasses.fields(ModelConfig)}
    assert fields - IDLE - CANNOT.keys() - FREE.keys() == {"tie_embeddings"}


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["1.0", "1.1"])
def test_published_shapes(variant: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """The sizes of t5-base and t5-v1_1-base."""
    base = {"vocab_size": 32128, "d_model": 768, "d_kv": 64, "num_layers": 12, "num_heads": 12}
    base["d_ff"] = 3072 if variant == "1.0" else 2048
    # With much larger weights, rounding grows so far on the way that transformers differs from itself.
    foreign = make(tokenizer, std=0.02, **(base | VARIANTS[variant]))
    loaded, _ = to_bigtx(save(foreign, tokenizer, tmp_path / "foreign"), tmp_path / "run")
    sources, real = padded_tokens((200, 90), 32128, tokenizer.pad_id)
    targets, _ = padded_tokens((50, 50), 32128, tokenizer.pad_id)
    with torch.no_grad():
        theirs = foreign(input_ids=sources, attention_mask=real.long(), decoder_input_ids=targets).logits
        ours = loaded.model(sources, segment_ids=1 - real.long(), target_tokens=targets)
    assert distance(ours, theirs) < TOLERANCE
