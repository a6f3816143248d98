"""A small corpus of real cells: three sources, one of which repeats cells of another."""

from pathlib import Path

import anndata
import pytest

import scfoundation_hf.corpus.prepare as prepare_module
from scfoundation_hf.corpus.prepare import prepare


def write_sources(example_cells: Path, folder: Path) -> list[Path]:
    """a: 0..399 with donors; b: 300..599, of which 100 are in a too; c: 600..799 without the columns of the others."""
    cells = anndata.read_h5ad(example_cells)
    cells.obs["donor"] = [f"donor{i % 7}" for i in range(cells.n_obs)]
    paths = []
    for name, start, stop in (("a", 0, 400), ("b", 300, 600), ("c", 600, 800)):
        part = cells[start:stop].copy()
        if name == "c":
            part.obs = part.obs[[]]
        paths.append(folder / f"{name}.h5ad")
        part.write_h5ad(paths[-1])
    return paths


@pytest.fixture(scope="session")
def sources(example_cells: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_sources(example_cells, tmp_path_factory.mktemp("sources"))


@pytest.fixture(scope="session")
def corpus(sources: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared with row groups and shards so small that there are many."""
    folder = tmp_path_factory.mktemp("corpus") / "corpus"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare_module, "ROW_GROUP_ROWS", 16)
        patch.setattr(prepare_module, "ROWS_PER_SHARD", 64)
        prepare(
            sources,
            folder,
            gene_column="symbol",
            obs=["cell_type", "donor"],
            validation_share=0.1,
            progress=False,
        )
    return folder
