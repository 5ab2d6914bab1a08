"""Seeds derived from (seed, step, rank): there is no generator state to save or lose."""

from __future__ import annotations

import hashlib


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from any labels; equal labels, equal seed."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def dropout_seeds(seed: int, step: int, rank: int, num_micro_batches: int) -> list[int]:
    """One for each micro batch of a rank's step."""
    return [derive_seed("dropout", seed, step, rank, index) for index in range(num_micro_batches)]
