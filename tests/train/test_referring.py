"""When a fine-tuning computes what the base says of the records, and what it keeps of that."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from bigtx.config.schema import FinetuneConfig
from bigtx.finetuning import run as run_module
from bigtx.finetuning.measure import REFERENCE
from bigtx.finetuning.tasks.task import Examples
from bigtx.train import start
from bigtx.train.start import Start
from bigtx.train.state import RunState
from bigtx.utils import log
from bigtx.utils.errors import CheckpointError


class Referring:
    """A fine-tuning on one rank, whose base gives 10 times each example's number."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, **facts: Any) -> None:
        ranks = SimpleNamespace(on_first=lambda action: action(), once=lambda action: action())
        self.context: Any = SimpleNamespace(folder=folder, ranks=ranks, dry_run=False)
        task = SimpleNamespace(
            needs_reference=True, max_length=8, with_reference=lambda example, numbers: (example, *numbers)
        )
        splits = {name: Examples([], numbers) for name, numbers in (("train", [1, 2]), ("validation", [3]))}
        self.inputs: Any = SimpleNamespace(
            config=FinetuneConfig(),
            facts={"data": {"train": "d"}, **facts},
            tokenizer=SimpleNamespace(fingerprint="t"),
            task=task,
            data=SimpleNamespace(splits=splits, lengths=lambda split: [3]),
        )
        self.base: dict[str, Any] = {"manifest_sha256": "m"}
        self.engine: Any = None
        self.done: list[str] = []
        monkeypatch.setattr(log, "say", lambda text="": None)
        monkeypatch.setattr(run_module, "make_reference", self._make)
        monkeypatch.setattr(run_module, "set_first_weights", self._set_first_weights)

    def _make(self, engine: Any, ranks: Any, task: Any, splits: dict[str, list[int]], size: int) -> Any:
        self.done.append("ask")
        return {name: np.array([[10.0 * number] for number in numbers]) for name, numbers in splits.items()}

    def _set_first_weights(self, context: Any, inputs: Any, engine: Any, base: Any, *, keep_frozen: bool = True) -> Any:
        self.done.append(f"weights of {base}, kept {keep_frozen}")
        return self.base

    def refer(self, *, is_initial: bool) -> bool:
        """Return whether every example has what the base said of it."""
        made = run_module.with_reference(self.context, self.inputs, self.engine, self.base, is_initial=is_initial)
        examples = [made[name].examples for name in ("train", "validation")]
        return examples == [[(1, 10.0), (2, 20.0)], [(3, 30.0)]]


def test_the_base_is_asked_once_and_later_starts_read_what_it_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for expected in (["ask"], []):
        referring = Referring(tmp_path, monkeypatch)
        assert referring.refer(is_initial=True) and referring.done == expected


@pytest.mark.parametrize("change", ["file", "left_out", "data", "base", "tokenizer", "seed", "length"])
def test_what_was_lost_or_is_of_something_else_is_asked_of_the_base_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    assert Referring(tmp_path, monkeypatch).refer(is_initial=True)
    referring = Referring(tmp_path, monkeypatch, **({change: ["x"]} if change in ("left_out", "data") else {}))
    if change == "file":
        (tmp_path / REFERENCE).unlink()
    elif change == "base":
        referring.base = {"manifest_sha256": "n"}
    elif change == "tokenizer":
        referring.inputs.tokenizer.fingerprint = "u"
    elif change == "seed":
        referring.inputs.config.seed = 5
    elif change == "length":
        referring.inputs.task.max_length = 9
    assert referring.refer(is_initial=False)
    assert referring.done == ["weights of None, kept False", "ask"]


@pytest.mark.parametrize("needs", [True, False])
@pytest.mark.parametrize("is_resumed", [True, False])
def test_a_resumed_run_asks_before_its_own_weights_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, needs: bool, is_resumed: bool
) -> None:
    referring = Referring(tmp_path, monkeypatch)
    referring.inputs.task.needs_reference = needs
    state = RunState()
    monkeypatch.setattr(start, "saved_state", lambda config, found: state)
    monkeypatch.setattr(start, "load_checkpoint", lambda *_: referring.done.append("checkpoint"))
    monkeypatch.setattr(run_module, "keep_inputs", lambda *_: None)
    made, asked = list[bool](), list[Any]()
    monkeypatch.setattr(
        run_module,
        "with_reference",
        lambda *given, is_initial: (
            made.append(is_initial),
            asked.append(given[:2]),
            referring.done.append("refer"),
            "referred",
        )[-1],
    )
    if is_resumed:
        found = run_module.resume(referring.context, referring.inputs, referring.engine, Start({}, None, []))
        assert referring.done == ["refer"] * needs + ["checkpoint"] and found[0] is state
    else:
        found = run_module.begin(referring.context, referring.inputs, referring.engine)
        assert referring.done == ["weights of None, kept True"] + ["refer"] * needs
    assert made == [not is_resumed] * needs and asked == [(referring.context, referring.inputs)] * needs
    assert found[2] == ("referred" if needs else referring.inputs.data.splits)


@pytest.mark.parametrize(("sha256", "is_refused"), [("m", False), ("n", True)])
def test_the_base_must_be_the_one_that_the_run_began_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sha256: str, is_refused: bool
) -> None:
    referring, opened = Referring(tmp_path, monkeypatch), list[str]()
    source = SimpleNamespace(manifest_sha256=sha256, close=lambda: None)
    referring.base["checkpoint"] = "the base"
    monkeypatch.setattr(start, "open_other_run", lambda context, folder: (opened.append(folder), source)[1])
    if is_refused:
        with pytest.raises(CheckpointError, match=r"the base is not the base that base\.json names"):
            referring.refer(is_initial=False)
    else:
        assert referring.refer(is_initial=False)
    expected = [] if is_refused else ["weights of the base, kept False", "ask"]
    assert opened == ["the base"] and referring.done == expected
