# Functions that the batch scripts share. A batch script sources this file and calls `run COMMAND...`.
#
# `run` checks the nodes with `bigtx doctor` if there are several. It starts the command once on each node, and then
# ends or requeues the job:
#
#   the command ends with       the job
#   0, finished                 ends
#   75, stopped on request      is requeued, and the same command resumes; within a minute of its start it is a crash
#   2, an error of the user     ends with status 2
#   any other status, a crash   is requeued, at most $BIGTX_MAX_CRASHES times in a row
#
# Nodes that bigtx doctor finds slow or broken are excluded, and the job is requeued without them, at most
# $BIGTX_MAX_EXCLUSIONS times.
#
# USR1 (which SLURM sends before the time limit, see --signal) and TERM ask the command to stop. `fail WORDS...` ends
# the job with status 2.

home=${BIGTX_HOME:-$SLURM_SUBMIT_DIR}
source "${BIGTX_SITE:-$home/configs/site/default.sh}"
set -uo pipefail  # After the site's file, which may load scripts that fail under these options.

max_crashes=${BIGTX_MAX_CRASHES:-3} max_exclusions=${BIGTX_MAX_EXCLUSIONS:-3}
task=${SLURM_ARRAY_TASK_ID:+-$SLURM_ARRAY_TASK_ID}
log=${BIGTX_LOGS:-.}/slurm-$SLURM_JOB_NAME-${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}$task
crashes=$log.crashes exclusions=$log.exclusions
step="" asked="" status=0

run() {
  trap 'ask_to_stop' USR1 TERM
  say "start ${SLURM_RESTART_COUNT:-0} on $SLURM_JOB_NODELIST; the first node writes to $log-node0.log"
  # With `sbatch --export=NONE` the tasks would not get the variables of the site's file.
  unset SLURM_EXPORT_ENV
  # Without this SLURM gives each task one core.
  [ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
  if [ "${SLURM_JOB_NUM_NODES:-1}" -gt 1 ] && [ "${BIGTX_PREFLIGHT:-on}" != off ]; then check_nodes "$@"; fi
  on_each_node ${container[@]+"${container[@]}"} "$@"
  conclude
}

# Start a command once on each node, and wait for it. Its status is then in $status. bigtx itself ends all nodes when
# one fails, so srun must not.
on_each_node() {
  srun --ntasks-per-node=1 --cpu-bind=none --kill-on-bad-exit=0 \
    --open-mode=append --output="$log-node%n.log" ${srun_options[@]+"${srun_options[@]}"} "$@" &
  step=$!
  # A signal interrupts `wait`; the command continues until it has saved.
  while
    interrupted=""
    wait "$step"
    status=$?
    [ -n "$interrupted" ]
  do :; done
  step=""
}

# Check the nodes with `bigtx doctor`. Returns if all can train; otherwise requeues or ends the job.
check_nodes() {
  local bad=$log.bad said=$log.srun folder=. names word
  rm -f "$bad"
  for word in "$@"; do [[ $word != run_dir=* ]] || folder=${word#run_dir=}; done
  on_each_node --wait=30 ${container[@]+"${container[@]}"} bigtx doctor folder="$folder" output="$bad" \
    ${doctor_options[@]+"${doctor_options[@]}"} 2>"$said"
  cat "$said" >&2
  # Only srun names a node whose slurmd does not answer; it then ends the tasks on the other nodes.
  names=$({ cat "$bad" 2>/dev/null; sed -n 's/.*Task launch for .* failed on node \([^:]*\):.*/\1/p' "$said"; } | paste -sd,)
  rm -f "$bad" "$said"
  [ -z "$asked" ] || { status=75; conclude; }
  [ -z "$names" ] || exclude "$names"
  [ "$status" -eq 0 ] || conclude
}

exclude() {
  local names=$1 before number left
  echo "$names" >>"$exclusions"
  before=$(scontrol show job -o "$SLURM_JOB_ID" | sed -n 's/.* ExcNodeList=\([^ ]*\).*/\1/p')
  case $before in "" | "(null)") ;; *) names=$before,$names ;; esac
  if [ "$(wc -l <"$exclusions")" -gt "$max_exclusions" ]; then
    rm -f "$exclusions"
    fail "slow or broken: $1. Nodes were excluded $max_exclusions times before: not started again"
  fi
  left=$(sinfo -h -N -p "$SLURM_JOB_PARTITION" -t idle,alloc,mix,comp,resv -o %N | sort -u |
    grep -vxF -f <(scontrol show hostnames "$names") | wc -l)
  if [ "$left" -lt "$SLURM_JOB_NUM_NODES" ]; then
    fail "slow or broken: $1. Without it, $left of the $SLURM_JOB_NUM_NODES nodes are left that the job needs in" \
      "partition $SLURM_JOB_PARTITION: not started. $log-node0.log says what is wrong; BIGTX_PREFLIGHT=off starts it anyway"
  fi
  say "slow or broken: $1; excluded"
  requeue
  # The job is pending now, and cannot start before this script has ended. Meanwhile SLURM sends TERM to its processes.
  for number in 1 2 3 4 5; do
    (trap '' TERM USR1; exec scontrol update JobId="$SLURM_JOB_ID" ExcNodeList="$names") && exit 75
    sleep 0.5
  done
  say "could not exclude $1"
  exit 75
}

ask_to_stop() {
  interrupted=1 asked=1
  [ -z "$step" ] || kill -USR1 "$step" 2>/dev/null
}

conclude() {
  # If the command does not handle the signal yet, the signal ends it.
  [ -z "$asked" ] || [ "$status" -ne $((128 + $(kill -l USR1))) ] || status=75
  case $status in
    0) rm -f "$crashes" "$exclusions"; say "finished" ;;
    2) say "not started again: $log-node0.log says what to change" ;;
    75)
      # SLURM sends the signal at once where the time limit is shorter than the seconds of --signal.
      if [ "$SECONDS" -lt 60 ]; then
        retry "stopped within a minute of its start" \
          "; the time limit must be longer than the seconds of --signal and the start of the run"
      else
        rm -f "$crashes"
        say "stopped"
        requeue
      fi ;;
    *) retry "crashed with status $status" "" ;;
  esac
  exit "$status"
}

# Requeue the job, unless it has failed too often in a row. Arguments: what happened, and the advice for the last time.
retry() {
  echo "$1" >>"$crashes"
  if [ "$(wc -l <"$crashes")" -gt "$max_crashes" ]; then
    say "$1, and $max_crashes times before: not started again$2"
    rm -f "$crashes"
  else
    say "$1"
    requeue
  fi
}

# Requeue the job, unless it was cancelled or SLURM requeues it itself. The controller of a busy cluster may not answer a
# request, so this tries for some minutes.
requeue() {
  local job
  for _ in $(seq 30); do
    if job=$(scontrol show job -o "$SLURM_JOB_ID"); then
      # SIGNALING is RUNNING while SLURM sends a signal.
      if [[ ! $job =~ " JobState="(RUNNING|SIGNALING)" " ]]; then
        say "not requeued: the job was cancelled, or SLURM ends it"
        return
      fi
      say "requeued"
      scontrol requeue "$SLURM_JOB_ID" && return
    fi
    sleep 5
  done
  say "could not be requeued: submit it again"
}

fail() {
  say "$*"
  exit 2
}

say() { echo "$(date '+%F %T') job $SLURM_JOB_ID: $*"; }
