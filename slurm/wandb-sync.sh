#!/bin/bash
# Send the runs of a cluster whose nodes have no network to W&B while they train, from a machine that has a network (the
# login node). It ends at Ctrl-C or TERM, and may be started again at any time.
#
#   slurm/wandb-sync.sh runs                 # every minute: run folders in runs/, up to two levels below
#   BIGTX_SYNC_SECONDS=600 nohup slurm/wandb-sync.sh runs >>wandb-sync.log 2>&1 &
#
# A round sends only runs that have new lines. Where W&B does not answer, the next round tries again.

[ $# -gt 0 ] || { sed -n '2,/^$/{/^#/s/^# \{0,1\}//p}' "$0" >&2; exit 2; }
trap 'exit 0' INT TERM HUP
while :; do
  python -m bigtx wandb sync --changed "$@" &
  wait $!
  sleep "${BIGTX_SYNC_SECONDS:-60}" &
  wait $!
done
