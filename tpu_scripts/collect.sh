#!/usr/bin/env bash
# Copy ~/locft-jax/runs of worker 0, which writes the results, and the local logs to BUCKET/TPU_NAME/.
#   collect.sh [--delete-on-failure] [--dry-run]
# Environment: PROJECT_ID ZONE TPU_NAME BUCKET, LOGS (runs/tpu-logs/TPU_NAME)
# The machine's service account, and you, must be allowed to write to the bucket.

# shellcheck source-path=SCRIPTDIR
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

parse "--delete-on-failure" "$@"
[ "$parsed" = $# ] || die "$0 takes options only, not: $*"
need PROJECT_ID ZONE TPU_NAME BUCKET

guard
target=${BUCKET%/}/$TPU_NAME
on_worker 0 "$(quoted gcloud storage rsync --recursive locft-jax/runs "$target/runs")"
if [ -n "$dry_run" ] || [ -d "$logs" ]; then
    run gcloud storage rsync --recursive "$logs" "$target/logs" --project="$PROJECT_ID"
fi
say "results: $target/"
