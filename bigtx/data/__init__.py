"""From raw text to shards, and from shards to batches.

    raw/ ──documents──▶ text/ ──kept texts──▶ prepare/ ──tokens──▶ corpus/ ──blocks──▶ stream/ ──batches──▶ training
    └────────────────── once, per corpus ───────────────────┘      └───────── every step of a run ────────┘

Each folder's first page is its `__init__.py`; storage/ brings raw/ and corpus/ the bytes, from wherever they lie. A
shard is a plain webdataset tar that can also be addressed like an array (corpus/manifest.py, corpus/blocks.py); that
makes the order of a run arithmetic (stream/order.py), and the number of sequences consumed all the state that a resume
needs. What prepare/ needs to start its processes fast imports no torch; only stream/ does.
"""
