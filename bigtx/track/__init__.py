"""A run's numbers: where they go and how they survive.

    loop ──▶ Tracker ──▶ metrics.jsonl, samples.jsonl, events.jsonl      (the truth)
                │                     │ followed, line by line
                │                     ▼
                │             follower process ──▶ W&B, online or offline (a copy of the truth)
                └──────▶ console: a progress bar, or plain lines

W&B runs in a process of its own, outside the training's process tree, that copies the JSON lines. So nothing of W&B
(its start, the network, a crash, its chatter, the hooks it leaves in a process) can reach the training, a launcher that
ends the training's tree does not reach W&B, and what W&B missed comes from the files at the next start.
"""

from bigtx.track.tracker import Tracker

__all__ = ["Tracker"]
