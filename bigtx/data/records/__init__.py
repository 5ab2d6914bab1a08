"""Records for fine-tuning: read completely, split, and delivered in an order whose state is one number.

folders, jsonl, csv, tsv, webdataset ──read──▶ Record ──split──▶ train, validation, test
                                                 │ encoded by the task
                                                 ▼
                                 order: the n-th record of the run ──loader──▶ micro batches
"""
