#!/usr/bin/env bash
# One training for each seed, as an array of jobs; each prints mean and deviation of those that are
# done, and so the last one to end prints them over all. In W&B they form one group; the run folders
# are runs/NAME-ID/seed-0 and so on.
#   sbatch --array=0-9 slurm/seeds.sh --model gap
#   sbatch --array=0-4%2 --gpus-per-node=1 slurm/seeds.sh --model resnet18     two at a time
# Options of Slurm come before the script, flags of distcv.train after it. Submit from the clone. A
# task that is preempted, or comes to its time limit, saves, is requeued and goes on by itself. An
# array that was cancelled goes on where it is submitted again with its folder:
#   RUNS_DIR=runs/seeds-ID sbatch --array=0-9 slurm/seeds.sh --model gap

#SBATCH --job-name=seeds
#SBATCH --array=0-4
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=2
#SBATCH --time=02:00:00
#SBATCH --output=%x-%A_%a.out

#SBATCH --signal=B:USR2@120
#SBATCH --requeue
#SBATCH --open-mode=append

set -euo pipefail
. launch/requeue.sh
srun=(srun)
# srun+=(--container-image="$PWD/distcv.sqsh" --container-mounts="$PWD" --container-workdir="$PWD")   # pyxis
# srun+=(apptainer exec --nv --bind "$PWD" distcv.sif)

runs=${RUNS_DIR:-runs/$SLURM_JOB_NAME-$SLURM_ARRAY_JOB_ID}
run_or_requeue "${srun[@]}" launch/multinode.sh -- --seed "$SLURM_ARRAY_TASK_ID" "$@" \
    --runs-dir "$runs" --name "seed-$SLURM_ARRAY_TASK_ID"

"${srun[@]}" python3 -m distcv.results "$runs"
