"""Encoder and encoder-decoder, and who sees whom in each of the three shapes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from bigtx.model import attention as masks
from bigtx.model.attention import Attention, Mask, Side, block_mask, dense_mask, make_mask
from bigtx.model.cache import KeyValueCache
from bigtx.model.decode import Sampling, decode_tokens
from bigtx.model.transformer import Transformer
from tests.model.test_transformer import random_tokens, tiny_config, tiny_model

T5: dict[str, Any] = {
    "shape": "encoder_decoder",
    "positions": "relative",
    "relative_num_buckets": 8,
    "relative_max_distance": 16,
    "attention_scale": 1.0,
    "mlp": "geglu_tanh",
    "num_decoder_layers": 3,
}
KINDS: dict[str, dict[str, Any]] = {
    "decoder": {},
    "decoder, window": {"attention_window": 3, "global_attention_every": 2, "local_rope_theta": 100.0},
    "decoder, learned": {"positions": "learned", "position_offset": 2, "num_token_types": 1},
    "decoder, bigrams": {"bigram_rows": 50, "bigram_size": 7},
    "encoder": {"shape": "encoder", "head_transform": True, "head_bias": True, "embedding_norm": True},
    "encoder, window": {"shape": "encoder", "attention_window": 2, "num_layers": 3, "global_attention_every": 3},
    "encoder, post": {"shape": "encoder", "norm": "layer", "norm_placement": "post", "positions": "learned"},
    "encoder-decoder": {"shape": "encoder_decoder"},
    "encoder-decoder, bigrams": {"shape": "encoder_decoder", "bigram_rows": 50},
    "T5": T5,
    "original": {"shape": "encoder_decoder", "positions": "sinusoidal", "norm": "layer", "norm_placement": "post"},
}
LENGTHS = (5, 9, 2)
TARGET_LENGTHS = (4, 3, 6)


def pack(texts: list[Tensor]) -> dict[str, Tensor]:
    """Texts in one row, as a document mask has them."""
    return {
        "tokens": torch.cat(texts)[None],
        "positions": torch.cat([torch.arange(len(text)) for text in texts])[None],
        "segment_ids": torch.cat([torch.full((len(text),), index) for index, text in enumerate(texts)])[None],
    }


@pytest.mark.parametrize("kind", KINDS)
def test_a_packed_row_is_each_document_alone(kind: str) -> None:
    model = tiny_model(**KINDS[kind])
    texts = list(random_tokens(1, sum(LENGTHS))[0].split(LENGTHS))
    targets = list(random_tokens(1, sum(TARGET_LENGTHS), seed=5)[0].split(TARGET_LENGTHS))
    inputs = pack(texts)
    if model.config.shape == "encoder_decoder":
        inputs |= {f"target_{name}": part for name, part in pack(targets).items()}
        alone = [model(text[None], target_tokens=target[None]) for text, target in zip(texts, targets, strict=True)]
    else:
        alone = [model(text[None]) for text in texts]
    torch.testing.assert_close(model(**inputs), torch.cat(alone, dim=1), rtol=1e-4, atol=1e-4)
    together = model(inputs["tokens"], **{name: part for name, part in inputs.items() if name == "target_tokens"})
    assert (together - torch.cat(alone, dim=1)).abs().max() > 0.01, "without a mask the texts would have met"


@pytest.mark.parametrize("kind", ["encoder", "encoder, window", "encoder, post"])
def test_an_encoder_sees_both_ways(kind: str) -> None:
    model, tokens = tiny_model(**KINDS[kind]), random_tokens(1, 12)
    changed = tokens.clone()
    changed[0, 6] = (changed[0, 6] + 1) % 70
    reached = (model(tokens) - model(changed)).abs().amax(-1)[0] > 1e-6
    assert reached.all(), "three blocks reach far, also through a window of two"


def test_the_decoder_is_causal_and_sees_all_of_the_source() -> None:
    model, source, target = tiny_model(**T5), random_tokens(1, 8), random_tokens(1, 6, seed=2)
    logits = model(source, target_tokens=target)
    later, other = target.clone(), source.clone()
    later[0, 4] = (later[0, 4] + 1) % 70
    other[0, 7] = (other[0, 7] + 1) % 70
    same = (model(source, target_tokens=later) == logits).all(-1)[0]
    assert same.tolist() == [True] * 4 + [False] * 2
    assert ((model(other, target_tokens=target) - logits).abs().amax(-1)[0] > 1e-6).all()


def test_padding_of_a_source_is_not_seen() -> None:
    model, source, target = tiny_model(**T5), random_tokens(1, 8), random_tokens(1, 6, seed=2)
    padded = torch.cat((source, torch.zeros(1, 3, dtype=torch.long)), dim=1)
    segment_ids = torch.tensor([[0] * 8 + [1] * 3])
    for target_segments in (None, torch.zeros(1, 6, dtype=torch.long)):
        logits = model(padded, segment_ids=segment_ids, target_tokens=target, target_segment_ids=target_segments)
        torch.testing.assert_close(logits, model(source, target_tokens=target))


def test_one_side_without_segments_is_segment_0() -> None:
    model, source, target = tiny_model(**T5), random_tokens(1, 8), random_tokens(1, 6, seed=2)
    segments = torch.tensor([[0, 0, 0, 1, 1, 1]])
    logits = model(source, target_tokens=target, target_segment_ids=segments)
    first = model(source, target_tokens=target[:, :3])
    torch.testing.assert_close(logits[:, :3], first)
    other = source.clone()
    other[0, 2] = (other[0, 2] + 1) % 70
    changed = (model(other, target_tokens=target, target_segment_ids=segments) - logits).abs().amax(-1)[0] > 1e-6
    assert changed.tolist() == [True] * 3 + [False] * 3, "segment 1 sees nothing of the source"


def test_a_prefix_is_seen_by_those_before_it() -> None:
    model, tokens = tiny_model(prefix_attention=True), random_tokens(1, 10)
    prefix = torch.arange(10)[None] < 6
    changed = tokens.clone()
    changed[0, 5] = (changed[0, 5] + 1) % 70
    difference = (model(tokens, prefix_mask=prefix) - model(changed, prefix_mask=prefix)).abs().amax(-1)[0]
    assert (difference > 1e-6).all()
    changed = tokens.clone()
    changed[0, 7] = (changed[0, 7] + 1) % 70
    difference = (model(tokens, prefix_mask=prefix) - model(changed, prefix_mask=prefix)).abs().amax(-1)[0]
    assert (difference > 1e-6).tolist() == [False] * 7 + [True] * 3


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("window", [None, 1, 4])
@pytest.mark.parametrize("with_prefix", [False, True])
@pytest.mark.parametrize("with_segments", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_flex_attention_sees_what_the_dense_mask_says(
    causal: bool, with_segments: bool, with_prefix: bool, window: int | None
) -> None:
    """Grouped heads included; a GPU takes the one, a CPU the other (which has no backward pass for it)."""
    if with_prefix and not causal:
        pytest.skip("without causality everything is a prefix")
    length = 32
    columns = torch.arange(length)[None]
    segments = (torch.arange(length) // 7).expand(2, length) + torch.tensor([[0], [1]]) if with_segments else None
    prefix = torch.rand(2, length, generator=torch.Generator().manual_seed(1)) < 0.3 if with_prefix else None
    side, rules = Side(columns, segments), {"causal": causal, "window": window, "prefix": prefix}
    attention = Attention(tiny_config(num_kv_heads=2, head_width=16))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 6)
    results = []
    for mask in (
        Mask(causal, dense_mask(side, side, **rules)[:, None]),  # type: ignore[arg-type]
        Mask(causal, blocks=block_mask(side, side, **rules)),  # type: ignore[arg-type]
    ):
        x = torch.randn(2, length, 32, generator=torch.Generator().manual_seed(3))
        with torch.no_grad():
            results.append(attention(x, mask))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def test_plain_attention_where_it_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    side = Side(torch.arange(8)[None])
    monkeypatch.setattr(masks, "dense_mask", None)
    assert make_mask(side, side, causal=True) == Mask(True)
    assert make_mask(side, side, causal=False) == Mask(False)
    bias = torch.zeros(1, 2, 8, 8)
    assert make_mask(side, side, causal=False, bias=bias).scores is bias
    assert make_mask(side, side, causal=True, window=3, sparse=True).blocks is not None


def test_sparse_blocks_only_where_most_pairs_are_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    columns = torch.arange(8)[None]
    padded, packed = Side(columns, columns > 5), Side(columns, columns // 3)
    for side, settings, is_sparse in (
        (padded, {}, False),
        (packed, {}, True),
        (padded, {"window": 2}, True),
        (padded, {"causal": True, "prefix": columns < 3}, True),
        (packed, {"bias": torch.zeros(1, 2, 8, 8)}, False),
        (packed, {"in_order": False}, False),
    ):
        mask = make_mask(side, side, sparse=True, **{"causal": False} | settings)  # type: ignore[arg-type]
        assert (mask.blocks is not None, mask.scores is not None) == (is_sparse, not is_sparse), settings
    monkeypatch.setattr(masks, "MAX_DENSE", 8 * 7)
    assert make_mask(padded, padded, causal=False, sparse=True).blocks is not None


@pytest.mark.parametrize("kind", ["encoder-decoder", "T5"])
def test_padding_is_marked_by_booleans_as_by_numbers(kind: str) -> None:
    model, source, target = tiny_model(**KINDS[kind]), random_tokens(2, 8), random_tokens(2, 6, seed=2)
    is_padding = torch.arange(8) >= torch.tensor([[8], [5]])
    logits = [model(source, segment_ids=ids, target_tokens=target) for ids in (is_padding, is_padding.long())]
    assert torch.equal(*logits)
    torch.testing.assert_close(logits[0][1:], model(source[1:, :5], target_tokens=target[1:]), rtol=1e-4, atol=1e-4)


def greedy_again(model: Transformer, source: list[int] | None, ids: list[int], count: int) -> list[int]:
    """The likeliest continuation, everything computed anew for each token."""
    start = len(ids)
    for _ in range(count):
        tokens = torch.tensor([ids])
        inputs: dict[str, Tensor] = {}
        if model.config.prefix_attention:
            inputs["prefix_mask"] = torch.arange(len(ids))[None] < start
        if source is None:
            logits = model(tokens, **inputs)
        else:
            logits = model(torch.tensor([source]), target_tokens=tokens)
        ids = [*ids, int(logits[0, -1].argmax())]
    return ids[start:]


@pytest.mark.parametrize("multiple", [1, 64])
@pytest.mark.parametrize("kind", ["T5", "original", "encoder-decoder", "decoder, window", "prefix"])
def test_generation_with_a_cache_is_generation_without(
    kind: str, multiple: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if attention reads unused columns of the cache, as on a GPU."""
    monkeypatch.setitem(KeyValueCache.MULTIPLE, "cpu", multiple)
    assert len(KeyValueCache(1).place(torch.tensor([[4]]))) == max(5, multiple)
    model = tiny_model(**{**KINDS, "prefix": {"prefix_attention": True}}[kind])
    prompts = [random_tokens(1, length, seed=length)[0].tolist() for length in (7, 3, 11)]
    with torch.no_grad():
        together = decode_tokens(
            model,
            model.config,
            prompts,
            max_new_tokens=16,
            sampling=Sampling(temperature=0.0),
            end_ids=(),
            start_id=1,
        )
        for prompt, continuation in zip(prompts, together, strict=True):
            across = model.config.shape == "encoder_decoder"
            source, ids = (prompt, [1]) if across else (None, prompt)
            assert continuation == greedy_again(model, source, ids, 16)


def test_an_ended_text_leaves_the_others_their_sources() -> None:
    model = tiny_model(**T5)
    prompts = [random_tokens(1, length, seed=length)[0].tolist() for length in (7, 3, 11)]
    options: dict[str, Any] = {"max_new_tokens": 12, "sampling": Sampling(temperature=0.0), "start_id": 1}
    free = decode_tokens(model, model.config, prompts, end_ids=(), **options)
    end_id = free[0][3]
    ended = decode_tokens(model, model.config, prompts, end_ids=[end_id], **options)
    assert ended == [ids[: ids.index(end_id)] if end_id in ids else ids for ids in free]
