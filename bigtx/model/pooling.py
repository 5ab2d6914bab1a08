"""The weight of each token of a text in its summary, which a head of classes reads."""

from __future__ import annotations

import numpy as np


def pooling_weights(pooling: str, lengths: np.ndarray, num_columns: int) -> np.ndarray:
    """Return fp32 [B, T]: 1 for the first token or for the last, or equal weights for all of them; padding has weight
    0.

    Args:
        pooling: first, last or mean.
        lengths: int [B], the tokens at the start of each row.
        num_columns: the number of columns T.
    """
    columns, lengths = np.arange(num_columns), lengths[:, None]
    weights = {"first": columns == 0, "last": columns == lengths - 1, "mean": (columns < lengths) / lengths}[pooling]
    return np.broadcast_to(weights, (len(lengths), num_columns)).astype(np.float32)
