"""Cell types by transformers' pipeline: the model's own answers, one a cell, in order."""

import anndata
import pytest
import torch
from scipy.sparse import csr_matrix
from transformers import AutoModelForSequenceClassification, pipeline

from scfoundation_hf import ScFoundationConfig, ScFoundationTokenizer
from scfoundation_hf.inference import annotation_pipeline
from scfoundation_hf.inference.annotation_pipeline import CellAnnotationPipeline
from scfoundation_hf.modeling_scfoundation.modeling_scfoundation import ScFoundationForCellClassification

TYPES = ["B cell", "monocyte", "T cell"]


@pytest.fixture(scope="module")
def model_dir(tiny_config, tmp_path_factory):
    AutoModelForSequenceClassification.register(ScFoundationConfig, ScFoundationForCellClassification, exist_ok=True)
    config = ScFoundationConfig(**{**tiny_config.to_dict(), "id2label": dict(enumerate(TYPES))})
    torch.manual_seed(0)
    model = ScFoundationForCellClassification(config).eval()
    folder = tmp_path_factory.mktemp("classifier")
    model.save_pretrained(folder)
    ScFoundationTokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def annotator(model_dir):
    return pipeline("cell-annotation", model=str(model_dir), device="cpu")


@pytest.fixture(scope="module")
def cells(example_cells) -> anndata.AnnData:
    return anndata.read_h5ad(example_cells)[::80].copy()


def test_it_says_what_the_model_says(annotator, cells, monkeypatch):
    assert type(annotator) is CellAnnotationPipeline
    with torch.inference_mode():
        logits = annotator.model(**annotator.tokenizer(cells, gene_column="symbol")).logits
    expected = logits.softmax(dim=-1)
    for entries in (annotation_pipeline.ENTRIES_PER_BATCH, 700):  # in one batch, and in several
        monkeypatch.setattr(annotation_pipeline, "ENTRIES_PER_BATCH", entries)
        results = annotator(cells, gene_column="symbol")
        assert [result["label"] for result in results] == [TYPES[number] for number in expected.argmax(dim=-1)]
        scores = torch.tensor([result["score"] for result in results])
        torch.testing.assert_close(scores, expected.amax(dim=-1), rtol=0, atol=1e-6)


def test_the_best_types_of_each_cell(annotator, cells):
    results = annotator(cells, gene_column="symbol", top_k=2)
    assert len(results) == cells.n_obs
    for ranked in results:
        assert [len(ranked), ranked[0]["score"] >= ranked[1]["score"]] == [2, True]


def test_matrices_and_several_inputs(annotator, cells):
    one = annotator(cells.X, gene_names=cells.var["symbol"])
    assert one == annotator(cells, gene_column="symbol")
    several = annotator([cells, cells[:3].copy()], gene_column="symbol")
    assert [len(results) for results in several] == [cells.n_obs, 3]
    assert several[0] == one


def test_cells_that_are_left_out_keep_their_place(annotator, cells):
    counts = cells.X.tolil()
    counts[1] = 0
    with_empty = cells.copy()
    with_empty.X = csr_matrix(counts)
    results = annotator(with_empty, gene_column="symbol", on_empty_cell="nan")
    assert [result is None for result in results] == [row == 1 for row in range(cells.n_obs)]


def test_top_k_is_checked(annotator, cells):
    with pytest.raises(ValueError, match="top_k is 0; it must be at least 1"):
        annotator(cells, gene_column="symbol", top_k=0)
