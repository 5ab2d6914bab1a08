"""The settings of the mixture: phases and skipped windows."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from bigtx.config.changes import compare
from bigtx.config.load import from_dict, load, to_dict
from bigtx.config.schema import PhaseConfig, PretrainConfig
from bigtx.utils.errors import ConfigError


@pytest.fixture
def good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A command line with two sources that look like prepared corpora."""
    for name in ("web", "code"):
        (tmp_path / name / "train").mkdir(parents=True)
        (tmp_path / name / "train" / "manifest.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    return ["run_dir=run", "data.sources.web.path=web", "data.sources.code.path=code", "train.max_steps=100"]


def test_phases_and_windows_are_read_from_files_and_the_command_line(good: list[str], tmp_path: Path) -> None:
    file = tmp_path / "mix.yaml"
    file.write_text("data:\n  phases:\n    late:\n      start: 8B\n      weights: {web: 0, code: 0.5}\n  skip: 1k-2k\n")
    config = load(PretrainConfig, [str(file), *good, "data.phases.late.weights.code=3", "data.phases.end.start=9.5B"])
    assert config.data.phases == {
        "late": PhaseConfig(start=8 * 10**9, weights={"web": 0.0, "code": 3.0}),
        "end": PhaseConfig(start=95 * 10**8),
    }
    assert config.data.skip == ["1k-2k"]
    assert from_dict(PretrainConfig, to_dict(config)) == config


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["data.phases.late.weights.web=1"], r"data\.phases\.late\.start: is not given"),
        (["data.phases.late.start=0"], "too small; the least is 1"),
        (["data.phases.late.start=8 steps"], r"data\.phases\.late\.start=8 steps.*whole number such as"),
        (
            ["data.phases.late.start=8B", "data.phases.late.weights.coed=1"],
            r"phases\.late\.weights\.coed \(command line\): is not a source in data\.sources; did you mean code\?",
        ),
        (["data.phases.late.start=8B", "data.phases.late.weights.xyz=1"], "sources are web, code"),
        (
            ["data.phases.late.start=8B", "data.phases.late.weights={web: 0, code: 0}"],
            r"data\.phases\.late\.weights \(command line\): every weight is 0",
        ),
        (["data.phases.late.start=8B", "data.phases.late.weights.web=-1"], r"weights\.web=-1.*too small"),
        (["data.phases.late.start=8B", "data.phases.late.weights.web=much"], r"weights\.web=much.*is not a number"),
        (["data.phases.late.start=8B", "data.phases.late.weights=3"], "has numbers by name"),
        (
            ["data.phases.a.start=1_000_000", "data.phases.b.start=1_000_100"],
            r"data\.phases\.b\.start=1000100.*starts at sequence 977, as does data\.phases\.a",
        ),
        (["data.skip=[100]"], r"data\.skip=100.*is not a range START-END"),
        (["data.skip=[1-2-3]"], "is not a range"),
        (["data.skip=[1.5-2k]"], "is not a whole number"),
        (["data.skip=[200-100]"], "ends before it begins"),
        (["data.skip=[100-100]"], "ends before it begins"),
        (["data.skip=[1k-2k, 0-1001]"], r"data\.skip=1k-2k.*overlaps 0-1001"),
    ],
)
def test_refused(good: list[str], args: list[str], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(PretrainConfig, [*good, *args])
    assert re.search(words, str(caught.value)), caught.value


def test_windows_that_touch_and_phases_after_the_end_are_fine(good: list[str]) -> None:
    load(PretrainConfig, [*good, "data.skip=[200-300, 100-200]", "data.phases.never.start=100T"])


def test_phases_never_change_within_a_run_and_windows_may(good: list[str]) -> None:
    before = to_dict(load(PretrainConfig, [*good, "data.phases.late.start=8B"]))
    del before["data"]["skip"]  # As in the folder of a run that an older bigtx began.
    after = load(
        PretrainConfig, [*good, "data.phases.late.start=9B", "data.phases.late.weights.web=0", "data.skip=100-200"]
    )
    assert {change.key: change.rule for change in compare(before, after)} == {
        "data.phases.late.start": "never",
        "data.phases.late.weights": "never",
        "data.skip": "by_name",
    }


def test_a_folder_that_is_no_corpus_is_named_with_what_makes_one(good: list[str], tmp_path: Path) -> None:
    (tmp_path / "my texts").mkdir()
    (tmp_path / "my texts" / "a.txt").write_text("a")
    with pytest.raises(ConfigError, match=r"it is not a prepared corpus; `bigtx data prepare 'input\.paths=my texts"):
        load(PretrainConfig, [*good, "data.sources.web.path=my texts"])
    with pytest.raises(ConfigError, match=r"data\.sources\.web\.path=web/train.*web"):
        load(PretrainConfig, [*good, "data.sources.web.path=web/train"])


def test_a_run_has_a_step_at_least(good: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"train\.max_steps=0 .*write a number above 0"):
        load(PretrainConfig, [*good, "train.max_steps=0"])
