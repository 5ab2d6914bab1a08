"""Hashes that never change: of whole numbers, for shuffles, samples and comparisons; and of a purpose, for seeds."""

from __future__ import annotations

import hashlib
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


def derive_seed(*parts: int | str) -> int:
    """Return a 63-bit seed from any labels; equal labels, equal seed."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
