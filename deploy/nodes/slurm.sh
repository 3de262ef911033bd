#!/usr/bin/env bash
# One run over the nodes of a Slurm job:
#
#   sbatch deploy/nodes/slurm.sh --model DIR --input FILE --output FILE --tp 16
#
# DIR, and on the first node FILE, are where all nodes see them. The same job can be sent again, or
# be requeued: it goes on with what is missing from the output.
#SBATCH --job-name=onecast
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --requeue
set -euo pipefail
: "${SLURM_JOB_NODELIST:?is what a job has: sbatch $0 ...}"
# The launcher of each node starts that node's ranks; Slurm starts one launcher on each.
mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
endpoint=${hosts[0]}:$((20000 + SLURM_JOB_ID % 10000)) # jobs may share a node
# The node's number is known only there. A launcher that ends badly ends all of them.
# shellcheck disable=SC2016
exec srun --kill-on-bad-exit=1 bash -c '
  exec "${ONECAST:-onecast}" generate --nnodes "$SLURM_JOB_NUM_NODES" --node-rank "$SLURM_NODEID" \
    --rdzv-endpoint "$0" --rdzv-id "slurm-$SLURM_JOB_ID" --max-restarts 3 --resume "$@"
' "$endpoint" "$@"
