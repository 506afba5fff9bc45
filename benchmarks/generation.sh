#!/usr/bin/env bash
# The samples of docs/generation.md: trains the demo's model and, where the folder of WikiText-2 (or -103) is given, a small one on that, and lets
# each go on with prompts by fixed seeds. Prints the commands with what they print, perplexity first. Some minutes on an idle core for the
# first, an hour for the second: benchmarks/generation.sh FOLDER [data/wikitext-2]
set -euo pipefail

folder=$1
data=${2:-}
mkdir -p "$folder"

show() {
    printf '$'
    printf ' %q' "$@"
    printf '\n'
    "$@" 2>/dev/null
    printf '\n'
}

samples() {
    show txl eval --checkpoint "$1" --split test
    for prompt in "${@:2}"; do
        show txl generate --checkpoint "$1" --prompt "$prompt" --max-tokens 60 --seed 1
        show txl generate --checkpoint "$1" --prompt "$prompt" --max-tokens 60 --seed 1 --top-p 0.9 --temperature 0.8
        show txl generate --checkpoint "$1" --prompt "$prompt" --max-tokens 60 --temperature 0
    done
}

[ -e "$folder/demo/checkpoint_best.pt" ] || txl train --config tiny --dataset pydoc --max-minutes none --work-dir "$folder/demo" >&2
samples "$folder/demo/checkpoint_best.pt" "The return value of a function" "When an exception is raised,"

if [ -n "$data" ]; then
    if [ ! -e "$folder/wikitext/checkpoint_best.pt" ]; then
        txl train --dataset wt103 --data "$data" --n-layer 4 --n-head 4 --d-head 48 --d-model 192 --d-inner 768 --adaptive --dropout 0.1 \
            --tgt-len 64 --mem-len 64 --batch-size 16 --eval-tgt-len 64 --lr-warmup-steps 200 --eta-min 0.0003 --max-step 6600 \
            --eval-interval 1100 --eval-batch-size 16 --work-dir "$folder/wikitext" >&2
    fi
    samples "$folder/wikitext/checkpoint_best.pt" "The game was released in" "In the summer of 1944, the"
fi
