# shellcheck shell=bash
# What the scripts beside it share: sourced, never run. Each of them takes --dry-run and --help.
# Settings come from the environment: PROJECT_ID, ZONE, TPU_NAME, and TPU_TYPE or BUCKET where they matter.

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck disable=SC2034  # read by the scripts
queued='' spot='' dry_run='' delete_on_failure='' goes_on='' parsed=0 logs=${LOGS:-runs/tpu-logs/${TPU_NAME:-}}

say() { echo "$*" >&2; }
die() {
    say "error: $*"
    exit 2
}

# parse "--ALLOWED ..." "$@": --some-flag sets some_flag=yes; `parsed` says how many arguments that were.
# shellcheck disable=SC2034  # read by the scripts
parse() {
    local allowed=" $1 --dry-run " given=$# name
    while shift && [[ ${1:-} == --?* ]]; do
        if [ "$1" = --help ]; then
            sed -n '2,/^$/s/^# \{0,1\}//p' "$0"
            exit 0
        fi
        [[ $allowed == *" $1 "* ]] || die "$1: not an option here; $0 --help lists them"
        name=${1#--}
        printf -v "${name//-/_}" yes
    done
    parsed=$((given - 1 - $#))
}

# need VARIABLE...: they are set and make sense, and gcloud is here unless nothing will be run.
need() {
    local name what missing=''
    for name; do
        case $name in
        PROJECT_ID) what="the Google Cloud project" ;;
        ZONE) what="a zone that has such TPUs" ;;
        TPU_NAME) what="your name for the machine" ;;
        TPU_TYPE) what="v5e-8, v5e-16, v5p-8 or v6e-8" ;;
        BUCKET) what="where results go: gs://BUCKET or gs://BUCKET/FOLDER" ;;
        esac
        [ -n "${!name:-}" ] || missing+=$'\n'"  export $name=...   # $what"
    done
    [ -z "$missing" ] || die "not set:$missing"
    [[ ${BUCKET:-gs://} == gs://* ]] || die "BUCKET=$BUCKET: it must begin with gs://"
    [ -n "$dry_run" ] || command -v gcloud >/dev/null ||
        die "gcloud is not on PATH: https://cloud.google.com/sdk/docs/install (--dry-run works without it)"
}

# What TPU_TYPE is called, what it boots, and how many VMs (workers) it has.
# shellcheck disable=SC2034  # read by the scripts
machine() {
    case $TPU_TYPE in
    v5e-8) accelerator=v5litepod-8 runtime=v2-alpha-tpuv5-lite workers=1 ;;
    v5e-16) accelerator=v5litepod-16 runtime=v2-alpha-tpuv5-lite workers=4 ;;
    v5p-8) accelerator=v5p-8 runtime=v2-alpha-tpuv5 workers=1 ;;
    v6e-8) accelerator=v6e-8 runtime=v2-alpha-tpuv6e workers=1 ;;
    *) die "TPU_TYPE=$TPU_TYPE: it must be v5e-8, v5e-16, v5p-8 or v6e-8" ;;
    esac
}

# quoted WORD...: one line that a shell reads back as these words.
quoted() {
    local word line='' quote=\' escaped="'\\''"
    for word; do
        case $word in
        '' | *[!A-Za-z0-9_./:=@%+,-]*) word="'${word//$quote/$escaped}'" ;;
        esac
        line+=" $word"
    done
    printf '%s\n' "${line# }"
}

run() { if [ -n "$dry_run" ]; then quoted "$@"; else "$@"; fi; }
tpu() { run gcloud compute tpus "$@" --project="$PROJECT_ID" --zone="$ZONE" --quiet; }

# on_worker N COMMAND; the connection is tested every 30 s: one that broke must not look like patience.
on_worker() {
    tpu tpu-vm ssh "$TPU_NAME" --worker="$1" --ssh-flag=-oServerAliveInterval=30 --command="$2"
}

