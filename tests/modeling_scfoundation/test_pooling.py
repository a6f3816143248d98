import pytest
import torch

from scfoundation_hf.modeling_scfoundation.pooling import max_of_pooled, pool_cells, pool_packed_cells

LENGTHS = [5, 3, 8]  # tokens, T and S included
WIDTH = 6


@pytest.fixture
def tokens() -> list[torch.Tensor]:
    """Below zero, so that a pool over padding of zeros would show in the max."""
    torch.manual_seed(0)
    return [torch.rand(length, WIDTH) - 2 for length in LENGTHS]


@pytest.fixture
def expected(tokens: list[torch.Tensor]) -> torch.Tensor:
    rows = [torch.cat([cell[-1], cell[-2], cell[:-2].amax(0), cell[:-2].mean(0)]) for cell in tokens]
    return torch.stack(rows)


@pytest.mark.parametrize("side", ["right", "left"])
def test_padded_cells_are_pooled_through_the_mask(tokens, expected, side):
    states = torch.full((3, 10, WIDTH), 99.0)
    mask = torch.zeros(3, 10, dtype=torch.long)
    for row, cell in enumerate(tokens):
        place = slice(0, len(cell)) if side == "right" else slice(10 - len(cell), 10)
        states[row, place], mask[row, place] = cell, 1
    torch.testing.assert_close(pool_cells(states, mask), expected)
    torch.testing.assert_close(pool_cells(states, mask, mode="max"), torch.stack([cell.amax(0) for cell in tokens]))


def test_packed_cells(tokens, expected):
    borders = torch.tensor([0, 5, 8, 16], dtype=torch.int32)
    states = torch.cat(tokens)[None]
    torch.testing.assert_close(pool_packed_cells(states, borders), expected)
    torch.testing.assert_close(
        pool_packed_cells(states, borders, mode="max"), torch.stack([cell.amax(0) for cell in tokens])
    )


def test_max_of_pooled(tokens, expected):
    torch.testing.assert_close(max_of_pooled(expected), torch.stack([cell.amax(0) for cell in tokens]))


def test_both_layouts_have_the_same_gradient(tokens):
    padded = torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True).requires_grad_()
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones(n) for n in LENGTHS], batch_first=True)
    packed = torch.cat(tokens)[None].requires_grad_()
    weights = torch.rand(3, 4 * WIDTH)
    (pool_cells(padded, mask) * weights).sum().backward()
    (pool_packed_cells(packed, torch.tensor([0, 5, 8, 16])) * weights).sum().backward()
    torch.testing.assert_close(padded.grad[mask.bool()], packed.grad[0])
    assert not padded.grad[~mask.bool()].any()


def test_mean_of_many_genes_is_taken_in_float32():
    states = torch.ones(1, 4002, 2, dtype=torch.bfloat16)  # a bfloat16 sum stops growing at 256
    assert torch.equal(pool_cells(states, torch.ones(1, 4002))[:, -2:], torch.ones(1, 2, dtype=torch.bfloat16))
    packed = pool_packed_cells(states, torch.tensor([0, 4002]))
    assert torch.equal(packed[:, -2:], torch.ones(1, 2, dtype=torch.bfloat16))


def test_a_cell_without_genes_is_named():
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    with pytest.raises(ValueError, match="Cell 1 of the batch has no expressed gene"):
        pool_cells(torch.rand(2, 4, WIDTH), mask)
    with pytest.raises(ValueError, match="Cell 0 of the batch has no expressed gene"):
        pool_packed_cells(torch.rand(1, 5, WIDTH), torch.tensor([0, 2, 5]))


def test_unknown_mode_is_named():
    with pytest.raises(ValueError, match="no pooling mode 'mean'; choose 'all' or 'max'"):
        pool_cells(torch.rand(1, 4, WIDTH), torch.ones(1, 4), mode="mean")
    with pytest.raises(ValueError, match="no pooling mode 'mean'"):
        pool_packed_cells(torch.rand(1, 4, WIDTH), torch.tensor([0, 4]), mode="mean")
