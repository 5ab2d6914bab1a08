"""From raw text to shards, and from shards to batches.

    raw/ ──documents──▶ text/ ──kept texts──▶ prepare/ ──tokens──▶ corpus/ ──blocks──▶ stream/ ──batches──▶ training
    └────────────────── once, per corpus ───────────────────┘      └───────── every step of a run ────────┘

Each folder is described in its `__init__.py`; storage/ provides the bytes for raw/ and corpus/, from any place. A
shard is a plain webdataset tar that can also be addressed like an array (corpus/manifest.py, corpus/blocks.py); that
makes the order of a run arithmetic (stream/order.py), so that a resume needs no state but the number of sequences
consumed. Only stream/ imports torch, so that prepare/ starts its processes fast.
"""
