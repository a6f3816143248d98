"""Cut the example cells out of the full file: the command that made `zheng_facs_pbmc_cut.h5ad`.

python examples/data/make_example_data.py path/to/zheng_facs_pbmc.h5ad
"""

import argparse
from pathlib import Path

import anndata
import numpy as np

CELLS_PER_TYPE = 80
SEED = 0


def cut(source: Path, target: Path) -> anndata.AnnData:
    """Draw the same number of cells of each type, keep every gene that any of them expresses."""
    cells = anndata.read_h5ad(source)
    drawn = np.concatenate(
        [
            np.random.default_rng(SEED).choice(rows, CELLS_PER_TYPE, replace=False)
            for _, rows in sorted(cells.obs.groupby("cell_type", observed=True).indices.items())
        ]
    )
    chosen = cells[np.sort(drawn)].copy()
    chosen = chosen[:, np.asarray(chosen.X.sum(axis=0)).ravel() > 0].copy()
    chosen.X = chosen.X.astype(np.int32)
    chosen.X.sort_indices()
    chosen.write_h5ad(target, compression="gzip", compression_opts=9)
    return chosen


def main() -> None:
    """Make the cut beside this script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    target = Path(__file__).with_name("zheng_facs_pbmc_cut.h5ad")
    print(cut(parser.parse_args().source, target), target.stat().st_size)


if __name__ == "__main__":
    main()
