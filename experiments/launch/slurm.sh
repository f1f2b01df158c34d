#!/usr/bin/env bash
# sbatch experiments/launch/slurm.sh --model MODEL --data DATA --mesh data=2,fsdp=8 --run-dir SHARED/runs/mine
#SBATCH --job-name=stable-lora
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
# One task a GPU: JAX gives each task the GPU of its local number. Five minutes before the time is up, the signal makes
# the run save and stop with 143 = 128 + SIGTERM, and the job queues again to go on.
set -uo pipefail
cd "$SLURM_SUBMIT_DIR"
srun --kill-on-bad-exit=1 bash experiments/launch/train.sh "$@"
code=$?
if [ "$code" -eq 143 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
