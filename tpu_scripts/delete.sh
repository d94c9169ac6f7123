#!/usr/bin/env bash
# Delete TPU_NAME, queued resource or TPU VM, and everything on its disks.
#   delete.sh [--dry-run]
# Environment: PROJECT_ID ZONE TPU_NAME

# shellcheck source-path=SCRIPTDIR
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

parse "" "$@"
[ "$parsed" = $# ] || die "$0 takes options only, not: $*"
need PROJECT_ID ZONE TPU_NAME

guard
result="there is none"
for kind in queued-resources tpu-vm; do # in this order: a queued resource takes its VM with it
    force=--force
    [ "$kind" = queued-resources ] || force=''
    code=0
    exists "$kind" || code=$?
    [ "$code" != 3 ] || exit 1
    [ "$code" = 0 ] || [ -n "$dry_run" ] || continue
    tpu "$kind" delete "$TPU_NAME" $force
    result=deleted
done
[ -n "$dry_run" ] || say "$TPU_NAME in $ZONE: $result"
