"""Every YAML that ships."""

from __future__ import annotations

import dataclasses

import pytest

from bigtx.config.load import base_files, load
from bigtx.config.runs import shipped_configs, shipped_folder
from bigtx.config.schema import FinetuneConfig, ModelConfig, PrepareConfig, PretrainConfig, TokenizerTrainConfig
from bigtx.finetuning.tasks.classify import Classify
from bigtx.interop.families import family_of
from bigtx.utils.errors import ConfigError

SCHEMAS: dict[str, tuple[type, ...]] = {
    "model": (PretrainConfig,),
    "pretrain": (PretrainConfig,),
    "finetune": (FinetuneConfig,),
    "data": (PrepareConfig, TokenizerTrainConfig),
}


@pytest.mark.parametrize("name", shipped_configs())
def test_it_loads(name: str) -> None:
    refusals = []
    for schema in SCHEMAS[name.partition("/")[0]]:
        try:
            load(schema, [name], check=False)
        except ConfigError as error:
            refusals.append(f"{schema.__name__}: {error}")
        else:
            return
    pytest.fail("\n".join(refusals))


@pytest.mark.parametrize("name", shipped_configs())
def test_it_fits_together(name: str) -> None:
    """Apart from folders that only its user has."""
    if name.startswith("data/"):
        return
    try:
        load(SCHEMAS[name.partition("/")[0]][0], [name])
    except ConfigError as error:
        theirs = ("no such folder", "is empty", "is not given", "no such file", "holds no", "problems in the")
        assert all(any(words in line for words in theirs) for line in str(error).splitlines()), str(error)


@pytest.mark.parametrize("name", shipped_configs())
def test_it_says_what_it_is_and_builds_on_recipes_alone(name: str) -> None:
    root = shipped_folder().resolve()
    assert (root / name).read_text(encoding="utf-8").startswith("# "), "the first line is shown by `bigtx configs list`"
    assert all(path.is_relative_to(root) for path in base_files(root / name))


BASES = {"finetune/imdb.yaml": "pretrain/imdb-decoder.yaml"}
"""What a recipe is to be used with; others fit any base, such as a decoder of configs/model."""


def over(config: FinetuneConfig, base: str) -> FinetuneConfig:
    """A fine-tuning of the model of a recipe; a classifier has two classes."""
    model = load(PretrainConfig, [base], check=False).model
    config.model = dataclasses.replace(model, shape=config.model.shape, num_classes=None)
    if config.task != "classify":
        return config
    config.classify.classes = ["bad", "good"]
    return Classify.resolve(config, None, [])  # type: ignore[arg-type]


def test_a_classifier_of_the_other_small_decoder_can_be_exported() -> None:
    for base in ("pretrain/small-qwen3.yaml", "pretrain/small.yaml"):
        made = over(load(FinetuneConfig, ["finetune/classify.yaml"], check=False), base)
        made.model.vocab_size = 1000
        if base == "pretrain/small.yaml":
            with pytest.raises(ConfigError, match="no classifier for it"):
                family_of(made)
        else:
            assert family_of(made).model_type == "qwen3"


@pytest.mark.parametrize("name", [name for name in shipped_configs() if not name.startswith("data/")])
def test_its_model_can_be_exported_or_the_recipe_says_that_it_cannot(name: str) -> None:
    config = load(SCHEMAS[name.partition("/")[0]][0], [name], check=False)
    if isinstance(config, FinetuneConfig) and config.model.hidden_size == ModelConfig().hidden_size:
        config = over(config, BASES.get(name, "model/decoder-10m.yaml"))
    config.model.vocab_size = 1000
    text = (shipped_folder() / name).read_text(encoding="utf-8")
    try:
        family_of(config)
    except ConfigError as error:
        assert "cannot be exported to transformers" in text, str(error)
    else:
        assert "cannot be exported" not in text
