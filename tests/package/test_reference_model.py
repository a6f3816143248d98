"""The model that the repository ships is what its card says."""

from pathlib import Path

import anndata
import numpy as np
import pytest
import torch

import scfoundation_hf
from scfoundation_hf.doctor import diagnose
from scfoundation_hf.modeling_scfoundation.losses import IGNORED_LABEL
from scfoundation_hf.trainer_scripts.model_card import card_of_folder

MOST_BYTES = 16 * 2**20


@pytest.fixture(scope="module")
def folder(repository: Path) -> Path:
    return repository / "examples" / "reference-model"


def test_its_card_is_generated_and_is_the_card_of_the_repository(folder, repository):
    card = card_of_folder(folder).content
    assert (folder / "README.md").read_text(encoding="utf-8") == card
    assert (repository / "model_card.md").read_text(encoding="utf-8") == card


def test_the_doctor_passes_it(folder):
    findings = [finding for finding in diagnose(str(folder)) if finding.section == "Model"]
    assert findings
    assert all(finding.passed is not False for finding in findings), findings
    assert any(finding.name == "SHA-256" and finding.passed for finding in findings)


def test_it_is_small(folder):
    assert sum(file.stat().st_size for file in folder.iterdir()) <= MOST_BYTES


def test_it_predicts_hidden_genes_of_cells_it_has_not_seen(folder, example_cells):
    """Better than the mean of these very targets, and than the same network with random weights."""
    assert scfoundation_hf.lookup(folder, example_cells, gene_column="symbol").num_found == 0
    tokenizer = scfoundation_hf.ScFoundationTokenizer.from_pretrained(folder)
    cells = anndata.read_h5ad(example_cells)[::50]
    counts, _ = scfoundation_hf.GeneVocabulary.default().align(cells.X, cells.var["symbol"])
    collate = scfoundation_hf.ScFoundationReadDepthAwareCollator(tokenizer, seed=0)
    batch = collate(scfoundation_hf.RawCells.from_csr(counts, cell_ids=np.arange(cells.n_obs)))
    labels = batch.pop("labels")
    is_target = labels != IGNORED_LABEL

    def error(model: torch.nn.Module) -> float:
        with torch.inference_mode():
            return float((model.eval()(**batch).predicted_values - labels)[is_target].square().mean())

    trained = scfoundation_hf.ScFoundationForPreTraining.from_pretrained(folder)
    torch.manual_seed(0)
    random = scfoundation_hf.ScFoundationForPreTraining(trained.config)
    assert error(trained) < 0.5 * float(labels[is_target].var())
    assert error(trained) < 0.5 * error(random)
