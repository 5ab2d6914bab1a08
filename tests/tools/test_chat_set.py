"""The chats that the recipe writes: always the same, held-out questions apart, and answers scored to the letter."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

PROGRAM = Path(__file__).resolve().parents[2] / "tools" / "recipes" / "chat_set.py"


@pytest.fixture(scope="module")
def chat_set() -> ModuleType:
    spec = importlib.util.spec_from_file_location("chat_set", PROGRAM)
    assert spec and spec.loader
    module = sys.modules["chat_set"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def questions(records: list[dict[str, Any]]) -> set[str]:
    messages = [message for record in records for message in record.get("messages") or record["prompt"]]
    closed = ("day", "month", "the one")
    texts = (message["content"] for message in messages if message["role"] == "user")
    return {text for text in texts if not any(word in text for word in closed)}


def test_the_set_is_the_same_each_time_and_its_held_out_questions_are_new(chat_set: ModuleType, tmp_path: Path) -> None:
    for name in ("a", "b"):
        chat_set.main(["make", str(tmp_path / name), "--chats", "300", "--pairs", "200", "--tests", "100"])
    names = ("train.jsonl", "test.jsonl", "pairs.jsonl", "pairs-test.jsonl")
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    train, test, pairs, held_out_pairs = (lines(tmp_path / "a" / name) for name in names)
    assert (len(train), len(test), len(pairs)) == (300, 100, 200)
    assert not questions(train + pairs) & questions(test + held_out_pairs)
    assert {record["fault"] for record in pairs} == {"form", "wrong", "chatter"}
    assert all(record["chosen"] != record["rejected"] for record in pairs)


def test_answers_are_scored_to_the_letter(chat_set: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    chat_set.main(["make", str(tmp_path), "--chats", "10", "--pairs", "1", "--tests", "40"])
    records = lines(tmp_path / "test.jsonl")
    known = [record["messages"][-1]["content"] for record in records]
    for responses, expected in (
        (known, {"well-formed": 1.0, "right": 1.0}),
        ([f"Sure! {text}" for text in known], {"well-formed": 0.0, "right": 0.0}),
        ([text.replace(r["expected"], "x") for text, r in zip(known, records, strict=True)], {"well-formed": 1.0}),
    ):
        answered = [
            record | {"prediction": {"response": text}} for record, text in zip(records, responses, strict=True)
        ]
        found = chat_set.scored(answered)
        assert {name: found[name] for name in expected} == expected
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(record) + "\n" for record in answered))
    capsys.readouterr()
    chat_set.main(["score", str(tmp_path / "answers.jsonl")])
    assert "well-formed              100.0%" in capsys.readouterr().out
