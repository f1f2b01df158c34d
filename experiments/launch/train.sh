#!/usr/bin/env bash
# The command that every process of every launcher here runs. Arguments: those of `stable-lora train`.
# --distributed finds the other processes; --auto-resume starts the run, or goes on with it after a stop or a loss.
set -euo pipefail
exec stable-lora train --distributed --auto-resume "$@"
