#!/bin/sh
# Trains on a Cloud TPU pod slice: the same command on every host.
#
#   TPU=my-slice ZONE=us-east5-a SHARED=/mnt/shared sh examples/cloud_tpu_pod.sh
#
# --distributed=auto finds the other hosts through the TPU's own metadata. Every host needs this
# checkout and its environment (first command), the same text under --config.data.path, and a work
# directory that all of them reach: checkpoints are written by all hosts together. SHARED is where
# a file system of all hosts is mounted (Filestore, say); gs:// addresses are refused.
# PYTHON is 3.11 or newer; images with an older one need it first (uv python install 3.12, say).
# moe_100m has mesh.expert = 8; mesh.data is the chips of the slice over 8 (here v5p-64: 32 chips).
#
# Run: the flags (tests/examples), and the training step compiled ahead of time for TPU slices
# (tests/train/test_compile_for_tpu.py). Not run: gcloud, and a slice.
set -eu

on_every_host() {
  gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all --command="$1"
}

on_every_host "cd moe_jax && ${PYTHON:-python3} -m venv .venv && .venv/bin/pip install -e '.[tpu]'"

on_every_host "cd moe_jax && .venv/bin/python train.py \
  --config=configs/moe_100m.py \
  --workdir=$SHARED/runs/moe_100m \
  --distributed=auto \
  --config.mesh.data=4 \
  --config.data.path=/data/text"
