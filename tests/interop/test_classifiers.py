"""Classifiers: fine-tuned in bigtx, exported for transformers' text-classification, and imported again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from finetunes import finetuned, labelled, write_jsonl
from interop import tiny_tokenizers
from interop.both_sides import randomize

from bigtx.cli import main
from bigtx.config.load import load, load_run_config, to_yaml
from bigtx.config.schema import (
    ClassifyConfig,
    ExpertsConfig,
    FieldsConfig,
    FinetuneConfig,
    ModelConfig,
    RecordsConfig,
    TokenizerTrainConfig,
)
from bigtx.engine.trained import find
from bigtx.engine.write_weights import save_weights
from bigtx.finetuning.tasks.classify import Classify
from bigtx.interop.exporter import ExportSettings
from bigtx.interop.families import choose, families
from bigtx.interop.verify import verify
from bigtx.model.size import parameter_shapes
from bigtx.model.transformer import Transformer
from bigtx.tokenizer.tokenizer import Tokenizer
from bigtx.tokenizer.train import train
from bigtx.train.start import SIZES, export_note

transformers = pytest.importorskip("transformers")

CLASSES = ["joy", "rage", "woe"]
TEXTS = [record["text"] for record in labelled(12, classes=CLASSES)]
BIASES = {"attention_bias": True, "attention_output_bias": True, "mlp_bias": True}
BERT = {"shape": "encoder", "norm": "layer", "norm_placement": "post", "norm_bias": True, "embedding_norm": True}
BERT |= {
    "positions": "learned",
    "mlp": "gelu",
    "head_transform": True,
    "head_bias": True,
    "num_kv_heads": None,
} | BIASES
MODERN = {"shape": "encoder", "norm": "layer", "embedding_norm": True, "mlp": "geglu", "head_transform": True}
MODERN |= {"head_bias": True, "num_kv_heads": None, "attention_window": 5, "global_attention_every": 2}

MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("LlamaForSequenceClassification", {}, {}),
    "tied": ("LlamaForSequenceClassification", {"tie_embeddings": True, "logit_soft_cap": 9.0}, {}),
    "mistral": ("MistralForSequenceClassification", {"attention_window": 5}, {}),
    "qwen2": ("Qwen2ForSequenceClassification", {"attention_bias": True}, {}),
    "qwen3": ("Qwen3ForSequenceClassification", {"qk_norm": True}, {}),
    "mixtral": ("MixtralForSequenceClassification", {"experts": ExpertsConfig(num_experts=4)}, {}),
    "qwen3_moe": (
        "Qwen3MoeForSequenceClassification",
        {"experts": ExpertsConfig(num_experts=4, normalize_weights=False), "qk_norm": True},
        {},
    ),
    "gpt2": (
        "GPT2ForSequenceClassification",
        {"norm": "layer", "norm_bias": True, "positions": "learned", "mlp": "gelu", "num_kv_heads": None} | BIASES,
        {},
    ),
    "bert": ("BertForSequenceClassification", BERT | {"num_token_types": 2}, {}),
    "roberta": ("RobertaForSequenceClassification", BERT | {"num_token_types": 1, "position_offset": 1}, {}),
    "modernbert": ("ModernBertForSequenceClassification", MODERN, {}),
    "modernbert, first": ("ModernBertForSequenceClassification", MODERN, {"pooling": "first"}),
}


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train(TokenizerTrainConfig(vocab_size=400), TEXTS * 4)


def make_run(folder: Path, tokenizer: Tokenizer, fields: dict[str, Any], pair: str = "", **classify: Any) -> Path:
    """A classifier as task=classify makes one, with random weights."""
    sizes = {"hidden_size": 32, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2, "max_sequence_length": 128}
    model = ModelConfig(**(sizes | fields), vocab_size=tokenizer.vocab_size)
    settings = ClassifyConfig(classes=CLASSES, **classify)
    data = RecordsConfig(fields=FieldsConfig(pair=pair))
    given = FinetuneConfig(run_dir=str(folder), model=model, classify=settings, data=data)
    run = Classify.resolve(given, tokenizer, [])
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(to_yaml(run), encoding="utf-8")
    tokenizer.save(folder / "tokenizer")
    built = Transformer(run.model)
    randomize(built, std=0.3)
    weights, shapes = dict(built.named_parameters()), parameter_shapes(run.model)
    facts = {"step": 7, "tokenizer": tokenizer.fingerprint}
    save_weights(folder, facts, shapes, ((name, weights[name]) for name in shapes))
    return folder


def predicted(run: Path, records: list[dict[str, Any]], folder: Path, *settings: str) -> list[dict[str, Any]]:
    """What `bigtx predict` says of records."""
    folder.mkdir(exist_ok=True)
    file, output = write_jsonl(folder / "in.jsonl", records), folder / "out.jsonl"
    assert main(["predict", str(run), "--input", str(file), "--output", str(output), *settings]) == 0
    return [json.loads(line)["prediction"] for line in output.read_text().splitlines()]


def piped(folder: Path, inputs: Any, batch_size: int = 4) -> list[dict[str, float]]:
    """The probabilities that transformers' pipeline gives, by class; in padded batches, if there are any."""
    settings = {"device": "cpu", "batch_size": batch_size, "top_k": None}
    pipe = transformers.pipeline("text-classification", model=str(folder), **settings)
    return [{one["label"]: one["score"] for one in row} for row in pipe(inputs)]


