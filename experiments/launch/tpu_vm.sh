#!/usr/bin/env bash
# bash experiments/launch/tpu_vm.sh NAME ZONE --model MODEL --data DATA --mesh fsdp=16 --run-dir SHARED/runs/mine
# Runs on every worker of a Cloud TPU VM slice at once; the repository lies in ~/stable_lora_jax on each (see README.md).
set -euo pipefail
if [ "$#" -lt 3 ]; then
  echo "usage: $0 NAME ZONE ARGUMENTS OF stable-lora train" >&2
  exit 2
fi
name=$1 zone=$2
shift 2
gcloud compute tpus tpu-vm ssh "$name" --zone "$zone" --worker=all \
  --command "cd stable_lora_jax && PATH=\$PWD/.venv/bin:\$PATH bash experiments/launch/train.sh $(printf '%q ' "$@")"
