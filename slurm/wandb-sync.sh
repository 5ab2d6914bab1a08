#!/bin/bash
# Bring the runs of a cluster whose nodes have no network to W&B, from a machine that has one (the login node), while
# they train. Ends by Ctrl-C or TERM; it may be started again at any time.
#
#   slurm/wandb-sync.sh runs                 # every minute: the run folders in runs/, and those in its folders
#   BIGTX_SYNC_SECONDS=600 nohup slurm/wandb-sync.sh runs >>wandb-sync.log 2>&1 &
#
# Only runs that have written something since are brought. Where W&B does not answer, the next round tries again.

[ $# -gt 0 ] || { sed -n '2,/^$/{/^#/s/^# \{0,1\}//p}' "$0" >&2; exit 2; }
trap 'exit 0' INT TERM HUP
while :; do
  python -m bigtx.track.sync "$@" &
  wait $!
  sleep "${BIGTX_SYNC_SECONDS:-60}" &
  wait $!
done
