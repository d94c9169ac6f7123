#!/usr/bin/env bash
# On a worker, called by run.sh: `worker.sh JOB COMMAND...` starts the command, once for each JOB, follows
# what it prints and ends with its status. gcloud connects anew when a connection breaks: that second call
# must not start a second command.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PATH="$PWD/.venv/bin:$PATH" PYTHONUNBUFFERED=1

job=jobs/$1
shift
mkdir -p jobs
if mkdir "$job" 2>/dev/null; then
    : >"$job/log"
    # shellcheck disable=SC2016  # the inner shell's variables
    nohup bash -c 'job=$1; shift; "$@"; echo $? >"$job/status"' bash "$job" "$@" >>"$job/log" 2>&1 </dev/null &
    echo $! >"$job/pid"
fi
tail -n +1 -f --pid="$(cat "$job/pid")" "$job/log"
if [ ! -f "$job/status" ]; then
    echo "the command was killed, or the machine restarted"
    exit 137
fi
exit "$(cat "$job/status")"
