"""Generation of texts: tokens are drawn and decoded one by one, up to the end of a text or a stop text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from torch import nn

from bigtx.config.schema import ModelConfig
from bigtx.model.decode import Agree, Sampling, decode_tokens

if TYPE_CHECKING:
    from bigtx.tokenizer.huggingface_model import WindowStream
    from bigtx.tokenizer.sentencepiece_model import Utf8Stream
    from bigtx.tokenizer.tokenizer import Tokenizer

OnText = Callable[[int, str], None]
"""Called with (index of the prompt, text) whenever more of a text is complete; the pieces together are the text."""


@dataclass(frozen=True)
class Prompt:
    """The input of a model before it generates.

    Attributes:
        ids: at least one id.
        goes_on: whether the new text continues the prompt's, so that a space at its start belongs to it; otherwise it
            is a text of its own, such as an answer.
    """

    ids: list[int]
    goes_on: bool


@dataclass(frozen=True)
class Written:
    """A text that a model has generated.

    Attributes:
        num_tokens: the number of drawn tokens, without the end.
        ended_by: the model itself (end), a stop text (stop), or max_new_tokens (length).
    """

    text: str
    num_tokens: int
    ended_by: Literal["end", "stop", "length"]


def write(
    model: nn.Module,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    sampling: Sampling,
    stop: Sequence[str] = (),
    first_index: int = 0,
    on_text: OnText | None = None,
    agree: Agree | None = None,
) -> list[Written]:
    """Generate a text for each prompt with a Transformer that is in evaluation mode.

    Args:
        stop: texts that end a generated text, and are not part of it.
        first_index, agree: see `decode_tokens`.
        on_text: see `OnText`.

    Returns:
        The new texts, without the prompts.
    """
    config: ModelConfig = model.config  # type: ignore[assignment]
    streams = [StopStream(tokenizer.stream(after=prompt.ids if prompt.goes_on else ()), stop) for prompt in prompts]
    parts: list[list[str]] = [[] for _ in prompts]

    def take(index: int, text: str) -> None:
        if text:
            parts[index - first_index].append(text)
            if on_text is not None:
                on_text(index, text)

    def push(index: int, token: int) -> bool:
        stream = streams[index - first_index]
        take(index, stream.push(token))
        return stream.has_stopped

    new_ids = decode_tokens(
        model,
        config,
        [prompt.ids for prompt in prompts],
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        end_ids=tokenizer.end_ids,
        num_ids=tokenizer.vocab_size,
        start_id=tokenizer.pad_id,
        device=next(model.parameters()).device,
        first_index=first_index,
        on_token=push,
        agree=agree,
    )
    written = []
    for place, (stream, ids) in enumerate(zip(streams, new_ids, strict=True)):
        take(first_index + place, stream.flush())
        reason: Literal["end", "length"] = "length" if len(ids) == max_new_tokens else "end"
        written.append(Written("".join(parts[place]), len(ids), "stop" if stream.has_stopped else reason))
    return written


def plain_prompts(config: ModelConfig, tokenizer: Tokenizer, texts: Sequence[str]) -> list[Prompt]:
    """Return prompts of texts to continue, where an empty one is a new document, or of sources."""
    if config.shape == "encoder_decoder":
        return [Prompt(ids, goes_on=False) for ids in tokenizer.encode_sources(texts)]
    return [Prompt(ids, goes_on=True) for ids in tokenizer.encode_prompts(texts)]


class StopStream:
    """A stream decoder that ends before the first of some stop texts.

    Text that may be the start of a stop text is held back until this is known, so no part of a stop text is returned,
    independent of the borders of the tokens.

    Attributes:
        has_stopped: whether a stop text was found; after that, no text is returned.
    """

    def __init__(self, decoder: Utf8Stream | WindowStream, stops: Sequence[str] = ()) -> None:
        """Args: stops: the stop texts, none of them empty."""
        assert all(stops)
        self._decoder, self._stops = decoder, tuple(stops)
        self._held = ""
        self.has_stopped = False

    def push(self, i: int) -> str:
        """Return the text that id `i` completes, often empty."""
        return self._take(self._decoder.push(i))

    def flush(self) -> str:
        """Return the rest at the end."""
        text = self._take(self._decoder.flush()) + self._held
        self._held = ""
        return text

    def _take(self, text: str) -> str:
        if self.has_stopped:
            return ""
        text = self._held + text
        # The stop text that is complete first ends it, whether its characters arrive together or one by one.
        found = [(begin + len(stop), begin) for stop in self._stops if (begin := text.find(stop)) >= 0]
        if found:
            self.has_stopped, self._held = True, ""
            return text[: min(found)[1]]
        kept = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of `text` that `stop` starts with, except all of `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((length for length in range(longest, 0, -1) if text.endswith(stop[:length])), 0)
