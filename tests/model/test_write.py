"""Texts that a model writes: decoded as they come, alone as beside others, and ended in three ways."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from bigtx.config.schema import ModelConfig
from bigtx.model.decode import Sampling, decode_tokens
from bigtx.model.transformer import Transformer
from bigtx.model.write import Written, plain_prompts, write


class LetterStream:
    """Says letters."""

    def push(self, i: int) -> str:
        return "" if i == 26 else chr(ord("a") + i)

    def flush(self) -> str:
        return ""


class Letters:
    """A tokenizer of 26 letters; 26 ends a text."""

    vocab_size, end_ids, pad_id = 27, [26], 0

    def encode(self, text: str) -> list[int]:
        return [ord(letter) - ord("a") for letter in text]

    def encode_prompts(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) or [26] for text in texts]

    def encode_sources(self, texts: Sequence[str]) -> list[list[int]]:
        return [[*self.encode(text), 26] for text in texts]

    def stream(self, after: Sequence[int] = ()) -> LetterStream:
        return LetterStream()


@pytest.fixture(scope="module")
def model() -> Transformer:
    config = ModelConfig(vocab_size=50, hidden_size=32, num_layers=2, num_heads=4, init_std=0.3, max_sequence_length=64)
    made = Transformer(config)
    made.init_weights(1)
    return made.eval()


def texts_of(
    model: Transformer, texts: Sequence[str], *, temperature: float = 0.0, seed: int = 1, **options: object
) -> list[Written]:
    prompts = plain_prompts(model.config, Letters(), texts)
    sampling = Sampling(temperature=temperature, seed=seed)
    return write(model, Letters(), prompts, max_new_tokens=10, sampling=sampling, **options)  # type: ignore[arg-type]


def test_texts_are_those_of_the_drawn_tokens(model: Transformer) -> None:
    ids = decode_tokens(
        model,
        model.config,
        [Letters().encode("hello"), [26], [1]],
        max_new_tokens=10,
        sampling=Sampling(temperature=0.0),
        end_ids=[26],
        num_ids=27,
    )
    written = texts_of(model, ["hello", "", "b"])
    assert [one.text for one in written] == ["".join(map(LetterStream().push, own)) for own in ids]
    assert [one.num_tokens for one in written] == [len(own) for own in ids]


def test_each_is_what_it_would_be_alone(model: Transformer) -> None:
    alone = texts_of(model, ["b"], temperature=0.8, seed=3, first_index=2)
    assert texts_of(model, ["hello", "", "b"], temperature=0.8, seed=3)[2:] == alone


def test_a_stop_text_ends_its_own_row_alone(model: Transformer) -> None:
    plain = texts_of(model, ["hello", "b"])
    assert len(plain[0].text) > 4, "the model has something to say"
    stop = plain[0].text[2:4]
    heard: dict[int, str] = {0: "", 1: ""}

    def hear(index: int, text: str) -> None:
        heard[index] += text

    first, second = texts_of(model, ["hello", "b"], stop=[stop], on_text=hear)
    assert first.text == plain[0].text[: plain[0].text.index(stop)] and first.ended_by == "stop"
    assert first.num_tokens == len(first.text) + len(stop), "no token is drawn after it"
    assert second.text == plain[1].text.partition(stop)[0]
    assert heard == {0: first.text, 1: second.text}


def test_how_a_text_ended(model: Transformer) -> None:
    (written,) = texts_of(model, ["hello"])
    assert written.ended_by == ("length" if written.num_tokens == 10 else "end")
    with torch.no_grad():
        ends = write(
            model,
            type("Ends", (Letters,), {"end_ids": list(range(27))})(),
            plain_prompts(model.config, Letters(), ["b"]),
            max_new_tokens=10,
            sampling=Sampling(temperature=0.0),
        )
    assert ends == [Written("", 0, "end")]
