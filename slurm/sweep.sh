#!/usr/bin/env bash
# Agents of a W&B sweep, as an array of jobs: each runs one training of the sweep.
#   sbatch --array=0-9 slurm/sweep.sh ENTITY/PROJECT/ID
# Options of Slurm come before the script. Submit from the clone. An agent whose training is
# preempted, or comes to its time limit, is requeued, and W&B hands out the same training again.

#SBATCH --job-name=sweep
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

run_or_requeue "${srun[@]}" wandb agent --forward-signals --count 1 "$@"
