#!/usr/bin/env bash
# Run one command on every worker of TPU_NAME at once, in ~/locft-jax, with its Python first on PATH.
#   run.sh [--delete-on-failure] [--dry-run] COMMAND...
# Logs: LOGS/JOB/worker-N.log. The command goes on if the connection breaks; the same JOB follows it again.
# Environment: PROJECT_ID ZONE TPU_NAME TPU_TYPE, LOGS (runs/tpu-logs/TPU_NAME), JOB (a name; the time)

# shellcheck source-path=SCRIPTDIR
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

parse "--delete-on-failure" "$@"
shift "$parsed"
[ "${1:-}" != -- ] || shift
need PROJECT_ID ZONE TPU_NAME TPU_TYPE
machine
[ $# -gt 0 ] || die "no command to run; $0 --help"
JOB=${JOB:-$(date +%Y%m%d-%H%M%S)}
[[ $JOB != *[!A-Za-z0-9._-]* ]] || die "JOB=$JOB: letters, digits, dots, dashes and underscores only"

guard
goes_on="the command goes on there; to follow it again: JOB=$JOB and the same call of run.sh"
count_workers
every_worker "$logs/$JOB" "bash locft-jax/tpu_scripts/worker.sh $JOB $(quoted "$@")"
