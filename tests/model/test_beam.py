"""Beam search: the best of all texts where the beam holds them all, greedy where it holds one, alike in any batch."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from bigtx.config.schema import ModelConfig
from bigtx.model.beam import Beam, Found, beam_search
from bigtx.model.decode import Sampling, decode_tokens
from bigtx.model.transformer import Transformer

VARIANTS: dict[str, dict[str, Any]] = {
    "decoder": {},
    "prefix": {"prefix_attention": True},
    "encoder_decoder": {"shape": "encoder_decoder"},
    "relative": {"shape": "encoder_decoder", "positions": "relative", "num_kv_heads": 2},
    "learned": {"positions": "learned"},
    "bigrams": {"bigram_rows": 60},
    "encoder-decoder, bigrams": {"shape": "encoder_decoder", "bigram_rows": 60},
}
PROMPTS = [[1, 2, 3], [4, 5, 3, 2, 1, 5, 5, 3, 2], [3], [1, 2, 3, 3]]
START, END = 0, 1


def make_model(vocab_size: int = 40, seed: int = 1, **changes: Any) -> Transformer:
    settings = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "init_std": 0.3, "max_sequence_length": 64}
    model = Transformer(ModelConfig(**settings | {"vocab_size": vocab_size} | changes))
    model.init_weights(seed)
    if model.bigrams is not None:
        torch.nn.init.normal_(model.bigrams.table.weight, generator=torch.Generator().manual_seed(1))
    return model.eval()


def search(model: Transformer, prompts: list[list[int]], beam: Beam, limit: int = 12, **options: Any) -> list[Found]:
    return beam_search(
        model,
        model.config,
        prompts,
        max_new_tokens=[limit] * len(prompts),
        beam=beam,
        **{"end_ids": [END], "start_id": START} | options,
    )


@torch.no_grad()
def log_probabilities(model: Transformer, prompt: list[int], texts: list[tuple[int, ...]]) -> list[float]:
    """Of texts of one length and their ends, without a cache."""
    if model.config.shape == "encoder_decoder":
        targets = torch.tensor([[START, *text] for text in texts])
        logits = model(torch.tensor([prompt] * len(texts)), target_tokens=targets)
    else:
        tokens = torch.tensor([[*prompt, *text] for text in texts])
        prefix = torch.arange(tokens.shape[1])[None] < len(prompt) if model.config.prefix_attention else None
        logits = model(tokens, prefix_mask=prefix)[:, len(prompt) - 1 :]
    labels = torch.tensor([[*text, END] for text in texts])
    return logits.double().log_softmax(-1).gather(-1, labels[..., None]).sum((1, 2)).tolist()


@pytest.mark.parametrize("length_penalty", [0.0, 0.6, 2.0])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_beam_that_holds_all_texts_finds_the_best_of_them(variant: str, length_penalty: float) -> None:
    model, limit = make_model(6, **VARIANTS[variant]), 3
    beam = Beam(size=200, length_penalty=length_penalty)
    found = search(model, PROMPTS, beam, limit)
    letters = [letter for letter in range(6) if letter != END]
    of_each_length = [list(itertools.product(letters, repeat=length)) for length in range(limit + 1)]
    for prompt, best in zip(PROMPTS, found, strict=True):
        known = {
            text: value
            for texts in of_each_length
            for text, value in zip(texts, log_probabilities(model, prompt, texts), strict=True)
        }
        score, text = max((beam.score(value, len(text) + 1), text) for text, value in known.items())
        assert best.ids == [*text]
        assert best.score == pytest.approx(score, rel=1e-4)
        assert best.log_probability == pytest.approx(known[text], rel=1e-4)


@pytest.mark.parametrize("end_ids", [[END], [END, 17, 30]], ids=["one end", "three ends"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_beam_of_one_is_greedy(variant: str, end_ids: list[int]) -> None:
    ended = set()
    for seed in (1, 2, 3):
        model = make_model(seed=seed, **VARIANTS[variant])
        greedy = decode_tokens(
            model,
            model.config,
            PROMPTS,
            max_new_tokens=12,
            sampling=Sampling(temperature=0.0),
            end_ids=end_ids,
            start_id=START,
        )
        assert [found.ids for found in search(model, PROMPTS, Beam(size=1), end_ids=end_ids)] == greedy
        assert not any(i in end_ids for ids in greedy for i in ids)
        ended |= {len(ids) < 12 for ids in greedy}
    assert False in ended, "the limit is met too"


def test_a_beam_ends_where_any_of_several_ends_is_best() -> None:
    model, limit = make_model(6), 3
    beam = Beam(size=200, length_penalty=0.6)
    ends = [END, next(letter for letter in range(6) if letter != END)]
    best = search(model, PROMPTS[:1], beam, limit, end_ids=ends)[0]
    alone = [search(model, PROMPTS[:1], beam, limit, end_ids=[end])[0] for end in ends]
    # A text without either end that is best with one of them alone is found with both.
    assert not set(best.ids) & set(ends)
    assert best.score >= max(found.score for found in alone if not set(found.ids) & set(ends)) - 1e-6


@pytest.mark.parametrize("size", [2, 5])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_batch_gives_what_each_prompt_gives_alone(variant: str, size: int) -> None:
    model = make_model(**VARIANTS[variant])
    with torch.no_grad():
        # Ends come at very different steps.
        model.head.weight[END] *= 2.0
    together = search(model, PROMPTS, Beam(size=size))
    alone = [search(model, [prompt], Beam(size=size))[0] for prompt in PROMPTS]
    assert [found.ids for found in together] == [found.ids for found in alone]
    assert [found.score for found in together] == pytest.approx([found.score for found in alone], rel=1e-4)
    assert len({len(found.ids) for found in together}) > 1


@pytest.mark.parametrize("variant", ["decoder", "encoder_decoder"])
def test_ending_early_changes_nothing(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(**VARIANTS[variant])
    early = search(model, PROMPTS, Beam(size=4))
    monkeypatch.setattr(
        "bigtx.model.beam._Search.is_done",
        lambda self, best_open, beam: self.num_ended >= beam.size or best_open == float("-inf"),
    )
    assert search(model, PROMPTS, Beam(size=4)) == early


def test_a_score_is_that_of_the_model() -> None:
    model = make_model(shape="encoder_decoder")
    for prompt, found in zip(PROMPTS, search(model, PROMPTS, Beam(size=4)), strict=True):
        (expected,) = log_probabilities(model, prompt, [tuple(found.ids)])
        assert found.log_probability == pytest.approx(expected, rel=1e-4)
        assert found.score == pytest.approx(found.log_probability / ((6 + len(found.ids)) / 6) ** 0.6)


def test_limits() -> None:
    model = make_model(shape="encoder_decoder", head_bias=True)
    with torch.no_grad():
        model.head.bias[END] = -20.0
    assert search(model, [], Beam()) == []
    assert [found.ids for found in search(model, PROMPTS, Beam(), limit=0)] == [[]] * 4
    own = beam_search(
        model, model.config, PROMPTS, max_new_tokens=[1, 9, 4, 2], beam=Beam(), end_ids=[END], start_id=START
    )
    assert [len(found.ids) for found in own] == [1, 9, 4, 2], "each prompt has its own"
    few = search(model, PROMPTS, Beam(), num_ids=4)
    assert all(token < 4 for found in few for token in found.ids)
