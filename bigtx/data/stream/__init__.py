"""Corpora -> the batches of a run.

    sources, mixture ──▶ order: number of a sequence -> block and row ──▶ rows ──▶ loader ──▶ batches
    webdataset shards from elsewhere ──▶ foreign: streamed rows ──────────────────▶ foreign_loader ──▶ batches

The order is arithmetic, so a position in it is one integer and any rank finds its part alone; loader.py divides it over
ranks and reads ahead. Foreign shards do not have such an order: they are streamed, tokenized and packed on the fly.
"""
