"""A prepared corpus, on disk or far away.

    tokens ──shards: the writer──▶ shards, and their manifest ──▶ blocks: the reader ──▶ tokens by address
                                              └──▶ splits: a corpus as a whole ──▶ inspect, stats, verify

Start at manifest.py, which has the format. A block is verified whenever it is first read, mapped from a local shard or
fetched by range; verify.py reads all of a corpus once.
"""
