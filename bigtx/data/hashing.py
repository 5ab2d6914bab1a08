"""Hashes of whole numbers that never change, so that shuffles, samples and comparisons by them do not change either."""

from __future__ import annotations

from typing import Any

import numpy as np


def splitmix64(value: np.ndarray) -> np.ndarray:
    """Return the finalizer of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014): a bijection of the 64-bit integers."""
    value = value + np.uint64(0x9E3779B97F4A7C15)
    value ^= value >> np.uint64(30)
    value *= np.uint64(0xBF58476D1CE4E5B9)
    value ^= value >> np.uint64(27)
    value *= np.uint64(0x94D049BB133111EB)
    value ^= value >> np.uint64(31)
    return value


def hash64(*parts: Any) -> np.ndarray:
    """Compute bigtx's own hash of a tuple of unsigned integers, broadcast over arrays: uint64, at least 1-D.

    For fixed earlier parts it is a bijection of the last part: hashes of distinct numbers have no ties, so any sorting
    algorithm gives the same permutation, on every machine and in every version of numpy.
    """
    state = np.zeros(1, np.uint64)
    for part in parts:
        state = splitmix64(state ^ np.atleast_1d(np.asarray(part, np.uint64)))
    return state