def agree(pipeline: list[dict[str, float]], ours: list[dict[str, Any]]) -> None:
    for theirs, prediction in zip(pipeline, ours, strict=True):
        assert theirs == pytest.approx(prediction["probabilities"], abs=1e-5)
        assert max(theirs, key=lambda name: theirs[name]) == prediction["label"]


OF_A_KIND = ("mistral", "qwen3", "qwen3_moe", "modernbert, first")
"""Models that differ from others in little."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in OF_A_KIND else []) for name in MODELS]
)
def test_a_pipeline_of_the_export_says_what_predict_says(
    name: str, tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    architecture, fields, classify = MODELS[name]
    run, out, again = make_run(tmp_path / "run", tokenizer, fields, **classify), tmp_path / "out", tmp_path / "again"
    assert main(["export", str(run), "--to", "hf", "-o", str(out)]) == 0
    said = capsys.readouterr().out
    assert f"as {architecture}: " in said and "The same token ids, and " in said
    assert "logits of texts, pairs and random tokens that differ by" in said
    assert "AutoModelForSequenceClassification.from_pretrained" in said
    values = json.loads((out / "config.json").read_text())
    assert values["id2label"] == {"0": "joy", "1": "rage", "2": "woe"} and values["label2id"]["woe"] == 2
    assert values["problem_type"] == "single_label_classification" and values["pad_token_id"] == tokenizer.pad_id
    assert not (out / "generation_config.json").exists()
    card = (out / "README.md").read_text()
    assert "pipeline_tag: text-classification" in card and "| Classes | joy, rage, woe |" in card

    ours = predicted(run, [{"text": text} for text in TEXTS], tmp_path / "texts")
    of_joy = [prediction["probabilities"]["joy"] for prediction in ours]
    assert max(of_joy) - min(of_joy) > 1e-3, "the weights tell texts apart"
    agree(piped(out, TEXTS), ours)

    # Back as a classifier: the same weights and the same answers.
    assert main(["import", str(out), "-o", str(again)]) == 0
    said = capsys.readouterr().out
    assert "all imported\n" in said and "It sorts texts into 3 classes" in said and f"bigtx predict {again}" in said
    same = predicted(again, [{"text": text} for text in TEXTS], tmp_path / "same")
    assert [one["label"] for one in same] == [one["label"] for one in ours]
    agree([one["probabilities"] for one in same], ours)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "modernbert"])
def test_pairs(name: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    run, out = make_run(tmp_path / "run", tokenizer, MODELS[name][1], "other"), tmp_path / "out"
    assert main(["export", str(run), "-o", str(out)]) == 0
    pairs = list(zip(TEXTS, reversed(TEXTS), strict=True))
    ours = predicted(run, [{"text": one, "other": other} for one, other in pairs], tmp_path / "pairs")
    agree(piped(out, [{"text": one, "text_pair": other} for one, other in pairs]), ours)


FOREIGN: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"num_key_value_heads": 2}),
    "qwen2": ("Qwen2", {"num_key_value_heads": 2}),
    "gpt2": ("GPT2", {}),
    "bert": ("Bert", {}),
    "roberta": ("Roberta", {"type_vocab_size": 1, "max_position_embeddings": 70}),
    "modernbert": ("ModernBert", {"local_attention": 8, "classifier_pooling": "mean"}),
}


def save_foreign(folder: Path, family: str, **fields: Any) -> Path:
    """A classifier of transformers with random weights, and a tokenizer of its family as its folder has it."""
    tiny_tokenizers.save_tokenizer(folder, family)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    kind, own = FOREIGN[family]
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 64}
    sizes |= {} if family == "gpt2" else {"intermediate_size": 40}
    names = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "pad", "cls_token_id": "cls"}
    ids = {key: getattr(theirs, f"{name}_token_id") for key, name in (names | {"sep_token_id": "sep"}).items()}
    known = {"id2label": dict(enumerate(["no", "maybe", "yes"])), "vocab_size": max(theirs.get_vocab().values()) + 1}
    config = getattr(transformers, f"{kind}Config")(**(sizes | own | ids | known | fields))
    model = getattr(transformers, f"{kind}ForSequenceClassification")(config)
    randomize(model, std=0.3)
    model.save_pretrained(folder)
    return folder


SENTENCES = ["The sea is not a river.", "What is a boat?", "2 of the boats ran.", "a", "The river ran to the sea, and"]


@pytest.mark.parametrize("family", FOREIGN)
def test_a_classifier_of_transformers_answers_alike_here_and_after_its_way_back(family: str, tmp_path: Path) -> None:
    source, run, out = save_foreign(tmp_path / "source", family), tmp_path / "run", tmp_path / "out"
    assert main(["import", str(source), "-o", str(run)]) == 0
    ours = predicted(run, [{"text": text} for text in SENTENCES], tmp_path / "texts")
    agree(piped(source, SENTENCES, 1), ours)
    assert ours[0]["probabilities"].keys() == {"no", "maybe", "yes"}
    assert main(["export", str(run), "-o", str(out)]) == 0
    agree(piped(out, SENTENCES), ours)
    pairs = [{"text": one, "text_pair": two} for one, two in zip(SENTENCES, reversed(SENTENCES), strict=True)]
    for theirs, again in zip(piped(source, pairs, 1), piped(out, pairs), strict=True):
        assert again == pytest.approx(theirs, abs=1e-5)

    # What it is trained on from reads as it does.
    given = [f"base={run}", "run_dir=x", "data.train=[x]", "train.epochs=1"]
    config = load(FinetuneConfig, [str(run / "config.yaml"), *given], check=False)
    assert config.classify.classes == ["no", "maybe", "yes"]
    other = load(FinetuneConfig, given, check=False)
    assert (
        other.classify.pooling
        == config.classify.pooling
        == {"modernbert": "mean"}.get(family, "last" if family in ("llama", "qwen2", "gpt2") else "first")
    )


def test_an_imported_classifier_is_trained_on_and_leaves_again(foreign_bert: Path, tmp_path: Path) -> None:
    run, tuned = tmp_path / "run", tmp_path / "tuned"
    assert main(["import", str(foreign_bert), "-o", str(run)]) == 0
    records = [{"text": text, "label": "yes" if "?" in text else "no"} for text in SENTENCES * 4]
    data = write_jsonl(tmp_path / "data.jsonl", records)
    changes = [f"base={run}", f"data.train=[{data}]", f"run_dir={tuned}", "train.max_steps=2"]
    said = finetuned(str(run / "config.yaml"), *changes)
    assert "new: none; dropped: none" in said and "cannot be exported" not in said
    assert main(["export", str(tuned), "-o", str(tmp_path / "out")]) == 0
    agree(piped(tmp_path / "out", SENTENCES), predicted(tuned, records[: len(SENTENCES)], tmp_path / "texts"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"problem_type": "multi_label_classification"}, "problem_type='multi_label_classification', but a classifier"),
        ({"id2label": {"0": "x"}}, "one class, so it predicts a number"),
        ({"id2label": {"0": "x", "1": "x", "2": "y"}}, "two classes with the same name"),
        ({"id2label": {"0": "x", "2": "y"}}, "id2label numbers its classes 0, 2"),
        ({"id2label": {"0": "x", "1": "y"}}, "classifier.bias [3] instead of [2]"),
        (
            {"architectures": ["BertForTokenClassification"]},
            "it is a BertForTokenClassification, and bigtx has no such",
        ),
        ({"architectures": ["RobertaForSequenceClassification"]}, "bigtx cannot read classifiers of model_type 'bert'"),
    ],
)
def test_heads_that_are_not_read(
    foreign_bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], message: str
) -> None:
    folder = Path(shutil.copytree(foreign_bert, tmp_path / "source"))
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | changes))
    assert main(["import", str(folder), "-o", str(tmp_path / "run")]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def foreign_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_foreign(tmp_path_factory.mktemp("foreign") / "bert", "bert")


def test_padding_that_ends_a_text_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The tokenizer is then named without that token, and both programs read the same one."""
    folder, run = save_foreign(tmp_path / "source", "llama"), tmp_path / "run"
    expected = piped(folder, SENTENCES, 1)
    plain = shutil.copytree(folder, tmp_path / "plain", ignore=shutil.ignore_patterns("*.safetensors"))
    values = json.loads((folder / "config.json").read_text())
    content = json.loads((folder / "tokenizer.json").read_text())
    end = content["post_processor"]["special_tokens"]["<s>"] | {"id": "</s>", "ids": [2], "tokens": ["</s>"]}
    content["post_processor"]["special_tokens"]["</s>"] = end
    content["post_processor"]["single"].append({"SpecialToken": {"id": "</s>", "type_id": 0}})
    (folder / "tokenizer.json").write_text(json.dumps(content))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "add_eos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "config.json").write_text(json.dumps(values | {"pad_token_id": 2}))
    assert main(["import", str(folder), "-o", str(run)]) == 2
    said = capsys.readouterr().err
    assert "the id 2 ends each text and is the padding too" in said and said.endswith("texts: tokenizer=FOLDER\n")
    assert main(["import", str(folder), "-o", str(run), f"tokenizer={plain}"]) == 0
    agree(expected, predicted(run, [{"text": text} for text in SENTENCES], tmp_path / "texts"))


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "mean of a decoder": ({}, {"pooling": "mean"}, "nearest is llama: classify.pooling=mean: the family has last"),
    "bias": ({"class_head": "transform"}, {}, "nearest is llama: model.class_head=transform: the family has score"),
    "nanochat": (
        {"norm_scale": False, "qk_norm": True, "embedding_norm": True, "mlp": "relu2"},
        {},
        "nanochat: model.num_classes=3: transformers has no classifier for it",
    ),
    "no transform": (MODERN | {"head_transform": False}, {}, "modernbert: model.head_transform=false: the family has"),
    "mean of a BERT": (BERT | {"num_token_types": 2}, {"pooling": "mean"}, "bert: classify.pooling=mean: the family"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_family_has_is_said_before_the_training_and_at_the_export(
    name: str, tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fields, classify, message = REFUSED[name]
    run = make_run(tmp_path / "run", tokenizer, fields, **classify)
    note = export_note(load_run_config(run), tokenizer)
    assert note is not None and note.startswith("note: this model cannot be exported to transformers: ")
    assert message in note and note.endswith("; everything else works")
    assert main(["export", str(run), "-o", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_model_that_differs_from_the_default_only_by_sizes_can_be_exported() -> None:
    """So its training does not look for a family."""
    sizes = dict(zip(SIZES, (777, 96, 3, 4, 2, 100, 77), strict=True))
    for given in (sizes, *({name: value} for name, value in sizes.items())):
        assert choose(ModelConfig(**{"vocab_size": 100, **given})).model_type == "llama"


def test_the_comparison_sees_another_summary(
    tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = make_run(tmp_path / "run", tokenizer, MODERN), tmp_path / "out"
    assert main(["export", str(run), "-o", str(out), "--no-verify"]) == 0
    values = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(values | {"classifier_pooling": "cls"}))
    checkpoint, config = find(run)
    (problem,) = verify(out, families()["modernbert"], checkpoint, config, tokenizer, ExportSettings()).problems
    assert "logits differ by" in problem
