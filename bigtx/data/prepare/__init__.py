"""`bigtx data prepare`: text -> a corpus, in many processes, on one machine or several.

    recipe ──▶ job ──units──▶ encode ──chunks on disk──▶ ranges ──▶ assemble ──▶ corpus/: shards, manifests
                └──▶ report: the messages at the end, and the estimate of `--dry-run`

Start at job.py; recipe.py defines what a corpus depends on and the folder in which it is made, so that a job
that was killed or divided continues from its files to the same bytes.
"""