# exists tpu-vm|queued-resources: is TPU_NAME one of them? 0: yes, 1: no, 3: gcloud cannot say.
exists() {
    local names list=("$1" list --format='value(name.basename())')
    if [ -n "$dry_run" ]; then
        tpu "${list[@]}"
        return 1
    fi
    names=$(tpu "${list[@]}") || return 3
    grep -Fxq -- "$TPU_NAME" <<<"$names"
}

# Sets `workers` to the real number of them; a dry run keeps machine()'s.
count_workers() {
    local show=(tpu-vm describe "$TPU_NAME" '--flatten=networkEndpoints[]' '--format=value(networkEndpoints.ipAddress)')
    if [ -n "$dry_run" ]; then
        tpu "${show[@]}"
    else
        workers=$(tpu "${show[@]}" | grep -c .)
    fi
}

# every_worker FOLDER COMMAND: on all workers at once, each with its FOLDER/worker-N.log; worker 0's is
# shown too. Returns the status of the worker that failed, not of those that JAX ended for its sake (it aborts
# them: 134, or 1 where locft_jax could say so). gcloud's own --worker=all mixes all that, and wants an ssh-agent.
every_worker() {
    local folder=$1 command=$2 worker code status='' victim='' pids=()
    run mkdir -p "$folder"
    set -m # every worker is a process group of its own, which finish() can end
    for ((worker = 0; worker < workers; worker++)); do
        if [ -n "$dry_run" ]; then
            echo "$(on_worker "$worker" "$command") 2>&1 | tee $(quoted "$folder/worker-$worker.log") &"
            continue
        elif [ "$worker" = 0 ]; then
            (on_worker 0 "$command" 2>&1 | tee "$folder/worker-0.log") </dev/null &
        else
            on_worker "$worker" "$command" >"$folder/worker-$worker.log" 2>&1 </dev/null &
        fi
        pids+=("$!")
    done
    set +m
    if [ -n "$dry_run" ]; then
        echo wait
        return 0
    fi
    for ((worker = 0; worker < workers; worker++)); do
        code=0
        wait "${pids[worker]}" || code=$?
        [ "$code" != 0 ] || continue
        say "worker $worker: status $code; the end of $folder/worker-$worker.log:"
        tail -n 5 "$folder/worker-$worker.log" | sed 's/^/    /' >&2
        if [ "$code" = 134 ] || grep -q 'another process of this run died' "$folder/worker-$worker.log"; then
            say "    it ended because another worker died; why is in that worker's log"
            victim=${victim:-$code}
        else
            status=${status:-$code}
        fi
    done
    return "${status:-${victim:-0}}"
}

# guard: from here on, a script that ends without success says which paid machine is left, or deletes it
# with --delete-on-failure.
guard() {
    [ -z "$dry_run" ] || return 0
    trap finish EXIT
    trap 'exit 129' HUP
    trap 'exit 130' INT
    trap 'exit 143' TERM
}

finish() {
    local status=$? kind code job left=''
    trap - EXIT
    trap '' HUP INT TERM
    [ "$status" != 0 ] || exit 0
    for job in $(jobs -p); do kill -- "-$job" 2>/dev/null || true; done
    say "error: $0 ended with status $status"
    for kind in queued-resources tpu-vm; do
        code=0
        exists "$kind" || code=$?
        case $code in
        0) left=yes && say "$TPU_NAME ($kind in $ZONE) still exists: it is paid for until it is deleted" ;;
        3) left=yes && say "gcloud cannot say whether $TPU_NAME ($kind in $ZONE) exists: it may, and be paid for" ;;
        esac
    done
    if [ -z "$left" ]; then
        say "no machine called $TPU_NAME is left in $ZONE"
    elif [ -n "$delete_on_failure" ]; then
        "$here/delete.sh" || true # it says so if it cannot
    else
        case $status in 129 | 130 | 143) [ -z "$goes_on" ] || say "$goes_on" ;; esac
        say "delete it: $(quoted env PROJECT_ID="$PROJECT_ID" ZONE="$ZONE" TPU_NAME="$TPU_NAME" "$here/delete.sh")"
    fi
    exit "$status"
}
