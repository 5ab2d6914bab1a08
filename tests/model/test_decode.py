"""Generation: the cache changes nothing, the batch changes nothing, the seed changes everything."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from bigtx.config.schema import ModelConfig
from bigtx.model.decode import Sampling, decode_tokens
from bigtx.model.transformer import Transformer

VARIANTS: dict[str, dict[str, Any]] = {
    "rope": {},
    "grouped": {"num_kv_heads": 2, "qk_norm": True},
    "learned": {"positions": "learned"},
    "sinusoidal": {"positions": "sinusoidal", "norm_placement": "post"},
    "relative": {"positions": "relative", "num_kv_heads": 1},
    "bigrams": {"bigram_rows": 60, "bigram_size": 8},
}
PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8, 9, 10, 11, 12], [13], [1, 2, 3]]
GREEDY = Sampling(temperature=0.0)


def make_model(**changes: Any) -> Transformer:
    model = Transformer(
        ModelConfig(
            **{
                "vocab_size": 50,
                "hidden_size": 32,
                "num_layers": 2,
                "num_heads": 4,
                "init_std": 0.3,
                "max_sequence_length": 64,
            }
            | changes
        )
    )
    model.init_weights(1)
    if model.bigrams is not None:
        torch.nn.init.normal_(model.bigrams.table.weight, generator=torch.Generator().manual_seed(1))
    return model.eval()


def decode(model: Transformer, prompts: list[list[int]], **options: Any) -> list[list[int]]:
    settings: dict[str, Any] = {"max_new_tokens": 20, "sampling": GREEDY, "end_ids": ()}
    return decode_tokens(model, model.config, prompts, **settings | options)


def plain_greedy(model: Transformer, prompt: list[int], length: int) -> list[int]:
    """The whole text read again for each token, in windows as `decode_tokens` says."""
    ids, start, limit = (
        list(prompt),
        max(0, len(prompt) - model.config.max_sequence_length),
        model.config.max_sequence_length,
    )
    for _ in range(length):
        if len(ids) - start > limit:
            start = len(ids) - limit // 2
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids[start:]]))[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("limit", [64, 12])
@pytest.mark.parametrize("variant", VARIANTS)
def test_cached_greedy_equals_uncached(variant: str, limit: int) -> None:
    """A short limit makes texts outgrow what the model reads at once."""
    model = make_model(**VARIANTS[variant], max_sequence_length=limit)
    prompts = [*PROMPTS, list(range(15))]
    assert decode(model, prompts) == [plain_greedy(model, prompt, 20) for prompt in prompts]


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_batch_gives_what_each_prompt_gives_alone(variant: str) -> None:
    model = make_model(**VARIANTS[variant])
    sampling = Sampling(temperature=1.0, top_k=30, top_p=0.95, seed=5)
    together = decode(model, PROMPTS, sampling=sampling, end_ids=[7])
    alone = [
        decode(model, [prompt], sampling=sampling, end_ids=[7], first_index=index)[0]
        for index, prompt in enumerate(PROMPTS)
    ]
    assert together == alone
    assert together[0] != together[3], "the same prompt at another place draws its own"


def test_seeds() -> None:
    model = make_model()
    first, again, other = (decode(model, PROMPTS, sampling=Sampling(temperature=1.0, seed=seed)) for seed in (1, 1, 2))
    assert first == again and first != other


def test_ends() -> None:
    model = make_model()
    free = decode(model, PROMPTS)
    end_id = free[0][5]
    ended = decode(model, PROMPTS, end_ids=[end_id])
    for whole, cut in zip(free, ended, strict=True):
        assert cut == (whole[: whole.index(end_id)] if end_id in whole else whole)
    assert len(ended[0]) <= 5
    assert decode(model, PROMPTS, max_new_tokens=3) == [ids[:3] for ids in free]
    assert decode(model, PROMPTS, max_new_tokens=0) == [[], [], [], []]
    assert decode(model, []) == []


def test_tokens_are_told_as_they_come() -> None:
    model, told = make_model(), []
    results = decode(model, PROMPTS, max_new_tokens=4, on_token=lambda index, token: told.append((index, token)))
    assert told == [(index, results[index][step]) for step in range(4) for index in range(4)]


def test_ids_that_the_tokenizer_lacks_are_never_drawn() -> None:
    drawn = decode(make_model(), PROMPTS, sampling=Sampling(temperature=100.0), num_ids=20, max_new_tokens=50)
    assert {token for ids in drawn for token in ids} == set(range(20))


def draws(sampling: Sampling, probabilities: list[float], number: int = 4000) -> dict[int, float]:
    logits = torch.tensor(probabilities).log().expand(number, -1)
    counted = Counter(sampling.draw(logits, [sampling.generator(index) for index in range(number)]))
    return {token: count / number for token, count in sorted(counted.items())}


def test_distributions() -> None:
    base = [0.1, 0.4, 0.2, 0.3]
    assert draws(Sampling(temperature=0.0), base, 3) == {1: 1.0}
    assert draws(Sampling(temperature=1.0), base) == pytest.approx(dict(enumerate(base)), abs=0.03)
    squares = [p * p / sum(q * q for q in base) for p in base]
    assert draws(Sampling(temperature=0.5), base) == pytest.approx(dict(enumerate(squares)), abs=0.03)
    assert draws(Sampling(temperature=1.0, top_k=2), base) == pytest.approx({1: 4 / 7, 3: 3 / 7}, abs=0.03)
    assert draws(Sampling(temperature=1.0, top_k=9), base).keys() == {0, 1, 2, 3}
    assert draws(Sampling(temperature=1.0, top_p=0.5), base) == pytest.approx({1: 4 / 7, 3: 3 / 7}, abs=0.03)
    assert draws(Sampling(temperature=1.0, top_p=0.05), base) == {1: 1.0}
    assert draws(Sampling(temperature=1.0, top_p=1.0), base).keys() == {0, 1, 2, 3}


def test_bf16_weights() -> None:
    model = make_model().bfloat16()
    assert decode(model, PROMPTS[:1], max_new_tokens=5) == [plain_greedy(model, PROMPTS[0], 5)]


def test_compiled_blocks_are_not_compiled_for_every_length() -> None:
    model, compilations = make_model(), []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        compilations.append(len(inputs))
        return graph.forward

    expected = decode(model, PROMPTS)
    for block in model.blocks:
        block.compile(backend=backend, dynamic=False)
    tokens = torch.arange(32)[None]
    before = model(tokens)
    compiled = len(compilations)
    assert compiled > 0
    assert decode(model, PROMPTS) == expected
    assert torch.equal(model(tokens), before) and len(compilations) == compiled
