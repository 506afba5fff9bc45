#!/usr/bin/env bash
# The whole path on a small built-in corpus, one command after the other, each shown as it is run: train, evaluate, export, prove,
# measure, report. Everything goes into a new folder below the one that is given (demo-run). Ends at the first step that fails. Rows of the
# benchmark that rest on too few samples or on a busy machine are marked INVALID in the report; `make bench-demo` measures longer.
set -euo pipefail

base=${1:-demo-run}
number=1
while [ -e "$base/run-$number" ]; do number=$((number + 1)); done
W=$base/run-$number
mkdir -p "$W"

run() {
    printf '\n$'
    printf ' %q' "$@"
    printf '\n'
    "$@"
}

started=$SECONDS
echo "Everything goes into $W"

run txl train --config tiny --dataset pydoc --work-dir "$W"
run txl data stats --checkpoint "$W/checkpoint_best.pt" --out "$W/baselines.json"
run txl eval --checkpoint "$W/checkpoint_best.pt" --split test --out "$W/eval-pytorch.json"
for format in torchscript onnx; do
    run txl export --checkpoint "$W/checkpoint_best.pt" --format $format --out "$W/$format"
    run txl eval --artifact "$W/$format" --split test --out "$W/eval-$format.json"
    run txl parity --checkpoint "$W/checkpoint_best.pt" --artifact "$W/$format" --out "$W/parity-$format.json"
done
run txl bench --checkpoint "$W/checkpoint_best.pt" --artifact "$W/torchscript" --artifact "$W/onnx" \
    --batch-sizes 1..32 --duration 2 --max-duration 4 --accept-invalid --out "$W/benchmark.json"
run txl report --work-dir "$W"

echo
echo "Done in $((SECONDS - started)) s. Read $W/report.html; everything else is in $W too."
