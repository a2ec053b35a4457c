#!/usr/bin/env bash
# ResNet-18 on CIFAR-10 on the GPUs of one node or several.
#   sbatch slurm/resnet18.sh
#   sbatch --nodes=4 --gpus-per-node=8 slurm/resnet18.sh --epochs 100
# Options of Slurm come before the script, flags of distcv.train after it. Submit from the clone. A
# job that is preempted, or comes to its time limit, saves, is requeued and goes on by itself.

#SBATCH --job-name=resnet18
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --gpus-per-node=1
#SBATCH --time=02:00:00
#SBATCH --output=%x-%j.out

#SBATCH --signal=B:USR2@120
#SBATCH --requeue
#SBATCH --open-mode=append

set -euo pipefail
. launch/requeue.sh
srun=(srun)
# srun+=(--container-image="$PWD/distcv.sqsh" --container-mounts="$PWD" --container-workdir="$PWD")   # pyxis
# srun+=(apptainer exec --nv --bind "$PWD" distcv.sif)

run_or_requeue "${srun[@]}" launch/multinode.sh -- --model resnet18 \
    --name "$SLURM_JOB_NAME-$SLURM_JOB_ID" "$@"
