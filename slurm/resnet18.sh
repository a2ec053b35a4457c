#!/usr/bin/env bash
# ResNet-18 on CIFAR-10 on the GPUs of one node, or on its CPUs where no GPU is asked for.
#   sbatch slurm/resnet18.sh                              everything as below
#   sbatch --gpus-per-node=8 slurm/resnet18.sh --epochs 20    resources, then flags of distcv.train
# Submit from the folder that holds .venv/, runs/ and data/. A requeued job resumes its own run.

#SBATCH --job-name=resnet18
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --gpus-per-node=1
#SBATCH --time=02:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out

set -euo pipefail
if [[ -f .venv/bin/activate ]]; then
    . .venv/bin/activate
fi
processes=${SLURM_GPUS_ON_NODE:-1}
launch=(accelerate launch --num_processes "$processes" --num_machines 1 --mixed_precision no
    --dynamo_backend no --main_process_port 0)
((processes > 1)) && launch+=(--multi_gpu)
exec srun "${launch[@]}" -m distcv.train --model resnet18 \
    --name "$SLURM_JOB_NAME-$SLURM_JOB_ID" "$@"
