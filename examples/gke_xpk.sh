#!/bin/sh
# Trains on TPU slices of a GKE cluster through xpk, which starts one container per host.
#
#   CLUSTER=my-cluster ZONE=us-east5-a PROJECT=my-project IMAGE=gcr.io/my-project/moe_jax \
#     sh examples/gke_xpk.sh
#
# IMAGE holds this checkout, installed with '.[tpu]', as its working directory. GKE sets the
# variables that --distributed=auto reads. The work directory and the text are on a volume that all
# containers mount. A container that is restarted goes on from the last checkpoint by itself.
#
# Run: the flags (tests/examples). Not run: xpk, GKE, and a slice.
set -eu

xpk workload create \
  --cluster="$CLUSTER" --zone="$ZONE" --project="$PROJECT" \
  --workload=moe-100m \
  --tpu-type=v5p-64 \
  --num-slices=1 \
  --docker-image="$IMAGE" \
  --command="python train.py \
    --config=configs/moe_100m.py \
    --workdir=/shared/runs/moe_100m \
    --distributed=auto \
    --config.mesh.data=4 \
    --config.data.path=/shared/text"
