#!/usr/bin/env bash
# From nothing to results in BUCKET and no machine left: create, set up, run, collect, delete.
#   all.sh [--queued] [--spot] [--delete-on-failure] [--dry-run] [FILE...] -- COMMAND...
# A step that fails is the last: the machine stays, with its checkpoint, unless --delete-on-failure is given.
# Environment: PROJECT_ID ZONE TPU_NAME TPU_TYPE BUCKET, and what else the single scripts take

# shellcheck source-path=SCRIPTDIR
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

parse "--queued --spot --delete-on-failure" "$@"
shift "$parsed"
need PROJECT_ID ZONE TPU_NAME TPU_TYPE BUCKET
brought=()
for file; do
    shift
    [ "$file" != -- ] || break
    [ -f "$file" ] || die "$file: no such file; a command comes after --"
    brought+=("$file")
done
[ $# -gt 0 ] || die "no command: give it after --"
command=("$@")
dry=${dry_run:+--dry-run}
shared="$dry ${delete_on_failure:+--delete-on-failure}"

# Sourced, not called: one shell and one trap from the first paid second to the last.
set -- # a sourced script without arguments would see these
# shellcheck disable=SC2086  # options, or nothing
{
    source "$here/create.sh" $shared ${queued:+--queued} ${spot:+--spot}
    source "$here/setup.sh" $shared ${brought[@]+"${brought[@]}"}
    source "$here/run.sh" $shared "${command[@]}"
    source "$here/collect.sh" $shared
    source "$here/delete.sh" $dry
}
