"""Text from ids one by one, up to a stop text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class StreamDecoder(Protocol):
    """A converter of successive ids to text, complete characters only; special ids have no text."""

    def push(self, i: int) -> str:
        """Return the text that id `i` completes, often empty."""
        ...

    def flush(self) -> str:
        """Return what is left at the end: U+FFFD for a character that was cut short."""
        ...


class StopStream:
    """A stream decoder that ends before the first of some stop texts.

    Text that may be the start of a stop text is held back until this is known, so no part of a stop text is returned,
    independent of the borders of the tokens.

    Attributes:
        has_stopped: whether a stop text was found; after that, no text is returned.
    """

    def __init__(self, decoder: StreamDecoder, stops: Sequence[str] = ()) -> None:
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
