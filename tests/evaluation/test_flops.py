"""The cost formulas give the published table of the 100M model, and count what a batch holds."""

import numpy as np
import pytest
import torch

from scfoundation_hf.configuration.configuration_scfoundation import ScFoundationConfig
from scfoundation_hf.evaluation.flops import (
    batch_training_flops,
    decoder_flops,
    encoder_flops,
    tokens_per_cell,
    training_step_flops,
)

RELEASED = ScFoundationConfig.from_preset("100m")
# GFLOP a cell: genes, embed, enhance plain / reduced, training step plain / reduced. A table of the 100M model that was
# worked out independently of this code.
COSTS = {
    500: (95, 967, 904, 2811, 2300),
    2000: (488, 1361, 1303, 3551, 3058),
    5000: (1773, 2646, 2598, 5761, 5305),
}


@pytest.mark.parametrize("num_genes", COSTS, ids=str)
def test_costs_of_the_100m_model(num_genes):
    embed, enhance, reduced_enhance, training, reduced_training = (1e9 * cost for cost in COSTS[num_genes])
    num_zeros = RELEASED.num_genes - num_genes
    num_targets = round(0.3 * num_genes + 0.03 * num_zeros)
    visible = {"num_genes": round(0.7 * num_genes), "num_masked": num_targets, "num_targets": num_targets}
    encoder = encoder_flops(RELEASED, num_genes)
    assert encoder == pytest.approx(embed, rel=4e-3)  # the table has two digits
    assert encoder + decoder_flops(RELEASED) == pytest.approx(enhance, rel=5e-4)
    assert encoder + decoder_flops(RELEASED, num_zeros=num_zeros) == pytest.approx(reduced_enhance, rel=5e-4)
    assert training_step_flops(RELEASED, **visible, algebra="plain") == pytest.approx(training, rel=5e-4)
    assert training_step_flops(RELEASED, **visible) == pytest.approx(reduced_training, rel=3e-3)


def test_lengths_of_32_bits_do_not_overflow():
    lengths = np.array([500, 19_264], dtype=np.int32)
    assert encoder_flops(RELEASED, lengths).tolist() == [encoder_flops(RELEASED, int(length)) for length in lengths]
    zeros = RELEASED.num_genes - lengths
    decoder = decoder_flops(RELEASED, num_zeros=zeros, num_targets=lengths)
    pairs = zip(zeros, lengths, strict=True)
    assert decoder.tolist() == [decoder_flops(RELEASED, num_zeros=int(z), num_targets=int(n)) for z, n in pairs]
    assert (decoder > 0).all()


def test_fewer_positions_zeros_and_targets_cost_less():
    everything = decoder_flops(RELEASED)
    assert decoder_flops(RELEASED, num_positions=RELEASED.num_positions, num_targets=None) == everything
    half = RELEASED.num_positions // 2
    assert decoder_flops(RELEASED, num_positions=half) == pytest.approx(everything / 2)
    assert 0 < decoder_flops(RELEASED, num_targets=0) < decoder_flops(RELEASED, num_targets=10) < everything
    assert decoder_flops(RELEASED, num_zeros=10_000) < everything


def test_a_batch_is_the_sum_of_its_cells_in_both_layouts():
    config = ScFoundationConfig(num_genes=100)
    pad = config.pad_token_id
    shared = {
        "masked_ids": torch.tensor([[1, 2, 3], [4, pad, pad]]),
        "labels": torch.tensor([[0.5, 0.0, 1.0, 2.0], [1.0, 0.0, -100.0, -100.0]]),
    }
    padded = shared | {"attention_mask": torch.tensor([[1] * 12, [1] * 7 + [0] * 5])}
    packed = shared | {"cu_seq_lens_q": torch.tensor([0, 12, 19], dtype=torch.int32)}
    cells = [
        training_step_flops(config, num_genes=10, num_masked=3, num_targets=4),
        training_step_flops(config, num_genes=5, num_masked=1, num_targets=2),
    ]
    assert batch_training_flops(config, padded) == batch_training_flops(config, packed) == pytest.approx(sum(cells))
    np.testing.assert_array_equal(tokens_per_cell(padded), [12, 7])
    shown = packed | {"decoder_ids": torch.zeros(2, 40, dtype=torch.int64)}
    assert batch_training_flops(config, shown) < batch_training_flops(config, packed)
