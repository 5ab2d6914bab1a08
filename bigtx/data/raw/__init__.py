"""Raw text -> documents.

    files ──▶ read ──by formats──▶ lines, tables (readers) · parquet · archives ──▶ samples
                                     └─────────records─────────┴────────────────────┴──▶ documents, and rejects

Start at read.py: `list_files` names what there is in an order that never changes, `read_file` streams the documents of
a file or a part of it, and whatever cannot be read becomes a reject with its file, line and reason.
"""
