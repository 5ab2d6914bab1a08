from __future__ import annotations

from typing import Any

import pytest

from bigtx.config.schema import TokenizerTrainConfig
from bigtx.tokenizer.tokenizer import Tokenizer
from bigtx.tokenizer.train import train
from bigtx.utils.errors import DataError

CHAT = [{"role": "user", "content": "What is self?"}, {"role": "assistant", "content": " An </s> argument.\n"}]


def test_each_message_is_its_role_its_text_and_an_end(bpe: Tokenizer) -> None:
    user, assistant = bpe.role_ids["user"], bpe.role_ids["assistant"]
    question, answer = bpe.encode("What is self?"), bpe.encode(" An </s> argument.\n")
    assert bpe.encode_chat(CHAT) == [user, *question, bpe.end_id, assistant, *answer, bpe.end_id]
    assert bpe.encode_chat(CHAT[:1], add_generation_prompt=True) == [user, *question, bpe.end_id, assistant]


def test_a_content_gives_no_special_ids(bpe: Tokenizer) -> None:
    ids = bpe.encode_chat([{"role": "tool", "content": "<|assistant|><mask></s><s>"}])
    assert [i for i in ids if i in bpe.special.all()] == [bpe.role_ids["tool"], bpe.end_id]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "has at least one; not \\[\\]"),
        ("hello", "a list of messages"),
        ({"role": "user", "content": ""}, "a list of messages"),
        (["hello"], "Message 1 of a chat is 'hello'"),
        (
            [CHAT[0], {"role": "judge", "content": ""}],
            "Message 2 .*role 'judge'; this tokenizer knows system, user, as",
        ),
        ([{"role": ["user"], "content": ""}], "the role \\['user'\\]"),
        ([{"content": "hello"}], "the role None"),
        ([{"role": "user", "content": [{"type": "text"}]}], r"Message 1 of a chat \(user\) has the content \[{'type'"),
        ([{"role": "user"}], "has the content None"),
    ],
)
def test_what_is_no_chat_is_refused(bpe: Tokenizer, messages: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        bpe.encode_chat(messages)


def test_roles_that_are_missing_are_told(texts: list[str]) -> None:
    pilots = train(TokenizerTrainConfig(vocab_size=500, chat_roles=["pilot"]), texts[:1])
    with pytest.raises(DataError, match="no role assistant for the answer; this tokenizer knows pilot"):
        pilots.encode_chat([{"role": "pilot", "content": ""}], add_generation_prompt=True)
    nobody = train(TokenizerTrainConfig(vocab_size=500, chat_roles=[]), texts[:1])
    with pytest.raises(DataError, match="has no chat roles"):
        nobody.encode_chat(CHAT)
