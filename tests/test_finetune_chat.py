"""Chats and preferences through the door of fine-tuning: learned, resumed, and refused where they are broken."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from doors import ROOT, bigtx, losses, read_lines, same_weights
from finetunes import WORDS, finetune, finetuned, kill_at, make_base, results, write_jsonl
from safetensors.numpy import load_file

PLACES = ("first", "last")


def question(generator: random.Random) -> tuple[str, str, str]:
    """A prompt, its answer, and another one."""
    words, place = generator.sample(WORDS[:12], 3), generator.randrange(2)
    return f"{PLACES[place]} {' '.join(words)}", f"so {words[-place]}.", f"so {words[place - 1]}."


def chats(count: int, *, seed: int = 1) -> list[dict[str, Any]]:
    """Chats with a system prompt and one or two turns."""
    generator, records = random.Random(seed), []
    for _ in range(count):
        messages = [{"role": "system", "content": "ba"}]
        for _ in range(generator.randrange(1, 3)):
            prompt, answer, _ = question(generator)
            messages += [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        records.append({"messages": messages})
    return records


def pairs(count: int, *, seed: int = 1) -> list[dict[str, Any]]:
    """Prompts, as texts and as chats in turns, with two answers."""
    generator, records = random.Random(seed), []
    for number in range(count):
        prompt, chosen, rejected = question(generator)
        asked: Any = prompt if number % 2 else [{"role": "user", "content": prompt}]
        records.append({"prompt": asked, "chosen": chosen, "rejected": rejected})
    return records


@pytest.fixture(scope="module")
def base(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(corpus, tmp_path_factory.mktemp("bases") / "decoder")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chats")
    write_jsonl(folder / "chats.jsonl", chats(120))
    write_jsonl(folder / "pairs.jsonl", pairs(64))
    return folder


def sft(base: Path, files: Path, run_dir: Path, *changes: str) -> list[str]:
    own = ["task=sft", f"base={base}", f"data.train=[{files / 'chats.jsonl'}]", f"run_dir={run_dir}"]
    return [*own, "train.max_steps=12", "train.checkpoint_every=5 steps", "chat.max_new_tokens=8", *changes]


def dpo(base: Path, files: Path, run_dir: Path, *changes: str) -> list[str]:
    own = ["task=preference", f"base={base}", f"data.train=[{files / 'pairs.jsonl'}]", f"run_dir={run_dir}"]
    return [*own, "train.max_steps=12", "train.checkpoint_every=5 steps", *changes]


@pytest.mark.dist
def test_packed_chats_on_two_ranks_and_a_killed_run_loses_nothing(base: Path, files: Path, tmp_path: Path) -> None:
    straight, run_dir = tmp_path / "straight", tmp_path / "run"
    packed = ["sft.packing=true", "sft.row_length=80", "engine.zero_stage=1"]
    said = finetuned(*sft(base, files, straight, *packed), ranks=2)
    assert re.search(r" in \d+ rows", said), said
    found = losses(straight)
    assert found[12] < found[1]
    kill_at(run_dir, 7, *sft(base, files, run_dir, *packed), ranks=2)
    finetuned(*sft(base, files, run_dir, *packed), ranks=2)
    assert losses(run_dir) == found
    same_weights(run_dir, straight)
    assert {"loss", "perplexity", "token_accuracy", "exact_match"} <= results(run_dir)["validation"].keys()
    shown = read_lines(run_dir / "predictions.jsonl")
    assert shown and all(isinstance(row["response"], str) for row in shown)


@pytest.mark.dist
@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_pairs_on_two_ranks_and_a_killed_run_loses_nothing(base: Path, files: Path, tmp_path: Path, stage: int) -> None:
    straight, run_dir = tmp_path / "straight", tmp_path / "run"
    # Measured on the pairs that are learned: what twelve steps do to others is chance.
    settings = [f"engine.zero_stage={stage}", f"data.validation=[{files / 'pairs.jsonl'}]"]
    said = finetuned(*dpo(base, files, straight, *settings), ranks=2)
    assert said.count("warning: 12 steps are so few") == 1, "said once, not by each rank"
    found = losses(straight)
    assert found[1] == pytest.approx(0.6931, abs=1e-4), "before the first step the model is its own reference"
    assert found[12] < found[1]
    assert results(straight)["validation"]["reward_margin"] > 0
    kill_at(run_dir, 7, *dpo(base, files, run_dir, *settings), ranks=2)
    reference = run_dir / "reference.safetensors"
    kept = load_file(reference)
    reference.unlink()  # Made again from the base, though the model has moved on.
    said = finetuned(*dpo(base, files, run_dir, *settings), ranks=2)
    assert "the base's log-probabilities" in said
    again = load_file(reference)
    assert again.keys() == kept.keys() and all(np.array_equal(again[name], kept[name]) for name in kept)
    assert losses(run_dir) == found
    same_weights(run_dir, straight)

    margin = results(run_dir)["validation"]["reward_margin"]
    command = [
        "evaluate",
        str(run_dir),
        "--split",
        "validation",
        "--wandb",
        "off",
        "--output",
        f"{tmp_path}/found.json",
    ]
    done = bigtx(*command)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())["metrics"]
    assert found["reward_margin"] == pytest.approx(margin, rel=0.1), "against the same reference as in the run"
    link = run_dir / "base.json"
    link.write_text(json.dumps(json.loads(link.read_text()) | {"manifest_sha256": "another"}))
    done = bigtx(*command)
    assert done.returncode == 2 and "is not the base that" in done.stderr, done.stderr


def test_broken_chats_are_named_by_file_and_line(base: Path, files: Path, tmp_path: Path) -> None:
    good, user = chats(3), {"role": "user", "content": "a"}
    broken = [
        {"messages": [user, {"role": "judge", "content": "b"}]},
        {"messages": [user]},
        {"messages": [user, {"role": "assistant", "content": ""}]},
    ]
    path = write_jsonl(tmp_path / "broken.jsonl", [*good, *broken])
    done = finetune(*sft(base, files, tmp_path / "run", f"data.train=[{path}]"))
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    for line, reason in ((4, "has the role 'judge'"), (5, "no message of the role assistant"), (6, "is empty")):
        assert any(f"broken.jsonl, line {line}: " in text and reason in text for text in done.stderr.splitlines())
    long = "ba " * 40
    cut = [{"prompt": "ka", "chosen": f"{long}da", "rejected": f"{long}ka"}, *pairs(8)]
    path = write_jsonl(tmp_path / "cut.jsonl", cut)
    done = finetune(*dpo(base, files, tmp_path / "run", f"data.train=[{path}]", "data.max_length=16"))
    assert done.returncode == 2 and "have two equal answers" in done.stderr and "max_equal" in done.stderr
    done = finetune(*sft(base, files, tmp_path / "run", "sft.row_length=40", "preference.beta=1"))
    assert done.returncode == 2 and "has no effect without sft.packing=true" in done.stderr
    assert "has no effect without task=preference" in done.stderr


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("changes", [[], ["model.lora.rank=4", "optimizer.learning_rate=1e-2"]])
def test_unpacked_chats_under_zero_3_and_what_the_run_answers(
    base: Path, files: Path, tmp_path: Path, changes: list[str]
) -> None:
    run_dir = tmp_path / "run"
    finetuned(*sft(base, files, run_dir, "engine.zero_stage=3", *changes), ranks=2)
    found = losses(run_dir)
    assert found[12] < found[1]
    asked = write_jsonl(tmp_path / "asked.jsonl", [{"prompt": "first ba da ka"}, *chats(2)])
    done = bigtx("predict", str(run_dir), "--input", str(asked), "--output", str(tmp_path / "out.jsonl"))
    assert done.returncode == 0, done.stderr
    assert all("response" in line["prediction"] for line in read_lines(tmp_path / "out.jsonl"))


@pytest.mark.slow
def test_pairs_with_adapters(base: Path, files: Path, tmp_path: Path) -> None:
    run_dir, rate = tmp_path / "run", "optimizer.learning_rate=1e-2"
    finetuned(*dpo(base, files, run_dir, "model.lora.rank=4", rate))
    found = losses(run_dir)
    assert found[1] == pytest.approx(0.6931, abs=1e-4), "adapters start at zero"
    assert found[12] < found[1]
    asked = write_jsonl(tmp_path / "asked.jsonl", [pairs(1)[0], {"prompt": "first ba da ka"}])
    done = bigtx("predict", str(run_dir), "--input", str(asked), "--output", str(tmp_path / "out.jsonl"))
    assert done.returncode == 0, done.stderr
    pair, answer = (line["prediction"] for line in read_lines(tmp_path / "out.jsonl"))
    assert pair["margin"] == pytest.approx(pair["chosen_log_prob"] - pair["rejected_log_prob"])
    assert isinstance(answer["response"], str)


@pytest.mark.slow
def test_the_recipes_teach_the_forms_and_the_better_answer(tmp_path: Path) -> None:
    """The chat set with its recipes, a smaller set and model, from nothing: the forms of held-out answers are kept, and
    the held-out margin of rewards rises."""
    program, tokenizer = ROOT / "tools" / "recipes" / "chat_set.py", tmp_path / "tokenizer"
    sizes = ["--chats", "700", "--pairs", "200", "--tests", "60"]
    subprocess.run([sys.executable, program, "make", tmp_path, *sizes], check=True, capture_output=True)
    texts = [message["content"] for chat in read_lines(tmp_path / "train.jsonl") for message in chat["messages"]]
    (tmp_path / "texts.txt").write_text("\n".join(texts), encoding="utf-8")
    said = f"input.paths=[{tmp_path / 'texts.txt'}]"
    done = bigtx("tokenizer", "train", said, f"output={tokenizer}", "vocab_size=1024")
    assert done.returncode == 0, done.stderr

    chat, better = tmp_path / "chat", tmp_path / "better"
    model = ["model.hidden_size=96", "model.num_layers=3", "model.num_heads=2", "model.max_sequence_length=256"]
    finetuned(
        "finetune/chat-set.yaml",
        f"tokenizer={tokenizer}",
        *model,
        *(f"data.{split}=[{tmp_path / f'{split}.jsonl'}]" for split in ("train", "test")),
        "train.global_batch_size=4",
        "train.epochs=4",
        "validation.num_examples=0",
        f"run_dir={chat}",
    )
    asked, answered = tmp_path / "test.jsonl", tmp_path / "answers.jsonl"
    done = bigtx("predict", str(chat), "--input", str(asked), "--output", str(answered))
    assert done.returncode == 0, done.stderr
    score = [sys.executable, program, "score", answered]
    told = subprocess.run(score, check=True, capture_output=True, text=True).stdout
    shares = dict(line.rsplit(maxsplit=1) for line in told.splitlines())
    assert float(shares["well-formed"].rstrip("%")) >= 90, told

    pairs_of = [f"data.train=[{tmp_path / 'pairs.jsonl'}]", f"data.test=[{tmp_path / 'pairs-test.jsonl'}]"]
    finetuned(
        "finetune/chat-set-dpo.yaml", f"base={chat}", *pairs_of, "optimizer.learning_rate=2e-4", f"run_dir={better}"
    )
    test = results(better)["test"]
    assert test["reward_margin"] > 0.2 and test["reward_accuracy"] > 0.6 and test["loss"] < 0.67
