"""Records for fine-tuning, read completely and split.

folders, jsonl, csv, tsv, webdataset ──read──▶ Record ──split──▶ train, validation, test
"""
