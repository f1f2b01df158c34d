#!/usr/bin/env bash
# sbatch experiments/launch/slurm_array.sh qa --tasks arc_easy openbookqa
#SBATCH --job-name=stable-lora-cells
#SBATCH --array=1-8
#SBATCH --ntasks=1
#SBATCH --gpus-per-task=1
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
# Each job of the array, numbered from 1, runs its part of an experiment's cells. Five minutes before the time is up, the
# signal makes a run save and stop with 143 = 128 + SIGTERM, and the job queues again to go on.
set -uo pipefail
if [ "$#" -lt 1 ]; then
  echo "usage: sbatch $0 EXPERIMENT ARGUMENTS OF python -m experiments.studies.EXPERIMENT" >&2
  exit 2
fi
cd "$SLURM_SUBMIT_DIR"
experiment=$1
shift
srun python -m "experiments.studies.$experiment" --part "$SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT" "$@"
code=$?
if [ "$code" -eq 143 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
