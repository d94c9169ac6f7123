#!/usr/bin/env bash
# Create TPU_NAME, a TPU VM (or a slice of several) of TPU_TYPE.
#   create.sh [--queued] [--spot] [--delete-on-failure] [--dry-run] [-- MORE OPTIONS FOR GCLOUD]
# --queued asks for a queued resource and waits until it is there; --spot is cheaper and may be taken away.
# Environment: PROJECT_ID ZONE TPU_NAME TPU_TYPE, and POLL_SECONDS (30) between looks at the queue

# shellcheck source-path=SCRIPTDIR
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

parse "--queued --spot --delete-on-failure" "$@"
shift "$parsed"
[ "${1:-}" != -- ] || shift
need PROJECT_ID ZONE TPU_NAME TPU_TYPE
machine
for kind in queued-resources tpu-vm; do # one that was there before must survive what goes wrong here
    code=0
    exists "$kind" || code=$?
    [ "$code" != 0 ] || die "$TPU_NAME ($kind in $ZONE) exists: take another TPU_NAME, or delete.sh it first"
    [ "$code" != 3 ] || die "gcloud cannot list $kind, see above; nothing was created"
done

guard
if [ -z "$queued" ]; then
    tpu tpu-vm create "$TPU_NAME" --accelerator-type="$accelerator" --version="$runtime" ${spot:+--spot} "$@"
else
    tpu queued-resources create "$TPU_NAME" --node-id="$TPU_NAME" --accelerator-type="$accelerator" \
        --runtime-version="$runtime" ${spot:+--spot} "$@"
    show=(queued-resources describe "$TPU_NAME" '--format=value(state.state)')
    [ -z "$dry_run" ] || tpu "${show[@]}"
    state=${dry_run:+ACTIVE}
    until [ "$state" = ACTIVE ]; do
        state=$(tpu "${show[@]}")
        say "$TPU_NAME in the queue: $state"
        case $state in
        ACTIVE) ;;
        FAILED | DELETING | SUSPENDING | SUSPENDED) exit 1 ;;
        *) sleep "${POLL_SECONDS:-30}" ;;
        esac
    done
fi
