#!/usr/bin/env bash
# A small network on MNIST on the CPUs of one node; --model names it.
#   sbatch slurm/mnist.sh --model gap
#   sbatch --gpus-per-node=1 slurm/mnist.sh --model wide --epochs 20
# Options of Slurm come before the script, flags of distcv.train after it. Submit from the clone. A
# job that is preempted, or comes to its time limit, saves, is requeued and goes on by itself.

#SBATCH --job-name=mnist
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=2
#SBATCH --time=00:30:00
#SBATCH --output=%x-%j.out

#SBATCH --signal=B:USR2@120
#SBATCH --requeue
#SBATCH --open-mode=append

set -euo pipefail
. launch/requeue.sh
srun=(srun)
# srun+=(--container-image="$PWD/distcv.sqsh" --container-mounts="$PWD" --container-workdir="$PWD")   # pyxis
# srun+=(apptainer exec --nv --bind "$PWD" distcv.sif)

run_or_requeue "${srun[@]}" launch/multinode.sh -- --name "$SLURM_JOB_NAME-$SLURM_JOB_ID" "$@"
