#!/usr/bin/env bash
# Makes examples/reference-model, from the cells to the card.
#
#     examples/make_reference_model.sh DATA WORK [OPTION ...]
#
# DATA holds the cell files named below (examples/reference-model/README.md lists them with their cells); WORK is a folder for corpora,
# the run and its results. Options go to `scfoundation pretrain`; the shipped model was made with --tf32 true
# --dataloader-num-workers 4. Killed, it goes on where it was when called again. Ten minutes of training on a GPU, a day on two CPU cores.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
data=$1
mkdir -p "$2"
work=$(cd "$2" && pwd)

# The doublets that the authors of the five-line mixture found are no cells.
python - "$data/single_cells_5batches.h5ad" "$work/single_cells_5batches.h5ad" <<'PYTHON'
import sys
import anndata
cells = anndata.read_h5ad(sys.argv[1])
cells[cells.obs["demuxlet_cls"] != "DBL"].copy().write_h5ad(sys.argv[2])
PYTHON

# Whole donors, lanes and batches are held out, and three files that no run sees: a tissue, a tumour and sorted blood cells.
obs=(--obs cell_type --obs tissue --obs donor)
prepare=("${obs[@]}" --validation-by donor --validation-by lane --validation-by batch --validation-share 0.16)
cd "$data"
training=()
for file in corpus/*.h5ad; do [[ $file == corpus/lung_nsclc* ]] || training+=("$file"); done
scfoundation prepare "${training[@]}" hao_pbmc.h5ad "$work/corpus" "${prepare[@]}"
(cd "$work" && scfoundation prepare single_cells_5batches.h5ad corpus "${prepare[@]}" --gene-column symbol)
scfoundation prepare zheng_facs_pbmc.h5ad "$work/unseen" "${obs[@]}" --obs Sample --validation-share 1 --gene-column symbol
scfoundation prepare baron_pancreas.h5ad corpus/lung_nsclc_immune_scgate.h5ad "$work/unseen" "${obs[@]}" --obs Sample --validation-share 1

cd "$work"
scfoundation pretrain "$here/pretrain-reference-model.yaml" --corpus corpus --output-dir reference-model "${@:3}"
scfoundation benchmark pretraining corpus results --model reference-model --run reference-model --recipe released --overwrite
python -m scfoundation_hf.trainer_scripts.model_card reference-model --results results/results.json > /dev/null
mkdir -p "$here/reference-model"
find reference-model -maxdepth 1 -type f ! -name pretraining_settings.json -exec cp {} "$here/reference-model/" \;
cp "$here/reference-model/README.md" "$here/../model_card.md"
