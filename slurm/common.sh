# What the scripts of this folder have in common. A batch script sources it and calls `run COMMAND...`.
#
# `run` has `bigtx doctor` look at the nodes, if there are several. It starts the command once on each of them, and then
# decides what becomes of the job:
#
#   the command ends with       the job
#   0, finished                 ends
#   75, asked to stop           is requeued, and the same command resumes; within a minute of its start, as a crash
#   2, a mistake of the user    ends with status 2
#   anything else, a crash      is requeued, at most $BIGTX_MAX_CRASHES times in a row
#
# Nodes that bigtx doctor finds slow or broken are excluded, and the job is requeued without them, at most
# $BIGTX_MAX_EXCLUSIONS times.
#
# USR1 (sent by SLURM before the time is over, see --signal) and TERM ask the command to stop. `fail WORDS...` ends the
# job with status 2.

home=${BIGTX_HOME:-$SLURM_SUBMIT_DIR}
source "${BIGTX_SITE:-$home/configs/site/default.sh}"
set -uo pipefail  # Not before: what a site loads may know nothing of it.

max_crashes=${BIGTX_MAX_CRASHES:-3} max_exclusions=${BIGTX_MAX_EXCLUSIONS:-3}
task=${SLURM_ARRAY_TASK_ID:+-$SLURM_ARRAY_TASK_ID}
log=${BIGTX_LOGS:-.}/slurm-$SLURM_JOB_NAME-${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}$task
crashes=$log.crashes exclusions=$log.exclusions
step="" asked="" status=0

run() {
  trap 'ask_to_stop' USR1 TERM
  say "start ${SLURM_RESTART_COUNT:-0} on $SLURM_JOB_NODELIST; the first node writes to $log-node0.log"
  # `sbatch --export=NONE` would keep from the tasks what the site's file has set.
  unset SLURM_EXPORT_ENV
  # SLURM would give a task one core. bigtx itself ends all nodes when one fails.
  [ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
  if [ "${SLURM_JOB_NUM_NODES:-1}" -gt 1 ] && [ "${BIGTX_PREFLIGHT:-on}" != off ]; then look_at_nodes "$@"; fi
  on_each_node ${container[@]+"${container[@]}"} "$@"
  conclude
}

# Start a command once on each node, and wait for it; its status is in $status.
on_each_node() {
  srun --ntasks-per-node=1 --cpu-bind=none --kill-on-bad-exit=0 \
    --open-mode=append --output="$log-node%n.log" ${srun_options[@]+"${srun_options[@]}"} "$@" &
  step=$!
  # A signal interrupts `wait`; the command goes on until it has saved.
  while
    interrupted=""
    wait "$step"
    status=$?
    [ -n "$interrupted" ]
  do :; done
  step=""
}

# Return if the nodes are fit; else decide what becomes of the job.
look_at_nodes() {
  local bad=$log.bad said=$log.srun folder=. names word
  rm -f "$bad"
  for word in "$@"; do [[ $word != run_dir=* ]] || folder=${word#run_dir=}; done
  on_each_node --wait=30 ${container[@]+"${container[@]}"} bigtx doctor folder="$folder" output="$bad" \
    ${doctor_options[@]+"${doctor_options[@]}"} 2>"$said"
  cat "$said" >&2
  # A node on which slurmd does not answer is named by srun, and by nobody else: srun then ends the others.
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
  # The job is pending now, and cannot start before this script has ended. SLURM sends TERM to all of it meanwhile.
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
  # Before the command listens to it, the signal itself ends it.
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

# Requeue the job, unless it has ended badly too often in a row: what happened, and what to do about it then.
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

# Whoever cancelled the job does not want it again, and a job that SLURM itself requeues needs no help. The controller of a
# busy cluster may leave a question unanswered: it is asked for some minutes.
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
