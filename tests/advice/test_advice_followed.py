"""What messages advise can be copied, is accepted, and is the right thing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from advice import (
    cases_again,
    cases_chat,
    cases_commands,
    cases_config,
    cases_copies,
    cases_data,
    cases_formats,
    cases_models,
    cases_places,
    cases_prepared,
    cases_records,
    cases_runs,
    cases_settings,
    cases_training,
    cases_words,
)
from advice.desk import Case, Desk
from advice.messages import is_made_from, told_by
from advice.shelf import Shelf

FILES = (
    cases_commands,
    cases_config,
    cases_words,
    cases_data,
    cases_models,
    cases_chat,
    cases_training,
    cases_again,
    cases_copies,
    cases_settings,
    cases_formats,
    cases_records,
    cases_runs,
    cases_prepared,
    cases_places,
)
CASES: list[Case] = [case for file in FILES for case in file.CASES]


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    return Shelf(tmp_path_factory.mktemp("shelf"))


def _parameter(number: int, case: Case) -> Any:
    return pytest.param(case, id=f"{case.make.__name__}-{number}", marks=[pytest.mark.slow] if case.slow else [])


@pytest.mark.parametrize("case", [_parameter(*each) for each in enumerate(CASES)])
def test_advice_is_the_right_thing(case: Case, shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    desk = Desk(tmp_path, shelf, monkeypatch)
    desk.follow(case)
    for text in told_by(case.make.__name__):
        assert any(is_made_from(said, text) for said in desk.said), text
