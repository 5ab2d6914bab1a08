from __future__ import annotations

from pathlib import Path

import pytest

from bigtx.config.changes import ABSENT, Change, compare, refuse
from bigtx.config.load import from_dict, load, to_dict
from bigtx.config.schema import FinetuneConfig, PretrainConfig
from bigtx.utils.errors import ConfigError

BASE = ["run_dir=a", "data.sources.wiki.path=w", "train.max_steps=100"]


def config(*args: str) -> PretrainConfig:
    return load(PretrainConfig, [*BASE, *args], check=False)


def changes(*args: str) -> list[Change]:
    return compare(to_dict(config()), config(*args))


def test_the_same_config_has_no_changes() -> None:
    assert changes() == []
    assert changes("validation.every=0.5k steps") == []


@pytest.mark.parametrize(
    ("argument", "rule"),
    [
        ("run_dir=b", "free"),
        ("seed=2", "never"),
        ("engine.zero_stage=3", "free"),
        ("engine.precision=fp32", "free"),
        ("train.micro_batch_size=2", "free"),
        ("train.max_steps=200", "by_name"),
        ("train.global_batch_size=64", "never"),
        ("train.checkpoint_every=9 steps", "free"),
        ("optimizer.learning_rate=1", "by_name"),
        ("optimizer.name=muon", "never"),
        ("optimizer.ema_decay=0.9", "never"),
        ("schedule.warmup=9 steps", "by_name"),
        ("model.num_layers=2", "never"),
        ("model.rope_scaling.factor=2", "never"),
        ("data.prefetch_batches=0", "free"),
        ("data.sources.wiki.weight=2", "never"),
        ("data.sources.wiki.path=moved", "by_name"),
        ("distill.teacher=other", "by_name"),
        ("validation.max_sequences=1", "by_name"),
        ("validation.sources.v.path=x", "by_name"),
        ("track.project=x", "free"),
        ("deepspeed.x=1", "free"),
    ],
)
def test_rules(argument: str, rule: str) -> None:
    found = changes(argument)
    assert {change.rule for change in found} == {rule} or argument == "validation.sources.v.path=x"
    assert any(argument.startswith(change.key) for change in found)


def test_an_entry_that_comes_or_goes_is_a_change() -> None:
    added = compare(to_dict(config()), config("data.sources.code.path=c"))
    assert Change("data.sources.code.weight", ABSENT, 1.0, "never") in added
    gone = compare(to_dict(config("data.sources.code.path=c")), config())
    assert Change("data.sources.code.weight", 1.0, ABSENT, "never") in gone


def test_a_config_of_another_version() -> None:
    old = to_dict(config())
    del old["train"]["z_loss"], old["engine"]
    old["train"]["gone"] = 3
    assert compare(old, config()) == []
    assert [change.key for change in compare(old, config("train.z_loss=1e-4"))] == ["train.z_loss"]


def test_refusal_shows_a_diff_and_what_to_paste() -> None:
    found = changes("train.max_steps=200", "optimizer.learning_rate=0.1", "seed=2", "engine.compile=true")
    with pytest.raises(ConfigError) as caught:
        refuse(found, config("allow_changes=[optimizer.beta1]"))
    text = str(caught.value)
    assert "train.max_steps: 100 -> 200" in text
    assert "allow_changes=[optimizer.beta1,train.max_steps,optimizer.learning_rate]" in text
    assert text.index("cannot change") < text.index("seed: 1 -> 2") < text.index("init_from")
    assert "compile" not in text


def test_what_is_allowed_by_name_passes() -> None:
    refuse(changes("train.max_steps=200", "engine.compile=true"), config("allow_changes=[train.max_steps]"))
    with pytest.raises(ConfigError, match="seed"):
        refuse(changes("seed=2"), config("allow_changes=[seed]"))


def test_other_words_for_the_same_place_are_no_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "w").mkdir()
    (tmp_path / "link").symlink_to("w")
    for same in ("w/", "./w", str(tmp_path / "w"), "link", "w/../w"):
        assert changes(f"data.sources.wiki.path={same}") == []
    url = "https://example.org/wiki"
    other = [f"data.sources.web.path={url}"]
    assert compare(to_dict(config(*other)), config(f"data.sources.web.path={url}/")) == []
    assert [change.key for change in changes("data.sources.wiki.path=v")] == ["data.sources.wiki.path"]
    assert changes("init_from=.") != [] and changes("validation.sample_prompts=[a/]") != []
    old = from_dict(FinetuneConfig, {"data": {"train": ["w", "x.jsonl"]}, "base": "w"})
    new = from_dict(FinetuneConfig, {"data": {"train": ["w/", "./x.jsonl"]}, "base": "link"})
    assert compare(to_dict(old), new) == []
