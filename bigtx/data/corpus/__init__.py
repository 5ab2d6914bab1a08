"""A prepared corpus, on a disk or remote.

    tokens ──shards: the writer──▶ shards, and their manifest ──▶ blocks: the reader ──▶ tokens by address
                                              └──▶ splits: a corpus as a whole ──▶ inspect, verify

Start at manifest.py, which defines the format. A block is verified when it is first read, mapped from a local shard or
fetched by range; verify.py reads all of a corpus once.
"""
