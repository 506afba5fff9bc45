#!/usr/bin/env bash
# One checkpoint in every runtime that this machine has, at batch sizes 1 to 32, with receipts, parity and the report of it:
#
#     benchmarks/inference_benchmark.sh W/checkpoint_best.pt RESULTS [options of `txl export` that set lengths]
#
# Exports go to RESULTS/onnx, torchscript and onnx-fp16. Ends with the exit code of `txl bench`: 1 if a row is INVALID. SPLIT, BATCH_SIZES,
# RUNTIMES and DEVICE may be set in the environment, as may BENCH, further options of `txl bench`.
set -euo pipefail

if [ $# -lt 2 ]; then
    echo "Usage: $0 CHECKPOINT RESULTS [--tgt-len N --mem-len N --clamp-len N --same-length]" >&2
    exit 2
fi
checkpoint=$1 out=$2
shift 2
split=${SPLIT:-test} sizes=${BATCH_SIZES:-1..32} runtimes=${RUNTIMES:-pytorch,compiled} device=${DEVICE:-auto}
read -r -a more <<<"${BENCH:-}"

run() {
    printf '\n$'
    printf ' %q' "$@"
    printf '\n'
    "$@"
}

mkdir -p "$out"
artifacts=()
for name in torchscript onnx onnx-fp16; do
    dtype=fp32
    [ "$name" != onnx-fp16 ] || dtype=fp16
    run txl export --checkpoint "$checkpoint" --format "${name%-fp16}" --dtype $dtype --out "$out/$name" --overwrite "$@"
    run txl eval --artifact "$out/$name" --checkpoint "$checkpoint" --split "$split" --device "$device" --out "$out/eval-$name.json"
    run txl parity --checkpoint "$checkpoint" --artifact "$out/$name" --split "$split" --device "$device" --out "$out/parity-$name.json"
    artifacts+=(--artifact "$out/$name")
done
run txl eval --checkpoint "$checkpoint" --split "$split" --device "$device" --out "$out/eval-pytorch.json" "$@"

code=0
run txl bench --checkpoint "$checkpoint" "${artifacts[@]}" --runtimes "$runtimes" --split "$split" --batch-sizes "$sizes" \
    --device "$device" --max-duration 600 --out "$out/benchmark.json" "${more[@]}" || code=$?
[ "$code" -le 1 ] || exit "$code"
run txl report --work-dir "$out" --markdown "$out/report.md"
exit "$code"
