#!/usr/bin/env bash
# Install this source tree in ~/locft-jax on every worker of TPU_NAME, with FILES (edits, say) beside it.
#   setup.sh [--delete-on-failure] [--dry-run] [FILE...]
# Environment: PROJECT_ID ZONE TPU_NAME TPU_TYPE, LOGS (runs/tpu-logs/TPU_NAME)

# shellcheck source-path=SCRIPTDIR
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

parse "--delete-on-failure" "$@"
shift "$parsed"
need PROJECT_ID ZONE TPU_NAME TPU_TYPE
machine
sent=(-C "$(dirname "$here")" pyproject.toml README.md LICENSE locft_jax configs tpu_scripts)
for file; do
    [ -f "$file" ] || die "$file: no such file"
    sent+=(-C "$(cd "$(dirname "$file")" && pwd)" "$(basename "$file")")
done
# The VM's own Python may be older than 3.11, which the tests run on: uv brings it.
install='set -e; mkdir -p locft-jax; tar -xzf locft-jax.tar.gz -C locft-jax; cd locft-jax; '
install+='python3 -m pip install --quiet --user uv; '
install+='[ -x .venv/bin/python ] || python3 -m uv venv --quiet --python 3.11 .venv; '
install+='python3 -m uv pip install --quiet --python .venv/bin/python ".[tpu,gcs]"; echo installed'

guard
run mkdir -p "$logs/setup"
run tar -czf "$logs/setup/locft-jax.tar.gz" --exclude=__pycache__ "${sent[@]}"
count_workers
for ((worker = 0; worker < workers; worker++)); do
    tpu tpu-vm scp "$logs/setup/locft-jax.tar.gz" "$TPU_NAME:locft-jax.tar.gz" --worker="$worker"
done
every_worker "$logs/setup" "$install"
