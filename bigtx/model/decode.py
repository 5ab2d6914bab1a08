"""Generation: sampling of one token at a time, with the keys and values of all earlier tokens in a cache.

A batch of prompts of different lengths gives each prompt the same result as alone: rows are padded on the right, where
causal attention does not read, each row continues at its own position, and each row draws from its own generator.
Shape letters: B rows, T new tokens, S columns of the cache, K key heads, C head width, V vocabulary.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bigtx.config import shape
from bigtx.config.schema import ModelConfig
from bigtx.model.cache import KeyValueCache

OnToken = Callable[[int, int], bool | None]
"""Called with (index of the prompt, token id) as soon as a token is drawn; True ends the text with it."""
Agree = Callable[[list[int]], list[int]]
"""Replaces every rank's draws by those of rank 0. Ranks with different draws would stop at different steps, and
wait for each other forever."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """The rule by which a token is drawn from the logits.

    Attributes:
        temperature: divides the logits; 0 takes the most likely token.
        top_k: only this many most likely tokens may be drawn; None: all.
        top_p: only the most likely tokens that together reach this probability (arXiv:1904.09751); None or 1: all.
        seed: with the index of a prompt it determines the prompt's draws, independent of the rest of the batch.
    """

    temperature: float = 0.8
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 1

    def __post_init__(self) -> None:
        assert 0.0 <= self.temperature < math.inf, "temperature must be a finite number of at least 0"
        assert self.top_k is None or self.top_k >= 1, "top_k must be at least 1"
        assert self.top_p is None or 0.0 < self.top_p <= 1.0, "top_p must be above 0 and at most 1"

    def draw(self, logits: Tensor, generators: Sequence[torch.Generator]) -> list[int]:
        """Draw one token id for each row of logits [B, V], by that row's generator."""
        logits = logits.float().cpu()
        if self.temperature == 0.0:
            return logits.argmax(dim=-1).tolist()
        # Relative to the largest, since a quotient by a tiny temperature may exceed fp32: it becomes 0 or -inf.
        logits = logits - logits.max(dim=-1, keepdim=True).values
        temperature = max(self.temperature, torch.finfo(torch.float32).tiny)
        ordered, ids = (logits / temperature).sort(dim=-1, descending=True, stable=True)
        if self.top_k is not None:
            ordered[:, self.top_k :] = float("-inf")
        probabilities = ordered.softmax(dim=-1)
        if self.top_p is not None:
            # A token stays if the previous ones do not reach top_p: the most likely always stays.
            before = probabilities.cumsum(dim=-1) - probabilities
            probabilities = probabilities.masked_fill(before >= self.top_p, 0.0)
        places = [torch.multinomial(row, 1, generator=own) for row, own in zip(probabilities, generators, strict=True)]
        return ids.gather(1, torch.stack(places)).flatten().tolist()

    def generator(self, index: int) -> torch.Generator:
        """Return the random generator of one prompt."""
        key = hashlib.sha256(f"{self.seed}/{index}".encode()).digest()
        # torch's CPU generator uses 32 bits of its seed.
        return torch.Generator().manual_seed(int.from_bytes(key[:4], "little"))


@dataclass
class _Row:
    """A text that is being continued.

    Attributes:
        ids: the prompt and the drawn tokens; in an encoder-decoder, the start id and the drawn tokens.
        prompt_length: how many of the ids were given.
        start: the index of the first id that the model still reads.
        source: the prompt of an encoder-decoder.
    """

    index: int
    ids: list[int]
    prompt_length: int
    start: int
    source: list[int]
    generator: torch.Generator
    new_ids: list[int] = field(default_factory=list)

    def window(self) -> list[int]:
        """Return the tokens that the model reads, from `start` on."""
        return self.ids[self.start :]

    def take(self, token: int, max_new_tokens: int, on_token: OnToken | None) -> bool:
        """Add a token; return whether the text continues."""
        self.ids.append(token)
        self.new_ids.append(token)
        has_ended = on_token is not None and on_token(self.index, token)
        return not has_ended and len(self.new_ids) < max_new_tokens


