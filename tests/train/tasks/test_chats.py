"""What carries loss in a chat, what is left of one that is too long, and rows of several."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from bigtx.config.schema import ChatConfig, FinetuneConfig, ModelConfig, RecordsConfig, SftConfig, TokenizerTrainConfig
from bigtx.data.records.record import BadRecordError, Record
from bigtx.finetuning.tasks.chats import ChatFormat, Part
from bigtx.finetuning.tasks.preference import Preference
from bigtx.finetuning.tasks.sft import Sft, best_fit
from bigtx.model.loss import IGNORED
from bigtx.model.transformer import Transformer
from bigtx.tokenizer.tokenizer import Tokenizer
from bigtx.tokenizer.train import train
from bigtx.utils.errors import ConfigError

TEXTS = ["red apple tree and green apple tree, the house of stone, who are you, I am the river. " * 3] * 20
CHAT = [
    {"role": "system", "content": "be short"},
    {"role": "user", "content": "the tree"},
    {"role": "assistant", "content": "red apple"},
    {"role": "user", "content": "the house"},
    {"role": "assistant", "content": "stone"},
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train(TokenizerTrainConfig(vocab_size=420), TEXTS)


@pytest.fixture(scope="module")
def without_roles() -> Tokenizer:
    return train(TokenizerTrainConfig(vocab_size=420, chat_roles=[]), TEXTS)


def config_of(**changes: Any) -> FinetuneConfig:
    model = ModelConfig(
        vocab_size=420, hidden_size=16, num_layers=2, num_heads=2, max_sequence_length=128, init="normal"
    )
    return FinetuneConfig(task="sft", model=model, **changes)


def sft(tokenizer: Tokenizer, **changes: Any) -> Sft:
    return Sft(Sft.resolve(config_of(**changes), tokenizer, []), tokenizer)


def preference(tokenizer: Tokenizer, **changes: Any) -> Preference:
    return Preference(Preference.resolve(config_of(**changes), tokenizer, []), tokenizer)


def test_the_loss_is_on_answers_and_their_ends_alone(tokenizer: Tokenizer) -> None:
    roles, end = tokenizer.role_ids, tokenizer.end_id
    texts = [tokenizer.encode(message["content"]) for message in CHAT]
    ids, answered = [], []
    for message, text in zip(CHAT, texts, strict=True):
        is_answer = message["role"] == "assistant"
        ids += [roles[message["role"]], *text, end]
        answered += [False] + [is_answer] * (len(text) + 1)
    batch = sft(tokenizer).collate([sft(tokenizer).encode(Record({"messages": CHAT}, "a"))])
    length = len(ids) - 1
    assert batch.tokens[0, :length].tolist() == ids[:-1]
    expected = [token if flag else IGNORED for token, flag in zip(ids, answered, strict=True)][1:]
    assert batch.labels[0, :length].tolist() == expected
    assert batch.labels[0, length:].unique().tolist() in ([], [IGNORED])
    assert batch.num_labels == sum(answered) and batch.num_tokens == length

    last = sft(tokenizer, sft=SftConfig(answers="last"))
    labels = last.collate([last.encode(Record({"messages": CHAT}, "a"))]).labels[0]
    assert labels[labels != IGNORED].tolist() == [*texts[-1], end]


def test_a_prompt_and_its_response_in_both_formats(tokenizer: Tokenizer, without_roles: Tokenizer) -> None:
    record = Record({"prompt": "the tree", "response": "red apple"}, "a")
    example = sft(tokenizer).encode(record)
    messages = [{"role": "user", "content": "the tree"}, {"role": "assistant", "content": "red apple"}]
    assert example.ids.tolist() == tokenizer.encode_chat(messages)
    plain = sft(without_roles, chat=ChatConfig(separator=" "))
    example = plain.encode(record)
    prompt, answer = without_roles.encode("the tree "), without_roles.encode("red apple")
    assert example.ids.tolist() == [*prompt, *answer, without_roles.end_id]
    assert example.is_answer.tolist() == [False] * len(prompt) + [True] * (len(answer) + 1)
    assert plain.encode(Record({"prompt": "the tree"}, "a"), for_training=False).ids.tolist() == prompt
    with pytest.raises(BadRecordError, match="is a chat, and the format is plain"):
        plain.encode(Record({"messages": CHAT}, "a"))


def test_a_chat_that_is_too_long_loses_its_earliest_turns(tokenizer: Tokenizer) -> None:
    whole = sft(tokenizer).encode(Record({"messages": CHAT}, "a"))
    short = [CHAT[0], *CHAT[3:]]
    expected = tokenizer.encode_chat(short)
    task = sft(tokenizer, data=RecordsConfig(max_length=len(whole.ids) - 1))
    example = task.encode(Record({"messages": CHAT}, "a"))
    assert example.ids.tolist() == expected and example.num_cut == len(whole.ids) - len(expected)
    # Then the beginning of what is read goes, down to a half, and the end of the answer.
    tiny = sft(tokenizer, data=RecordsConfig(max_length=8))
    long = Record({"prompt": "the house of stone " * 5, "response": "red apple tree " * 5}, "a")
    example, uncut = tiny.encode(long), sft(tokenizer).encode(long).ids.tolist()
    answer_from = uncut.index(tokenizer.role_ids["assistant"])
    assert example.ids.tolist() == uncut[answer_from - 3 : answer_from + 5] != uncut[:8]
    assert len(example.ids) == 8 and example.is_answer.tolist() == [False] * 4 + [True] * 4
    assert example.ids[3] == tokenizer.role_ids["assistant"]
    refusing = sft(tokenizer, data=RecordsConfig(max_length=8, too_long="refuse"))
    with pytest.raises(BadRecordError, match=r"tokens, and 8 are allowed \(data.max_length\)"):
        refusing.encode(Record({"messages": CHAT}, "a"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"messages": CHAT[:2]}, "no message of the role assistant"),
        ({"messages": [*CHAT[:2], {"role": "assistant", "content": " "}]}, r"message 3 \(assistant\) is empty"),
        ({"messages": [{"role": "judge", "content": "a"}]}, "Message 1 of a chat has the role 'judge'; this tokenizer"),
        ({"messages": []}, "has at least one"),
        ({"messages": "hello"}, "A chat is a list of messages"),
        ({"prompt": "a"}, "no field 'response'"),
        ({"prompt": "a", "response": " "}, "the field 'response' is empty"),
        ({"prompt": 3, "response": "b"}, "the field 'prompt' is a number, not a text"),
        ({}, "no field 'prompt'"),
    ],
)
def test_a_broken_chat_is_refused(tokenizer: Tokenizer, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(BadRecordError, match=message):
        sft(tokenizer).encode(Record(fields, "a"))


def test_what_is_read_before_an_answer_is_written(tokenizer: Tokenizer) -> None:
    task = sft(tokenizer)
    asked = tokenizer.encode_chat(CHAT[:-1], add_generation_prompt=True)
    for messages in (CHAT, CHAT[:-1]):
        example = task.encode(Record({"messages": messages}, "a"), for_training=False)
        assert example.ids[: example.prompt_length].tolist() == asked
        assert example.has_answer == (messages is CHAT)
    assert task.shown(Record({"messages": CHAT}, "a")).endswith("user: the house")
    assert task.answer(Record({"messages": CHAT}, "a")) == "stone"


@torch.no_grad()
def test_a_packed_row_says_of_each_chat_what_it_says_alone(tokenizer: Tokenizer) -> None:
    task = sft(tokenizer, sft=SftConfig(packing=True, row_length=64))
    records = [Record({"messages": CHAT[:3]}, "a"), Record({"messages": CHAT[3:]}, "b")]
    examples = [task.encode(record) for record in records]
    model = Transformer(task.config.model).eval()
    model.init_weights(1)
    alone = task.predict_in_run(model, examples, torch.device("cpu"))
    rows = task.pack(examples)
    assert len(rows) == 1
    batch = task.collate(rows)
    assert batch.tokens.shape == (1, 64)
    together = task.loss(model, batch)
    assert together.loss_sum.item() == pytest.approx(sum(each["_loss_sum"] for each in alone), rel=1e-5)
    assert batch.num_labels == sum(each["_num_tokens"] for each in alone)


def test_packing_holds_every_chat_once_and_wastes_little() -> None:
    lengths = np.random.default_rng(1).integers(1, 60, 400)
    bins = best_fit(lengths, 64)
    assert sorted(place for places in bins for place in places) == list(range(400))
    assert all(lengths[places].sum() <= 64 for places in bins)
    assert len(bins) <= 1.05 * lengths.sum() / 64
    assert bins == best_fit(lengths, 64)


def test_what_a_model_or_tokenizer_cannot_do(tokenizer: Tokenizer, without_roles: Tokenizer) -> None:
    with pytest.raises(ConfigError, match="the tokenizer has no chat role assistant"):
        sft(without_roles, chat=ChatConfig(format="chat"))
    assert sft(tokenizer).config.chat.format == "chat" and sft(without_roles).config.chat.format == "plain"


def test_pairs_of_texts_and_of_chats(tokenizer: Tokenizer) -> None:
    task, answers = preference(tokenizer), {"chosen": "stone", "rejected": "red apple"}
    as_chats = {name: [*CHAT[:-1], {"role": "assistant", "content": text}] for name, text in answers.items()}
    examples = [
        task.encode(Record({"prompt": CHAT[:-1], **answers}, "a")),
        task.encode(Record({"prompt": CHAT[:-1], **as_chats}, "a")),
        task.encode(Record(as_chats, "a")),
    ]
    for example in examples:
        assert example.prompt.tolist() == tokenizer.encode_chat(CHAT[:-1], add_generation_prompt=True)
        assert example.chosen.tolist() == [*tokenizer.encode("stone"), tokenizer.end_id]
    batch = task.collate(examples[:1])
    labels = batch.labels
    assert labels[0][labels[0] != IGNORED].tolist() == examples[0].chosen.tolist()
    assert labels[1][labels[1] != IGNORED].tolist() == examples[0].rejected.tolist()
    prompt = len(examples[0].prompt)
    assert batch.tokens[0, :prompt].tolist() == batch.tokens[1, :prompt].tolist() == examples[0].prompt.tolist()


def test_a_prompt_alone_is_answered(tokenizer: Tokenizer) -> None:
    task, asked = preference(tokenizer), tokenizer.encode_chat(CHAT[:-1], add_generation_prompt=True)
    for fields in ({"messages": CHAT}, {"messages": CHAT[:-1]}, {"prompt": CHAT[:-1]}):
        example = task.encode(Record(fields, "a"), for_training=False)
        assert example.prompt.tolist() == asked and not example.has_answers


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": "a", "chosen": "b"}, "no field 'rejected'"),
        ({"prompt": "a", "chosen": "b", "rejected": ""}, "the field 'rejected' is empty"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "are the same answer"),
        ({"chosen": "b", "rejected": "c"}, "no field 'prompt'"),
        ({"prompt": "a", "chosen": CHAT, "rejected": "c"}, "and one message of the role assistant"),
    ],
)
def test_a_broken_pair_is_refused(tokenizer: Tokenizer, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(BadRecordError, match=message):
        preference(tokenizer).encode(Record(fields, "a"))


def test_dpo_is_that_of_the_paper(tokenizer: Tokenizer) -> None:
    """Its loss and its gradient by torch's own operations from all logits at once."""
    task = preference(tokenizer)
    model = Transformer(task.config.model)
    model.init_weights(1)
    records = [
        Record({"prompt": "the tree", "chosen": "red apple", "rejected": "stone"}, "a"),
        Record({"prompt": "who", "chosen": "I am the river", "rejected": "you are"}, "b"),
    ]
    examples = [task.encode(record) for record in records]
    reference = [(-3.0, -1.5), (-9.0, -10.0)]
    batch = task.collate([task.with_reference(*pair) for pair in zip(examples, reference, strict=True)])
    task.loss(model, batch).loss_sum.backward()
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()

    total = torch.zeros(())
    for example, (chosen_before, rejected_before) in zip(examples, reference, strict=True):
        ratios = []
        for answer, before in ((example.chosen, chosen_before), (example.rejected, rejected_before)):
            ids = torch.tensor([*example.prompt.tolist(), *answer.tolist()])
            log_probs = model(ids[None, :-1]).log_softmax(dim=-1)[0]
            of_answer = log_probs.gather(1, ids[1:, None])[len(example.prompt) - 1 :].sum()
            ratios.append(of_answer - before)
        total = total - torch.nn.functional.logsigmoid(0.1 * (ratios[0] - ratios[1]))
    total.backward()
    assert task.loss(model, batch).loss_sum.item() == pytest.approx(total.item(), rel=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-3, atol=1e-6)


def test_turns_that_do_not_fit_are_counted() -> None:
    """Of three turns of 3, 3 and 2 ids, the last two fit into 8 beside a begin id and an answer of 2."""
    parts = [Part([10, 11, 12], "user", False), Part([20, 21, 22], "user", True), Part([30, 31], "assistant", False)]
    chats: Any = SimpleNamespace(tokenizer=SimpleNamespace(begin_ids=[1]), is_plain=True, max_length=8, may_cut=True)
    fitted = ChatFormat.fit(chats, parts, [[40, 41]])
    assert (fitted.prompt, fitted.answers) == ([1, 20, 21, 22, 30, 31], [[40, 41]])
    assert fitted.is_learned == [False, False, True, True, False, False]
    assert (fitted.num_cut, fitted.num_left_out, fitted.lost_start) == (3, 1, False)
