"""Raw text -> rows -> documents, records and texts of foreign shards.

    files ──▶ read ──by formats──▶ rows (readers) · parquet · archives ──▶ samples
                                    └────── rows ───────┴──────────────────────┴──read──▶ documents
                                                                               └────────▶ rejects

Start at read.py: `list_files` lists the files in an order that never changes, `read_rows` streams the rows of a
file or a part of it, and everything that cannot be read becomes a reject with its file, line and reason.
"""