@torch.no_grad()
def decode_tokens(
    forward: Callable[..., Tensor],
    config: ModelConfig,
    prompt_ids: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling,
    end_ids: Collection[int],
    num_ids: int | None = None,
    start_id: int | None = None,
    device: torch.device | str = "cpu",
    first_index: int = 0,
    on_token: OnToken | None = None,
    agree: Agree | None = None,
) -> list[list[int]]:
    """Continue each prompt; an encoder-decoder reads it as the source and starts a text of its own.

    A text that reaches `config.max_sequence_length` continues from its newer half, read again from position 0.

    Args:
        forward: a Transformer's forward, in evaluation mode.
        prompt_ids: at least one token each.
        end_ids: each of these tokens ends a text and is not part of the result; there may be none.
        num_ids: only ids below it may be drawn; the tokenizer of a model may have fewer than its vocab_size.
        start_id: the first token of the decoder of an encoder-decoder.
        first_index: the index of the first prompt, if these are a part of more prompts.
        on_token: see `OnToken`.
        agree: see `Agree`; needed if the weights are sharded over ranks.

    Returns:
        The new tokens of each prompt, at most `max_new_tokens`.
    """
    assert all(prompt_ids), "a prompt needs at least one token"
    limit = config.max_sequence_length
    rows = [_new_row(index, list(ids), start_id, config, sampling) for index, ids in enumerate(prompt_ids, first_index)]
    results = [row.new_ids for row in rows]
    reader: Reader | None = None
    while rows and max_new_tokens > 0:
        windows = [row.window() for row in rows]
        if reader is None:
            reader, prefix_lengths = Reader(forward, config, device), [row.prompt_length - row.start for row in rows]
            logits = reader.read(windows, sources=[row.source for row in rows], prefix_lengths=prefix_lengths)  # B V
        else:
            logits = reader.read_next([ids[-1] for ids in windows], [len(ids) - 1 for ids in windows])  # B V
        drawn = sampling.draw(logits[:, :num_ids], [row.generator for row in rows])
        drawn = agree(drawn) if agree else drawn
        kept = [
            place
            for place, (row, token) in enumerate(zip(rows, drawn, strict=True))
            if token not in end_ids and row.take(token, max_new_tokens, on_token)
        ]
        if len(kept) < len(rows):
            rows = [rows[place] for place in kept]
            reader.cache.keep(torch.tensor(kept, dtype=torch.long, device=device))
        for row in rows:
            if len(row.window()) > limit:
                row.start = len(row.ids) - max(1, limit // 2)
                reader = None
    return results


def _new_row(index: int, ids: list[int], start_id: int | None, config: ModelConfig, sampling: Sampling) -> _Row:
    limit, generator = config.max_sequence_length, sampling.generator(index)
    if config.shape == "encoder_decoder":
        assert start_id is not None, "an encoder-decoder's text starts with a start id"
        return _Row(index, [start_id], 1, 0, ids[-limit:], generator)
    assert config.shape == "decoder", "an encoder cannot continue a text"
    return _Row(index, ids, len(ids), max(0, len(ids) - limit), [], generator)


class Reader:
    """Reads texts with a Transformer into a cache of its own.

    Attributes:
        cache: the cache, which is empty until `read`.
    """

    def __init__(self, forward: Callable[..., Tensor], config: ModelConfig, device: torch.device | str) -> None:
        self.config, self.cache = config, KeyValueCache(shape.num_decoder_layers(config))
        self._forward, self._device = forward, device

    def read(
        self, texts: Sequence[list[int]], *, sources: Sequence[list[int]], prefix_lengths: Sequence[int]
    ) -> Tensor:
        """Read texts of at least one token; return the next logits [B, V] of each.

        Args:
            sources: the input of the encoder of an encoder-decoder; otherwise unused.
            prefix_lengths: for a model with prefix attention, the length of the prefix of each text, in tokens.
        """
        tokens = self._padded(texts)
        positions = torch.arange(tokens.shape[1], device=self._device).expand_as(tokens)
        columns = torch.tensor([[len(text) - 1] for text in texts], device=self._device)
        if self.config.shape == "encoder_decoder":
            # No token attends to the padding of the source.
            segment_ids = self._padded([[0] * len(source) for source in sources], fill=1).bool()
            read = {"segment_ids": segment_ids, "target_tokens": tokens, "target_positions": positions}
            return self._logits(self._padded(sources), columns=columns, **read)
        prefix_mask = None
        if self.config.prefix_attention:
            prefix_mask = positions < torch.tensor(prefix_lengths, device=self._device)[:, None]
        return self._logits(tokens, positions=positions, prefix_mask=prefix_mask, columns=columns)

    def read_next(self, tokens: Tensor | list[int], positions: Tensor | list[int]) -> Tensor:
        """Read one more token of each text, [B], at its position, [B]; return the next logits [B, V]."""
        tokens, positions = (torch.as_tensor(each, device=self._device)[:, None] for each in (tokens, positions))
        if self.config.shape == "encoder_decoder":
            return self._logits(None, target_tokens=tokens, target_positions=positions)
        return self._logits(tokens, positions=positions)

    def _logits(self, tokens: Tensor | None, **others: Tensor | None) -> Tensor:
        with _uncompiled():
            return self._forward(tokens, cache=self.cache, **others)[:, 0]

    def _padded(self, rows: Sequence[list[int]], fill: int = 0) -> Tensor:
        """Return int64 [B, T]. Any token can be padding: its column is overwritten by the row's own token before that
        row reads it.
        """
        longest = max(map(len, rows))
        return torch.tensor([row + [fill] * (longest - len(row)) for row in rows], device=self._device)


def _uncompiled() -> contextlib.AbstractContextManager[None]:
    """Run compiled blocks uncompiled: every length would be compiled again."""
    # The query takes seconds if nothing has been compiled yet, and is not needed then.
    if "torch._dynamo" not in sys.modules:
        return contextlib.nullcontext()
    return torch.compiler.set_stance("force_eager")
