#!/usr/bin/env bash
# Read by a batch script of Slurm (. launch/requeue.sh). It gives one function,
#   run_or_requeue COMMAND...
# which runs the command and returns if it did well. If it was stopped and can go on, exactly this
# job or array task is requeued, unless somebody cancelled it; if it failed, the job fails.
#
# Asked to stop are all processes by SIGUSR2 to this script (#SBATCH --signal=B:USR2@120: ahead of
# the time limit), by SIGTERM (preemption, requeue, node maintenance), or by a file STOP in the run
# folder. They save at the end of a step and leave; the requeued job goes on in the same run folder.

run_or_requeue() {
    if [[ -n ${DISTCV_SHOW_COMMAND:-} ]]; then # distcv.submit asks what would be run
        printf '%s\0' "$@"
        exit
    fi
    local job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID:-}}
    job=${job:-${SLURM_JOB_ID:?is not set: submit this script with sbatch}}

    export DISTCV_STOP_FILE=$PWD/.stop-$job # says "stopped" or, if it is empty, asks for it
    rm -f "$DISTCV_STOP_FILE"
    export MASTER_ADDR=$SLURMD_NODENAME                 # a batch script runs on the first node
    export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} # srun doesn't take it over by itself
    export SLURM_EXPORT_ENV=ALL                         # else srun fails after sbatch --export=NONE
    export SLURM_KILL_BAD_EXIT=0 SLURM_WAIT=60          # seconds that the other nodes have to follow
    if [[ -z ${VIRTUAL_ENV:-} && -x .venv/bin/accelerate ]]; then
        PATH=$PWD/.venv/bin:$PATH
    fi

    # No command substitution as long as there is a trap: bash 5.2 loses its way where a signal comes.
    local interrupted code
    trap 'interrupted=1; : >>"$DISTCV_STOP_FILE"' USR2 TERM
    "$@" &
    while true; do
        interrupted=''
        code=0
        wait "$!" || code=$?
        [[ -n $interrupted ]] || break
    done
    trap '' USR2 TERM # what asks Slurm below must not be ended by its signals

    local answer='' state
    if [[ -e $DISTCV_STOP_FILE ]]; then
        answer=$(<"$DISTCV_STOP_FILE")
        rm -f "$DISTCV_STOP_FILE"
        # Without an answer the processes were ended before they could save: the newest checkpoint
        # is where the job goes on, unless they had come to their end.
        ((code == 0)) || answer=${answer:-ended without an answer}
    fi
    if [[ -z $answer ]]; then
        trap - USR2 TERM
        ((code == 0)) && return
        echo "job $job: failed with exit code $code, not requeued" >&2
        exit "$code"
    fi
    # RUNNING, if it left by itself, or over its time limit. If it was cancelled or requeued from
    # outside it is COMPLETING for another reason, and a requeue from here would undo the cancelling.
    state=$(squeue --noheader --jobs="$job" --format='%T %r') || state=''
    if [[ $state == RUNNING* || $state == *TimeLimit ]] && scontrol requeue "$job"; then
        echo "job $job: $answer, requeued"
    else
        echo "job $job: $answer, not requeued by itself (${state:-no state})"
    fi
    exit 75
}
