"""Beam search: the most likely text instead of a sample, for many prompts at once.

    prompts ──read once──▶ cache ──a row for each of K texts──▶ logits ─▶ the best 2 K next tokens ───┬─▶ those that end
                             ▲                                                                        │
                             └────────── rows follow the texts that they belong to ◀── the best K others

A prompt is done when K of its texts have ended, or as soon as no unfinished text can become better than
the best that has ended. Prompts that are done leave the batch. Shape letters: B prompts that are not done, K texts of
each (the beam), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bigtx.config.schema import ModelConfig
from bigtx.model.decode import Reader


@dataclass(frozen=True, kw_only=True)
class Beam:
    """The settings of the search.

    Attributes:
        size: the number of texts of a prompt that are extended in parallel; 1 takes the most likely token each time.
        length_penalty: exponent a of the length in a text's score, its log-probability divided by
            ((5 + tokens) / 6)^a (arXiv:1609.08144, equation 14); 0 favours short texts, whose log-probability is
            higher.
    """

    size: int = 5
    length_penalty: float = 0.6

    def __post_init__(self) -> None:
        assert self.size >= 1, "a beam holds at least one text"
        assert self.length_penalty >= 0.0, "with a negative penalty a longer text could always be better"

    def score(self, log_probability: float, num_tokens: int) -> float:
        """Return the score by which texts are compared; `num_tokens` includes the end."""
        return log_probability / ((5 + num_tokens) / 6) ** self.length_penalty


@dataclass(frozen=True)
class Found:
    """The best text for a prompt.

    Attributes:
        ids: the ids without the token that ends it.
        log_probability: in nats, including that of the end.
        score: the value of `Beam.score`.
    """

    ids: list[int]
    log_probability: float
    score: float


@dataclass
class _Search:
    """The search of one prompt."""

    max_new_tokens: int
    num_ended: int = 0
    best: Found = field(default_factory=lambda: Found([], float("-inf"), float("-inf")))

    def end(self, ids: list[int], log_probability: float, beam: Beam) -> None:
        """Note that a text has ended."""
        self.num_ended += 1
        score = beam.score(log_probability, len(ids) + 1)
        if score > self.best.score:
            self.best = Found(ids, log_probability, score)

    def is_done(self, best_open: float, beam: Beam) -> bool:
        """Return whether no unfinished text can become better.

        Args:
            best_open: the best log-probability of an unfinished text: it only decreases, and no length raises a score
                more than the longest one.
        """
        return self.num_ended >= beam.size or self.best.score >= beam.score(best_open, self.max_new_tokens + 1)


@torch.no_grad()
def beam_search(
    forward: Callable[..., Tensor],
    config: ModelConfig,
    prompt_ids: Sequence[Sequence[int]],
    *,
    max_new_tokens: Sequence[int],
    beam: Beam,
    end_ids: Sequence[int],
    num_ids: int | None = None,
    start_id: int | None = None,
    device: torch.device | str = "cpu",
) -> list[Found]:
    """Return the best text after each prompt; an encoder-decoder reads the prompt as the source and starts a text of
    its own.

    All ranks find the same texts if weights are sharded over them: nothing is drawn, and their arithmetic is the same.

    Args:
        forward: a Transformer's forward, in evaluation mode.
        prompt_ids: at least one token each; the prompt (or the start id) and the new tokens must fit the model's
            positions.
        max_new_tokens: the most tokens of each prompt; after them only the end may follow.
        end_ids: the tokens that end a text.
        num_ids: only ids below it may be generated.
        start_id: the first token of the decoder of an encoder-decoder.

    Returns:
        The best text of each prompt, in the order of the prompts.
    """
    all_searches = searches = [_Search(limit) for limit in max_new_tokens]
    if not searches:
        return []
    assert all(prompt_ids), "a prompt needs at least one token"
    size, reader = beam.size, Reader(forward, config, device)
    logits, positions = _read_prompts(reader, [list(ids) for ids in prompt_ids], size, start_id)
    # There is only one text so far: the other rows of its beam are not used yet.
    scores = torch.full((len(searches), size), float("-inf"), device=device)
    scores[:, 0] = 0.0
    texts = torch.empty(len(searches), size, 0, dtype=torch.long, device=device)
    while True:
        parents, tokens, scores = _go_on(logits[:, :num_ids], scores, texts, searches, beam, end_ids)
        texts = torch.cat((texts.gather(1, parents[:, :, None].expand_as(texts)), tokens[:, :, None]), dim=2)
        open_scores = scores[:, 0].tolist()
        left = [place for place, search in enumerate(searches) if not search.is_done(open_scores[place], beam)]
        if not left:
            return [search.best for search in all_searches]
        rows = parents + size * torch.arange(len(searches), device=device)[:, None]  # B K
        if len(left) < len(searches):
            kept = torch.tensor(left, device=device)
            scores, texts, rows = scores[kept], texts[kept], rows[kept]
            positions = positions.view(-1, size)[kept].flatten()
            searches = [searches[place] for place in left]
            reader.cache.keep(rows.flatten())
        elif size > 1:
            reader.cache.exchange(rows.flatten())
        logits = reader.read_next(texts[:, :, -1].flatten(), positions)  # BK V
        positions = positions + 1


def _read_prompts(reader: Reader, prompts: list[list[int]], size: int, start_id: int | None) -> tuple[Tensor, Tensor]:
    """Read the prompts once; return the logits [BK, V] and the positions int64 [BK] of the next tokens, for each text
    of each beam.
    """
    texts = prompts
    if reader.config.shape == "encoder_decoder":
        assert start_id is not None, "an encoder-decoder's text starts with a start id"
        texts = [[start_id] for _ in prompts]
    lengths = [len(ids) for ids in texts]
    logits = reader.read(texts, sources=prompts, prefix_lengths=lengths)  # B V
    beams = torch.arange(len(prompts), device=logits.device).repeat_interleave(size)
    reader.cache.keep(beams)
    return logits[beams], torch.tensor(lengths, device=logits.device)[beams]


def _go_on(
    logits: Tensor, scores: Tensor, texts: Tensor, searches: list[_Search], beam: Beam, end_ids: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Choose the best next tokens; pass texts that end to their search.

    Args:
        logits: [BK, V].
        scores: fp32 [B, K], log-probabilities of the texts, the best first.
        texts: int64 [B, K, tokens so far].

    Returns:
        For each unfinished text, the best first: the text that it continues [B, K], its new token [B, K], and its
        log-probability [B, K]; minus infinity if there are fewer than K.
    """
    num_prompts, size = scores.shape
    total = scores[:, :, None] + logits.float().log_softmax(dim=-1).view(num_prompts, size, -1)  # B K V
    length = texts.shape[2]
    ends_text = torch.tensor(end_ids, device=logits.device)
    for place, search in enumerate(searches):
        if length >= search.max_new_tokens:
            at_end = total[place][:, ends_text].clone()
            total[place] = float("-inf")
            total[place][:, ends_text] = at_end
    # At most E K of them are ends, E from each text, so K others are included too.
    count = (len(ends_text) + 1) * size
    best, choices = total.flatten(1).topk(min(count, total[0].numel()), dim=-1)  # B (E + 1)K
    parents, tokens = choices // total.shape[2], choices % total.shape[2]
    ends = torch.isin(tokens, ends_text)
    # An end that is not among the K best is not used: the beam would not have kept it.
    for place, rank in (ends[:, :size] & best[:, :size].isfinite()).nonzero().tolist():
        ids = texts[place, parents[place, rank]].tolist()
        searches[place].end(ids, float(best[place, rank]), beam)
    order = ends.long().argsort(dim=-1, stable=True)[:, :size]
    scores = best.masked_fill(ends, float("-inf")).gather(1, order)
    return parents.gather(1, order), tokens.gather(1, order), scores
