#!/usr/bin/env bash
# Train on a Slurm cluster: sbatch configs/cluster/slurm.sh [CONFIG] [section.key=value ...]
# Run it from this project's folder on a file system that all nodes share. A job that is requeued continues from its
# newest checkpoint. Not run here (no Slurm was at hand): its syntax and the command inside are tested.
#SBATCH --job-name=cures
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --output=cures-%j.log
set -euo pipefail

cd "${SLURM_SUBMIT_DIR:?start this with sbatch}"
config=${1:-configs/two-node.yaml}
shift || true
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${hosts%%$'\n'*}  # the first; a pipe into head could end scontrol early, which counts as a failure
port=$((20000 + SLURM_JOB_ID % 10000))  # jobs that share a node must not meet
export RAY_AUTH_MODE=token  # of this job alone, the same on all nodes
RAY_AUTH_TOKEN=$(head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \n')
export RAY_AUTH_TOKEN

# One Ray node a task; the command runs on the first of them, when all have joined.
exec srun --kill-on-bad-exit=1 .venv/bin/ray symmetric-run \
  --address "$head:$port" --min-nodes "$SLURM_JOB_NUM_NODES" \
  --num-cpus "${SLURM_CPUS_PER_TASK:-64}" --num-gpus "${SLURM_GPUS_PER_NODE:-8}" -- \
  .venv/bin/cures train "$config" "checkpoint.dir=$PWD/runs/$(basename "$config" .yaml)" ray.address=auto "$@"
