"""Bytes from anywhere: this machine, web servers, object stores.

    web, buckets ──remote: what they share──▶ access ──stat, open_binary──▶ streams of raw text
                                                └──read_range──▶ places ◀──▶ cache: verified pieces of shards

Nothing here knows what the bytes mean: whoever asked for them verifies or parses them. No password is written down.
"""
