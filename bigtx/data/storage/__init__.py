"""Access to bytes on this machine, web servers and object stores.

    web, buckets ──remote: their common part──▶ access ──stat, open_binary──▶ streams of raw text
                                                └──read_range──▶ places, and a cache of verified pieces of shards

Nothing here interprets the bytes: the caller verifies or parses them. No password is stored.
"""
