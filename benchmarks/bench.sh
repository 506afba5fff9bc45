#!/usr/bin/env bash
# Measures the models of the newest complete demo run (below demo-run, or the folder given) with the full number of samples, and makes
# its report again. Runs the demo first where there is none. Ends with 1 if a row is INVALID: measure again on an idle machine.
set -euo pipefail

base=${1:-demo-run}

newest_run() {
    local folder newest=
    for folder in "$base"/run-*; do
        if [ -e "$folder/benchmark.json" ] && { [ -z "$newest" ] || [ "$folder" -nt "$newest" ]; }; then newest=$folder; fi
    done
    printf '%s' "$newest"
}

run() {
    printf '\n$'
    printf ' %q' "$@"
    printf '\n'
    "$@"
}

W=$(newest_run)
if [ -z "$W" ]; then
    "$(dirname "$0")/demo.sh" "$base"
    W=$(newest_run)
fi
code=0
run txl bench --checkpoint "$W/checkpoint_best.pt" --artifact "$W/torchscript" --artifact "$W/onnx" \
    --batch-sizes 1..32 --out "$W/benchmark-full.json" || code=$?
[ "$code" -le 1 ] || exit "$code"
run txl report --work-dir "$W" --bench "$W/benchmark-full.json"
exit "$code"
