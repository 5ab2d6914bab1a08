"""Corpora -> the batches of a run.

    sources, mixture ──▶ order: number of a sequence -> block and row ──skip, ahead──▶ rows ──▶ loader ──▶ batches
    webdataset shards from elsewhere ──▶ foreign: rows as they come ──────────────────▶ foreign_loader ──▶ batches

The order is arithmetic, so a position in it is one integer and any rank finds its part alone; loader.py cuts it among
ranks and reads ahead. Foreign shards have no such order: they are streamed, tokenized and packed on the fly.
"""
