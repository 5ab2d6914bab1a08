"""`bigtx data prepare`: text -> a corpus, in many processes, on one machine or several.

    recipe, parts ──▶ job ──units──▶ encode ──chunks on disk──▶ ranges ──▶ assemble ──▶ corpus/: shards, manifests
                       ├──▶ estimate: `--dry-run`
                       └──▶ report: what it says at the end

job.py is the way through; recipe.py is what a corpus depends on, and parts.py the folder in which it is made, so that a
job which was killed, or divided, goes on from what is there to the same bytes.
"""
