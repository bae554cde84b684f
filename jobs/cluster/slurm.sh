#!/usr/bin/env bash
# A job on Slurm: Ray starts on every node of the allocation, the job runs on the first, then all of it stops.
#
# Fill in:   the #SBATCH lines (partition, nodes, GPUs). The repository with its .venv (`make env`), `data_root` and
#            `run_root` lie on storage that all nodes see.
# Start:     sbatch jobs/cluster/slurm.sh jobs/configs/openmoji.yaml
# Again:     the same command: it goes on where the last allocation ended.
#SBATCH --job-name=mmkt
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1      # one Ray per node; it shares out the cores itself
#SBATCH --cpus-per-task=16
#SBATCH --gpus-per-node=1
#SBATCH --exclusive              # `ray stop`, and Ray's fixed ports, are for a machine of one's own
#SBATCH --time=12:00:00
#SBATCH --output=%x-%j.log
set -euo pipefail

cd "${SLURM_SUBMIT_DIR:?start it with sbatch}"
export PATH="$PWD/.venv/bin:$PATH"

# An address, not a name: many machines resolve their own name to 127.0.1.1, and then none would find itself to be the head.
head_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
head_ip=$(srun --nodes=1 --ntasks=1 --nodelist="$head_node" hostname -I | awk '{print $1}')

# Others on this network can reach the ports: a secret for this job alone, that no file holds.
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN
RAY_AUTH_TOKEN=$(python -c 'import secrets; print(secrets.token_hex(32))')
export RAY_ADDRESS="$head_ip:6379"                   # the driver joins this Ray rather than start its own
export RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=300    # seconds; shared storage is slow when all nodes import torch from it

# Ray is told what Slurm granted; it would count all the cores of the machine. --kill-on-bad-exit: no node waits for a dead head.
srun --kill-on-bad-exit=1 ray symmetric-run --address "$RAY_ADDRESS" --min-nodes "$SLURM_JOB_NUM_NODES" \
    --num-cpus="$SLURM_CPUS_PER_TASK" --num-gpus="${SLURM_GPUS_ON_NODE:-0}" --disable-usage-stats \
    -- python jobs/run.py "$@"
