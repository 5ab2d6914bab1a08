"""Record the metrics, samples and events of a run.

    loop ──▶ Tracker ──▶ metrics.jsonl, samples.jsonl, events.jsonl      (the original)
                │                     │ read line by line
                │                     ▼
                │             follower process ──▶ W&B, online or offline (a copy)
                └──────▶ console: a progress bar, or plain lines

W&B runs in a separate process, outside the training's process tree, which copies the JSON lines. So W&B (its start, the
network, a crash, its output, its hooks in a process) cannot affect the training. A launcher that ends the training's
process tree does not end W&B. Records that W&B missed are copied from the files at the next start.
"""

from bigtx.track.tracker import Tracker

__all__ = ["Tracker"]
