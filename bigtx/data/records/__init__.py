"""Records to fine-tune on: read whole, split, and handed out in an order that is one number.

folders, jsonl, csv, tsv, webdataset ──read──▶ Record ──split──▶ train, validation, test
                                                 │ encoded by the task
                                                 ▼
                                 order: the n-th record of the run ──loader──▶ micro batches
"""
