"""When a fine-tuning asks the base what it says of the records, and what it keeps of that."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from bigtx.config.schema import FinetuneConfig
from bigtx.train import reference
from bigtx.train.finetuning import FinetuneSession
from bigtx.train.session import Session
from bigtx.train.tasks.task import Examples
from bigtx.utils import log
from bigtx.utils.errors import CheckpointError


class Life(FinetuneSession):
    """A session on one rank, whose base says 10 times each example's number."""

    def __init__(self, run_dir: Path, monkeypatch: pytest.MonkeyPatch, **facts: Any) -> None:
        self.config, self.run_dir, self.dry_run, self.checkpoint = FinetuneConfig(), run_dir, False, None
        self.ranks = SimpleNamespace(rank=0, on_first=lambda act: act(), from_first=lambda value: value)
        self.done: list[str] = []
        self.facts, self.tokenizer = {"data": {"train": "d"}, **facts}, SimpleNamespace(fingerprint="t")
        self.base_facts, self.engine = {"manifest_sha256": "m"}, None  # type: ignore[assignment]
        self.task = SimpleNamespace(
            needs_reference=True,
            max_length=8,
            with_reference=lambda example, numbers: (example, *numbers),
            pack=lambda examples: ["packed", *examples],
        )
        self.splits = {name: Examples([], numbers) for name, numbers in (("train", [1, 2]), ("validation", [3]))}
        monkeypatch.setattr(log, "say", lambda text="": None)
        monkeypatch.setattr(reference, "make", self._make)

    def _make(self, engine: Any, ranks: Any, task: Any, splits: dict[str, list[int]], size: int) -> Any:
        self.done.append("ask")
        return {name: np.array([[10.0 * number] for number in numbers]) for name, numbers in splits.items()}

    def _go_back_to_base(self) -> None:
        self.done.append("go back")

    def referred(self) -> bool:
        """Whether every example has what the base said of it."""
        found = [self.splits[name].examples for name in ("train", "validation")]
        return found == [[(1, 10.0), (2, 20.0)], [(3, 30.0)]] and self.rows == ["packed", (1, 10.0), (2, 20.0)]


def test_the_base_is_asked_once_and_later_lives_read_what_it_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for expected in (["ask"], []):
        life = Life(tmp_path, monkeypatch)
        life._refer(is_initial=True)
        assert life.done == expected and life.referred()


@pytest.mark.parametrize("change", ["file", "left_out", "data", "base", "tokenizer", "seed", "length"])
def test_what_was_lost_or_is_of_something_else_is_asked_of_the_base_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    Life(tmp_path, monkeypatch)._refer(is_initial=True)
    life = Life(tmp_path, monkeypatch, **({change: ["x"]} if change in ("left_out", "data") else {}))
    if change == "file":
        (tmp_path / reference.FILE).unlink()
    elif change == "base":
        life.base_facts = {"manifest_sha256": "n"}
    elif change == "tokenizer":
        life.tokenizer.fingerprint = "u"
    elif change == "seed":
        life.config.seed = 5
    elif change == "length":
        life.task.max_length = 9
    life._refer(is_initial=False)
    assert life.done == ["go back", "ask"] and life.referred()


@pytest.mark.parametrize(
    ("needs", "is_resumed", "order"),
    [
        (True, False, ["weights", "refer at the start"]),
        (True, True, ["refer later", "weights"]),
        (False, False, ["weights"]),
        (False, True, ["weights"]),
    ],
)
def test_a_resumed_run_asks_before_its_own_weights_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, needs: bool, is_resumed: bool, order: list[str]
) -> None:
    life = Life(tmp_path, monkeypatch)
    life.task.needs_reference, life.checkpoint = needs, "some" if is_resumed else None
    monkeypatch.setattr(Session, "load_weights", lambda self: self.done.append("weights"))
    words = {True: "refer at the start", False: "refer later"}
    monkeypatch.setattr(Life, "_refer", lambda self, is_initial: self.done.append(words[is_initial]))
    life.load_weights()
    assert life.done == order


@pytest.mark.parametrize(("sha256", "is_refused"), [("m", False), ("n", True)])
def test_the_base_must_be_the_one_that_the_run_began_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sha256: str, is_refused: bool
) -> None:
    life, opened = Life(tmp_path, monkeypatch), list[str]()
    source = SimpleNamespace(manifest_sha256=sha256, close=lambda: None)
    life.base_facts["checkpoint"] = "the base"
    monkeypatch.setattr(Life, "open_other_run", lambda self, folder: opened.append(folder) or source)
    monkeypatch.setattr(Life, "_fill_initially", lambda self, base: self.done.append(base))
    if is_refused:
        with pytest.raises(CheckpointError, match=r"the base is not the base that base\.json names"):
            FinetuneSession._go_back_to_base(life)
    else:
        FinetuneSession._go_back_to_base(life)
    assert opened == ["the base"] and life.done == ([] if is_refused else ["the base"])
