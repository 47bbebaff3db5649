#!/bin/sh
#SBATCH --job-name=moe_100m
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
# Trains on GPU nodes under Slurm, then serves, one process per GPU:   sbatch examples/slurm.sh
#
# --distributed=auto reads what srun puts into the environment (SLURM_JOB_ID, SLURM_NTASKS,
# SLURM_PROCID, SLURM_LOCALID, SLURM_STEP_NODELIST). 2 nodes x 8 GPUs: mesh.node = 2 keeps the slow
# network to one axis, mesh.expert = 8 to the links inside a node. Submit from this checkout, on a
# file system that all nodes share. The second command, when the first has ended, answers requests
# with the same processes: the first of them listens.
#
# Run: the flags (tests/examples), and two processes that are told their numbers by hand
# (tests/train/test_processes.py, tests/infer/server/test_processes.py). Not run: Slurm, and GPUs
# of several nodes.
set -eu

# srun does not take --cpus-per-task from sbatch (Slurm 22.05 and newer).
srun --cpus-per-task="$SLURM_CPUS_PER_TASK" .venv/bin/python train.py \
  --config=configs/moe_100m.py \
  --workdir=runs/moe_100m \
  --distributed=auto \
  --config.platform=gpu \
  --config.mesh.node=2 \
  --config.data.path=/shared/text

srun --cpus-per-task="$SLURM_CPUS_PER_TASK" .venv/bin/python infer.py \
  --serve --host=0.0.0.0 --bearer_token_file=/shared/token \
  --workdir=runs/moe_100m \
  --distributed=auto
