#!/bin/sh
#SBATCH --job-name=moe_100m
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
# Trains on GPU nodes under Slurm, one process per GPU:   sbatch examples/slurm.sh
#
# --distributed=auto reads what srun puts into the environment (SLURM_JOB_ID, SLURM_NTASKS,
# SLURM_PROCID, SLURM_LOCALID, SLURM_STEP_NODELIST). 2 nodes x 8 GPUs: mesh.node = 2 keeps the slow
# network to one axis, mesh.expert = 8 to the links inside a node. Submit from this checkout, on a
# file system that all nodes share. infer.py is one process and wants as many devices as the experts
# are split over, 16 here: before it answers prompts on one node, start train.py there once, with
# --config.mesh.node=1 (a run goes on on any mesh, and its config.json says on which).
#
# Run: the flags (tests/examples), and two processes that are told their numbers by hand
# (tests/train/test_processes.py). Not run: Slurm, and GPUs of several nodes.
set -eu

# srun does not take --cpus-per-task from sbatch (Slurm 22.05 and newer).
srun --cpus-per-task="$SLURM_CPUS_PER_TASK" .venv/bin/python train.py \
  --config=configs/moe_100m.py \
  --workdir=runs/moe_100m \
  --distributed=auto \
  --config.platform=gpu \
  --config.mesh.node=2 \
  --config.data.path=/shared/text
