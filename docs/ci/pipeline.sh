#!/usr/bin/env bash
# What a CI job runs: text to a gated, exported model that answered over HTTP. Usage: pipeline.sh RECIPE.toml [RUN_FOLDER]
set -euo pipefail

recipe=${1:?usage: pipeline.sh RECIPE.toml [RUN_FOLDER]}
export LLMCTL_RUN=${2:-runs/ci}
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$LLMCTL_RUN"

llmctl doctor --json > "$LLMCTL_RUN/doctor.json"
llmctl run "$recipe" --run-dir "$LLMCTL_RUN" --events "$LLMCTL_RUN/events.jsonl"
llmctl status --exit-code
llmctl verify
llmctl eval --markdown >> "${GITHUB_STEP_SUMMARY:-/dev/null}"
llmctl serve --port 0 --api-key "$(python3 -c 'import secrets; print(secrets.token_hex(16))')" --exec "python3 $here/smoke.py"
llmctl report
