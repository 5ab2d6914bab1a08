"""bigtx: from text to a trained Transformer.

import bigtx
print(bigtx.load("runs/mine").generate("Once upon"))
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bigtx.utils import __version__

if TYPE_CHECKING:
    from bigtx.api import load

__all__ = ["__version__", "load"]


def __getattr__(name: str) -> Any:
    """Import names that need torch when they are first used, so that the commands start quickly."""
    if name == "load":
        from bigtx.api import load

        return load
    raise AttributeError(f"module 'bigtx' has no attribute {name!r}")
