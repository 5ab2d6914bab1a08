"""The loss, the rewards and the rows of preferences, with values by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bigtx.config.schema import FinetuneConfig, ModelConfig, PreferenceConfig, RecordsConfig, TokenizerTrainConfig
from bigtx.data.records.record import Record
from bigtx.finetuning.tasks.preference import Preference
from bigtx.model.loss import IGNORED, TokenScores
from bigtx.tokenizer.tokenizer import Tokenizer
from bigtx.tokenizer.train import train

TEXTS = ["red apple tree and green apple tree, the house of stone, who are you, I am the river. " * 3] * 20
SIDES = [("the tree", "red apple", "stone"), ("who are you, who", "you are", "I am the river")]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train(TokenizerTrainConfig(vocab_size=420), TEXTS)


def make(tokenizer: Tokenizer, *, data: dict[str, Any] | None = None, **settings: Any) -> Preference:
    config = FinetuneConfig(
        task="preference",
        model=ModelConfig(vocab_size=420, hidden_size=16, num_layers=1, num_heads=2, max_sequence_length=128),
        data=RecordsConfig(**(data or {})),
        preference=PreferenceConfig(**settings),
    )
    return Preference(Preference.resolve(config, tokenizer, []), tokenizer)


def pair(prompt: str, chosen: str, rejected: str) -> Record:
    return Record({"prompt": prompt, "chosen": chosen, "rejected": rejected}, "pairs.jsonl", 1)


def with_log_probs(rows: list[list[float]]) -> Callable[..., TokenScores]:
    """A model of which only the log-probabilities of labels matter: of chosen answers, then of rejected ones."""
    log_probs = torch.tensor(rows, requires_grad=True)
    return lambda **_: TokenScores(log_probs, log_probs > 0)


MODEL = with_log_probs([[0.0, -2.0], [-1.0, -4.0], [0.0, -3.0], [-3.5, -0.5]])
"""Log-probabilities of -2 and -5 of the chosen answers, of -3 and -4 of the rejected ones."""
REFERENCE = [(-3.0, -3.0), (-4.0, -6.0)]
# The log-ratios to the reference are 1 and 0, and -1 and 2: chosen less rejected is 1, and -3.


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_the_loss_by_hand(tokenizer: Tokenizer, beta: float, smoothing: float) -> None:
    """Conservative DPO: with the probability of the smoothing a pair is the wrong way round."""
    task = make(tokenizer, beta=beta, label_smoothing=smoothing)
    examples = [task.encode(pair(*sides)) for sides in SIDES]
    batch = task.collate([task.with_reference(*each) for each in zip(examples, REFERENCE, strict=True)])
    loss = task.loss(MODEL, batch)
    right, wrong = (
        sum(math.log(1 + math.exp(-sign * beta * margin)) for margin in (1.0, -3.0)) for sign in (1.0, -1.0)
    )
    assert loss.loss_sum.item() == pytest.approx((1 - smoothing) * right + smoothing * wrong)
    assert loss.reported_sum.item() == pytest.approx(right), "what is reported knows no smoothing"
    assert loss.loss_sum.requires_grad and not loss.reported_sum.requires_grad
    assert batch.num_labels == 2


def test_metrics_by_hand(tokenizer: Tokenizer) -> None:
    task = make(tokenizer, beta=0.1)
    rows = [
        (-2.0, -3.0, (-3.0, -3.0)),  # Rewards of 0.1 and 0.
        (-5.0, -4.0, (-4.0, -6.0)),  # Of -0.1 and 0.2.
        (-2.0, -1.0, (-7.0, -1.0)),  # Of 0.5 and 0: less likely than the other answer, but more than before.
        (-1.0, -1.0, (-1.0, -1.0)),  # Of 0 and 0: nothing is above 0.
    ]
    predictions = [
        {"chosen_log_prob": chosen, "rejected_log_prob": rejected, "_reference": reference}
        for chosen, rejected, reference in rows
    ]
    of_all = {"margin": (1 - 1 - 1 + 0) / 4, "accuracy": 1 / 4}
    assert task.metrics(predictions) == pytest.approx(
        of_all
        | {
            "loss": sum(math.log(1 + math.exp(-margin)) for margin in (0.1, -0.3, 0.5, 0.0)) / 4,
            "reward_margin": (0.1 - 0.3 + 0.5 + 0.0) / 4,
            "reward_accuracy": 2 / 4,
            "chosen_reward": (0.1 - 0.1 + 0.5 + 0.0) / 4,
            "rejected_reward": (0.0 + 0.2 + 0.0 + 0.0) / 4,
        }
    )
    assert task.metrics([*predictions[1:], predictions[0] | {"_reference": None}]) == pytest.approx(of_all)


def test_what_training_needs_of_the_base(tokenizer: Tokenizer) -> None:
    task = make(tokenizer)
    examples = [task.encode(pair(*sides)) for sides in SIDES]
    assert task.refer(MODEL, examples, torch.device("cpu")) == [(-2.0, -3.0), (-5.0, -4.0)]
    referred = [task.with_reference(*each) for each in zip(examples, REFERENCE, strict=True)]
    first, second = task.predict(MODEL, referred, torch.device("cpu"))
    assert first == {"chosen_log_prob": -2.0, "rejected_log_prob": -3.0, "margin": 1.0, "_reference": (-3.0, -3.0)}
    assert (second["margin"], second["_reference"]) == (-1.0, (-4.0, -6.0))


def test_rows_of_pairs(tokenizer: Tokenizer) -> None:
    task = make(tokenizer)
    examples = [task.encode(pair(*sides)) for sides in SIDES]
    examples[1] = task.with_reference(examples[1], (-4.0, -6.0))
    batch = task.collate(examples, [5, 9])
    user, assistant, end = tokenizer.role_ids["user"], tokenizer.role_ids["assistant"], tokenizer.end_id
    encode = tokenizer.encode
    whole = [
        ([user, *encode(prompt), end, assistant], [*encode(answers[side]), end])
        for side in (0, 1)
        for prompt, *answers in SIDES
    ]
    columns = batch.tokens.shape[1]
    assert columns % 16 == 0 and columns < 16 + max(len(prompt + answer) for prompt, answer in whole)
    for row, (prompt, answer) in enumerate(whole):
        length = len(prompt) + len(answer) - 1
        assert batch.tokens[row].tolist() == (prompt + answer)[:-1] + [tokenizer.pad_id] * (columns - length)
        labels = [IGNORED] * (len(prompt) - 1) + answer
        assert batch.labels[row].tolist() == labels + [IGNORED] * (columns - length)
        assert batch.text_lengths[row] == length
    assert batch.num_tokens == batch.text_lengths.sum()
    assert batch.num_tokens == 2 * task.mean_tokens(examples) == 4 * task.lengths(examples).target
    assert task.lengths(examples).num_rows == 2
    assert batch.reference.tolist() == [[0.0, 0.0], [-4.0, -6.0]]
    # Both rows of a record have numbers of their own, whatever the batch.
    assert batch.sequence_ids is not None and batch.sequence_ids.tolist() == [10, 18, 11, 19]
    assert [example.length for example in examples] == [max(map(int, batch.text_lengths[row::2])) for row in (0, 1)]
    assert set(batch.inputs()) == {"tokens", "labels", "sequence_ids", "text_lengths"}


def test_a_pair_that_is_too_long(tokenizer: Tokenizer) -> None:
    """The prompt loses its beginning, down to half of the length; then both answers lose their ends."""
    prompt, answer = tokenizer.encode("the house of stone " * 5), tokenizer.encode("red apple tree " * 5)
    assistant, end = tokenizer.role_ids["assistant"], tokenizer.end_id
    task = make(tokenizer, data={"max_length": 10})
    example = task.encode(pair("the house of stone " * 5, "red apple tree " * 5, "red apple tree " * 5 + "stone"))
    assert example.prompt.tolist() == [*prompt[-3:], end, assistant]
    assert example.chosen.tolist() == example.rejected.tolist() == answer[:5]
    assert example.is_equal and example.lost_start
    longest = len(tokenizer.encode("red apple tree " * 5 + "stone")) + 1
    assert example.num_cut == (1 + len(prompt) + 1 + 1 + longest) - 10
    short = task.encode(pair("the house of stone " * 5, "red", "green apple"))
    longer = len(tokenizer.encode("green apple")) + 1
    assert short.prompt.tolist() == [*prompt[-(10 - longer - 2) :], end, assistant] and not short.is_equal


def test_to_predict_a_prompt_goes_before_messages() -> None:
    names = {name: name for name in ("prompt", "messages", "chosen", "rejected")}
    task: Any = SimpleNamespace(
        fields=SimpleNamespace(**names),
        format=SimpleNamespace(
            prompt=lambda record, field: record.value(field), check=lambda messages, field: messages
        ),
    )
    messages = [{"role": "user", "content": "other"}]
    for fields, expected in (({"prompt": "one", "messages": messages}, "one"), ({"messages": messages}, messages)):
        assert Preference.divide(task, Record(fields, "a.jsonl", 1), False) == (expected, [])
