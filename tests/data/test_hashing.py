"""Our own hashes of numbers: other numbers would mean another order of the same data."""

from __future__ import annotations

from bigtx.utils.hashing import hash64


def test_hash_is_splitmix64_and_never_changes() -> None:
    # The first output of the reference SplitMix64 with seed 0.
    assert int(hash64(0)[0]) == 0xE220A8397B1DCDAF
