"""What a fine-tuning says before its first step: its steps and epochs, and chat roles that nothing has trained."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from bigtx.config.load import load, to_yaml
from bigtx.config.schema import (
    ChatConfig,
    FinetuneConfig,
    FinetuneTrainConfig,
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
    PretrainConfig,
)
from bigtx.finetuning.inputs import FEW_STEPS, describe_held_out, describe_length, length_setting, total_steps
from bigtx.finetuning.run import untrained_roles
from bigtx.utils.errors import ConfigError


def train_of(**settings: float | int) -> FinetuneConfig:
    return FinetuneConfig(task="sft", train=FinetuneTrainConfig(global_batch_size=16, **settings))  # type: ignore[arg-type]


def test_few_steps_are_said_and_the_advice_makes_enough() -> None:
    config = train_of(epochs=1)
    said, warning = describe_length(config, total_steps(config, 27), 27)
    assert said == "2 steps of 16 make 1.19 epochs (train.epochs=1 in whole steps)"
    assert "2 steps are so few" in warning and "train.global_batch_size" in warning
    found = re.search(r"train\.epochs=(\d+)", warning)
    assert found is not None
    more = train_of(epochs=float(found[1]))
    assert total_steps(more, 27) >= 100 and len(describe_length(more, total_steps(more, 27), 27)) == 1
    said, warning = describe_length(train_of(max_steps=5), 5, 1000)
    assert said == "5 steps of 16 make 0.08 epochs" and "write e.g. train.max_steps=100" in warning
    assert len(describe_length(train_of(max_steps=FEW_STEPS), FEW_STEPS, 27)) == 1


def test_few_records_are_read_more_often() -> None:
    config = train_of(epochs=3, min_steps=150)
    assert total_steps(config, 27) == 150 and length_setting(config, 27) == "train.min_steps"
    (said,) = describe_length(config, 150, 27)
    assert said == "150 steps of 16 make 88.9 epochs (train.min_steps=150, since train.epochs=3 would be 6 steps)"
    assert total_steps(config, 10_000) == 1875 and length_setting(config, 10_000) == "train.epochs"
    (said,) = describe_length(config, 1875, 10_000)
    assert said.endswith("make 3 epochs (train.epochs=3 in whole steps)")
    assert total_steps(train_of(max_steps=5, min_steps=150), 27) == 5, "a number of steps is what it says"


def test_why_nothing_is_held_out() -> None:
    config = train_of(epochs=3)
    assert describe_held_out(config).endswith("(data.validation_fraction)")
    few = dataclasses.replace(config, data=dataclasses.replace(config.data, min_held_out=10))
    assert "data.validation_fraction=0.1 would hold out fewer than data.min_held_out=10" in describe_held_out(few)


def base_of(folder: Path, config: FinetuneConfig | PretrainConfig) -> str:
    folder.mkdir()
    (folder / "config.yaml").write_text(to_yaml(config))
    return str(folder)


def chats_of(base: str | None, *, rank: int = 0, **optimizer: list[str]) -> FinetuneConfig:
    return FinetuneConfig(
        task="sft",
        base=base,
        model=ModelConfig(lora=LoraConfig(rank=rank)),
        optimizer=OptimizerConfig(**optimizer),  # type: ignore[arg-type]
        chat=ChatConfig(format="chat"),
    )


def test_frozen_embeddings_of_roles_that_nothing_has_trained_are_said(tmp_path: Path) -> None:
    plain = base_of(tmp_path / "plain", PretrainConfig())
    warning = untrained_roles(chats_of(plain, rank=8, train_also=["final_norm.*"]), plain)
    assert f"{plain} was not trained on chats" in warning
    advice = re.search(r"write '(optimizer\.train_also=.*)'", warning)
    assert advice is not None
    followed = load(FinetuneConfig, ["task=sft", advice[1]], check=False).optimizer.train_also
    assert followed == ["final_norm.*", "embedding.*"]
    assert untrained_roles(chats_of(plain, rank=8, train_also=followed), plain) == ""
    frozen = chats_of(plain, freeze=["embedding.*"])
    assert "write 'optimizer.freeze=[]'" in untrained_roles(frozen, plain)
    assert untrained_roles(chats_of(plain), plain) == "", "all is trained"
    without = dataclasses.replace(chats_of(plain, rank=8), chat=ChatConfig(format="plain"))
    assert untrained_roles(without, plain) == "", "the plain format has no roles"


def test_a_base_that_knows_chats_is_not_warned_of(tmp_path: Path) -> None:
    plain = base_of(tmp_path / "plain", PretrainConfig())
    frozen = base_of(tmp_path / "frozen", chats_of(plain, rank=8))
    assert "was not trained on chats" in untrained_roles(chats_of(frozen, rank=8), frozen)
    trained = base_of(tmp_path / "trained", chats_of(plain))
    onwards = base_of(tmp_path / "onwards", chats_of(trained, rank=8))
    for base in (trained, onwards, str(tmp_path / "gone")):
        assert untrained_roles(chats_of(base, rank=8), base) == ""


@pytest.mark.parametrize(
    ("classes", "what"), [("[a, '']", "empty"), ("['a ', b]", "spaces"), ("[a, a]", "twice"), ("[a]", "one class")]
)
def test_names_of_classes_that_no_record_could_have(classes: str, what: str) -> None:
    with pytest.raises(ConfigError, match=rf"(?s)classify\.classes=.*{what}"):
        load(FinetuneConfig, [f"classify.classes={classes}"])
