#!/bin/bash
# Submit a corpus, a pretraining and a fine-tuning. Each starts when the previous one has finished.
#
#   PARTS=8 NODES=2 slurm/chain.sh \
#     prepare.yaml output=corpus  --  pretrain.yaml run_dir=runs/base  --  finetune.yaml base=runs/base run_dir=runs/mine
#
# It prints the number of each job. When a job fails, SLURM cancels the jobs that wait for it.

export BIGTX_HOME=${BIGTX_HOME:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)}
source "${BIGTX_SITE:-$BIGTX_HOME/configs/site/default.sh}"
set -euo pipefail  # After the site's file, which may load scripts that fail under these options.

prepare=() pretrain=() finetune=()
target=prepare
for word in "$@"; do
  case $target/$word in
    prepare/--) target=pretrain ;;
    pretrain/--) target=finetune ;;
    prepare/*) prepare+=("$word") ;;
    pretrain/*) pretrain+=("$word") ;;
    *) finetune+=("$word") ;;
  esac
done
[ ${#finetune[@]} -gt 0 ] || { sed -n '2,/^$/{/^#/s/^# \{0,1\}//p}' "$0" >&2; exit 2; }

# The config is checked here, before anything is submitted.
corpus=$(${container[@]+"${container[@]}"} bigtx data prepare "${prepare[@]}" --print-config | sed -n 's/^output: //p')

submit() { sbatch --parsable --kill-on-invalid-dep=yes "$@" | cut -d ';' -f 1; }
scripts=$BIGTX_HOME/slurm
parts=$(submit --array="1-${PARTS:-1}" "$scripts/prepare.sbatch" "${prepare[@]}")
merged=$(submit --dependency="afterok:$parts" "$scripts/merge.sbatch" "$corpus")
trained=$(submit --dependency="afterok:$merged" --nodes="${NODES:-1}" "$scripts/pretrain.sbatch" "${pretrain[@]}")
tuned=$(submit --dependency="afterok:$trained" "$scripts/finetune.sbatch" "${finetune[@]}")
printf '%s\n' "prepare $parts" "merge $merged" "pretrain $trained" "finetune $tuned"
