#!/usr/bin/env bash
# bash experiments/launch/gke_xpk.sh CLUSTER TPU_TYPE IMAGE --model MODEL --data DATA --mesh fsdp=16 --run-dir /runs/mine
# The same as gke_jobset.yaml, written by xpk. TPU_TYPE is e.g. v5litepod-16; IMAGE has the repository as its directory.
set -euo pipefail
if [ "$#" -lt 4 ]; then
  echo "usage: $0 CLUSTER TPU_TYPE IMAGE ARGUMENTS OF stable-lora train" >&2
  exit 2
fi
cluster=$1 type=$2 image=$3
shift 3
xpk workload create --cluster "$cluster" --workload "stable-lora-$(date +%s)" --tpu-type "$type" \
  --docker-image "$image" --max-restarts 100 \
  --command "bash experiments/launch/train.sh $(printf '%q ' "$@")"
