#!/usr/bin/env bash
# Makes the tables and the figure of docs/scaling.md: three sizes on the same cells, and the reference model.
#
#     examples/make_scaling_figure.sh WORK [OPTION ...]
#
# WORK is the folder of examples/make_reference_model.sh, with its corpus and its run. Killed, it goes on where it was when called
# again. Options go to `scfoundation pretrain`. Minutes of training on a GPU, a day on two CPU cores.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
cd "$1"
for size in 1m 3m 10m; do
    scfoundation pretrain "$here/pretrain-scale-$size.yaml" --corpus corpus --output-dir "scale-$size" "${@:2}"
done
runs=()
for name in scale-1m scale-3m reference-model scale-10m; do runs+=(--model "$name" --run "$name"); done
scfoundation benchmark pretraining corpus scaling "${runs[@]}" --recipe released --overwrite
cp scaling/results.json scaling/tables.md scaling/scaling.svg "$here/../docs/benchmarks/pretraining/"
