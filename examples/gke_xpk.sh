#!/bin/sh
# Trains on TPU slices of a GKE cluster through xpk, which starts one container per host.
#
#   CLUSTER=my-cluster ZONE=us-east5-a PROJECT=my-project IMAGE=gcr.io/my-project/moe_jax \
#     sh examples/gke_xpk.sh
#
# IMAGE holds this checkout, installed with '.[tpu]', as its working directory. GKE sets the
# variables that --distributed=auto reads. The work directory and the text are on a volume that all
# containers mount (xpk storage attach, before this). A container that is restarted goes on from the
# last checkpoint by itself; xpk restarts none unless it is told to. After a SIGTERM the exit code is
# 0, and GKE then counts the job as done: the same command starts it again.
#
# Run: the flags (tests/examples). Not run: xpk, GKE, and a slice.
set -eu

xpk workload create \
  --cluster="$CLUSTER" --zone="$ZONE" --project="$PROJECT" \
  --workload=moe-100m \
  --tpu-type=v5p-64 \
  --num-slices=1 \
  --max-restarts=10 --restart-on-user-code-failure \
  --termination-grace-period-seconds=120 \
  --docker-image="$IMAGE" \
  --command="python train.py \
    --config=configs/moe_100m.py \
    --workdir=/shared/runs/moe_100m \
    --distributed=auto \
    --config.mesh.data=4 \
    --config.data.path=/shared/text"
