#!/usr/bin/env bash
# bash experiments/launch/paper.sh MODEL [OPTIONS]     MODEL: Qwen/Qwen2-0.5B, Qwen/Qwen2-1.5B, meta-llama/Llama-3.2-1B or -3B
# The paper's tables on its own models: five question sets, its ranges of η, s and λ, LoRA r = 8 on q and v, whole
# training sets; then MetaMathQA and GSM8K, which come from the hub, as the model does. For accelerators: 1200 runs of the
# search and 125 that are reported, and 18 of the second. OPTIONS go to both experiments, e.g. --ray 8 or --together 4.
set -euo pipefail
if [ "$#" -lt 1 ]; then
  echo "usage: $0 MODEL [OPTIONS OF python -m experiments.studies.qa]" >&2
  exit 2
fi
model=$1
shift
python -m experiments.studies.qa --model "$model" --steps None \
  --tasks arc_easy arc_challenge openbookqa social_iqa hellaswag \
  --learning-rates 5e-5 1e-4 2e-4 4e-4 8e-4 --scales 2 4 8 16 32 64 --lams 0.0005 0.001 0.002 0.005 "$@"
python -m experiments.studies.cot --model "$model" "$@"
