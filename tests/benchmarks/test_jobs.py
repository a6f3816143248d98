"""Every job runs, ours and the baseline's, and gives the same numbers: only then is a ratio of times one."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from harness.cells import CountedCells, read_cells
from harness.checkout import CheckoutModel, is_expressible
from harness.fast_paths import FAST_PATHS
from harness.jobs import (
    AS_SHIPPED,
    DTYPES,
    JOBS,
    Case,
    JobName,
    Variant,
    build_model,
    build_optimizer,
    cells_per_call,
    flops_per_cell,
    least_bytes_per_cell,
    make_call,
    used_parameters,
    variants,
)
from harness.studies import OURS

from scfoundation_hf.configuration.configuration_scfoundation import ScFoundationConfig
from scfoundation_hf.modeling_scfoundation.modeling_scfoundation import ScFoundationForPreTraining

CPU = torch.device("cpu")
TOLERANCE = {"float32": 1e-5, "bfloat16": 0.1}  # of values around 1


def compute(case: Case, variant: Variant) -> torch.Tensor:
    model = build_model(case, variant, CPU)
    return make_call(model, build_optimizer(model, case, variant), case, variant, CPU)()


@pytest.mark.parametrize("job", JOBS)
def test_all_variants_give_the_same_numbers(make_case: Callable[..., Case], job: JobName):
    case = make_case(job)
    expected = compute(case, AS_SHIPPED)
    for variant in variants(DTYPES, checkpointing=job == "train"):
        found = compute(case, variant).float()
        torch.testing.assert_close(found, expected, atol=TOLERANCE[variant.dtype], rtol=0, msg=variant.name)


def test_ours_trains_without_dropout_on_attention_weights(make_case):
    """As the baseline with SDPA does; the case keeps its configuration."""
    case = make_case("train")
    case.config.attention_probs_dropout_prob = 0.1
    assert build_model(case, OURS, CPU).config.attention_probs_dropout_prob == 0
    assert case.config.attention_probs_dropout_prob == 0.1


def test_checkpointing_holds_for_the_variant_that_asks_for_it(make_case):
    """Variants share a model, so each call switches it."""
    case = make_case("train")
    model = build_model(case, OURS, CPU)
    recomputing = replace(OURS, checkpointing=True)
    for variant in (recomputing, OURS, recomputing):
        make_call(model, build_optimizer(model, case, variant), case, variant, CPU)()
        assert all(layer.gradient_checkpointing == variant.checkpointing for layer in model.decoder.layers)


@pytest.mark.parametrize("variant", variants(DTYPES, checkpointing=True), ids=lambda variant: variant.name)
def test_a_training_step_changes_the_weights_and_the_state_before_it_does_not(make_case, variant: Variant):
    case = make_case("train", num_cells=1, original_cells=1)
    model = build_model(case, variant, CPU)
    before = [parameter.clone() for parameter in model.parameters()]
    optimizer = build_optimizer(model, case, variant)
    assert len(optimizer.state) == len(before)
    assert all(torch.equal(new, old) for new, old in zip(model.parameters(), before, strict=True))
    call = make_call(model, optimizer, case, variant, CPU)
    first, second = call(), call()
    moved = [not torch.equal(new, old) for new, old in zip(model.parameters(), before, strict=True)]
    assert sum(moved) >= len(before) - 2  # key biases may get no gradient
    assert second < first


def test_the_cells_of_a_case_are_hidden_in_training_only(make_case):
    assert "masked_ids" not in make_case("enhance").batch(2)
    case = make_case("train")
    batch = case.batch(2)
    num_targets, num_masked = (
        batch[key].ne(case.config.pad_token_id).sum(dim=1) for key in ("target_ids", "masked_ids")
    )
    expected = 0.3 * 300 + 0.03 * (case.config.num_genes - 300)
    assert num_targets.tolist() == pytest.approx([expected] * 2, rel=0.1)
    assert num_masked.tolist() == pytest.approx([0.8 * expected] * 2, rel=0.1)
    assert batch["labels"].shape == batch["target_ids"].shape


FACTS = {  # GFLOP a cell of the 100M model: plain and reduced, shared/reference/facts.md
    ("embed", 500): (95, 95),
    ("enhance", 500): (967, 904),
    ("enhance", 2_000): (1_361, 1_303),
    ("train", 500): (2_811, 2_300),
    ("train", 2_000): (3_551, 3_058),
}


@pytest.mark.parametrize(("job", "num_genes"), FACTS, ids=[f"{job}-{genes}" for job, genes in FACTS])
def test_operations_are_those_of_the_published_estimate(real_cells: CountedCells, job: JobName, num_genes: int):
    cells = real_cells.near(num_genes, num_cells=1)
    case = Case("100m", ScFoundationConfig(), job, num_genes, cells, 1)
    plain, reduced = FACTS[job, num_genes]
    # The estimate of training has 30 % of the genes hidden; the collator also shows some hidden ones, changed.
    tolerance = 0.08 if job == "train" else 0.04
    assert flops_per_cell(case, algebra="plain") / 1e9 == pytest.approx(plain, rel=tolerance)
    assert flops_per_cell(case, algebra="reduced") / 1e9 == pytest.approx(reduced, rel=tolerance)


def test_bytes_are_the_weights_a_call_and_the_results(make_case):
    one, two = make_case("enhance", num_cells=1), make_case("enhance", num_cells=2)
    num_parameters = used_parameters(one)
    assert num_parameters == ScFoundationForPreTraining(one.config).num_parameters()
    results = 4 * one.config.num_genes
    for case, cells in ((one, 1), (two, 2)):
        found = least_bytes_per_cell(case, num_parameters=num_parameters, dtype="float32")
        assert found == 4 * num_parameters / cells + results


def test_calls_take_as_many_cells_as_our_jobs_do():
    assert cells_per_call("train", num_genes=500, device=CPU, batch_size=8) == 8
    assert cells_per_call("embed", num_genes=500, device=CPU, batch_size=8) == 4  # of 2,048 tokens
    assert cells_per_call("embed", num_genes=20_000, device=CPU, batch_size=8) == 1
    assert cells_per_call("embed", num_genes=500, device=torch.device("cuda"), batch_size=8) == 64


# --- Fast paths ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", FAST_PATHS, ids=lambda path: path.name)
def test_a_path_switched_off_changes_the_way_and_not_the_numbers(make_case, path):
    for job in path.jobs:
        case = make_case(job)
        if path.is_random:
            case = replace(case, config=copy.deepcopy(case.config))
            case.config.hidden_dropout_prob = 0.1
        model = build_model(case, OURS, CPU)

        def kernels(case: Case = case, model: torch.nn.Module = model, job: JobName = job) -> tuple[torch.Tensor, list]:
            if job == "train":  # the loss alone: a step would change the weights
                batch = case.batch(2)
                with torch.profiler.profile() as profile:
                    result = model(**batch).loss
            else:
                call = make_call(model, None, case, OURS, CPU)
                with torch.profiler.profile() as profile:
                    result = call()
            return result, sorted((event.key, event.count) for event in profile.key_averages())

        expected, with_path = kernels()
        with path.switched_off(model):
            found, without_path = kernels()
        assert with_path != without_path, job
        torch.testing.assert_close(found, expected, atol=0.1 if path.is_random else 1e-5, rtol=0)
        assert kernels()[1] == with_path, "the path is not on again"


# --- Cells ---------------------------------------------------------------------------------------------------------


def test_cells_near_a_number_of_genes(real_cells: CountedCells):
    assert real_cells.near(500, num_cells=4).num_expressed.tolist() == pytest.approx([500] * 4, rel=0.05)
    assert real_cells.near(2_000, num_cells=40).counts.shape[0] == 40  # a few long cells, repeated
    with pytest.raises(
        ValueError, match=r"No cell in zheng_facs_pbmc_cut.h5ad has about 9,000 expressed genes; the near"
    ):
        real_cells.near(9_000, num_cells=1)


def test_mixed_cells_are_drawn_again_alike(real_cells: CountedCells):
    lengths = real_cells.mixed(50).num_expressed
    assert len(np.unique(lengths)) > 25
    assert np.array_equal(lengths, real_cells.mixed(50).num_expressed)


def test_files_that_are_not_there(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"no.h5ad is no .h5ad file and no folder with .h5ad files"):
        read_cells([tmp_path / "no.h5ad"])
    with pytest.raises(FileNotFoundError, match="no folder with"):
        read_cells([tmp_path])


def test_files_with_variable_genes_only_are_left_out(shared_data: Path):
    with pytest.raises(ValueError, match=r"None of .*papalexi_thp1.h5ad holds a quarter of the vocabulary's genes"):
        read_cells([shared_data / "papalexi_thp1.h5ad"])


# --- A checkout of the original ------------------------------------------------------------------------------------


def test_a_folder_that_is_no_checkout(harness_config: ScFoundationConfig, tmp_path: Path):
    model = ScFoundationForPreTraining(harness_config)
    with pytest.raises(FileNotFoundError, match=r"is no checkout of the original: it has no model/pretrainmodels"):
        CheckoutModel(model, tmp_path)


def test_a_checkout_whose_dependencies_are_missing(harness_config: ScFoundationConfig, tmp_path: Path):
    package = tmp_path / "model" / "pretrainmodels"
    package.mkdir(parents=True)
    (package / "select_model.py").touch()
    (package / "__init__.py").write_text("import a_package_that_nobody_has\n")
    with pytest.raises(
        ImportError, match=r"needs a_package_that_nobody_has, which is not installed: pip install einops"
    ):
        CheckoutModel(ScFoundationForPreTraining(harness_config), tmp_path)


def test_which_models_the_originals_code_can_build(harness_config: ScFoundationConfig, tiny_config: ScFoundationConfig):
    assert is_expressible(ScFoundationConfig())
    assert is_expressible(harness_config)
    assert not is_expressible(tiny_config)  # feed-forwards twice as wide
