import pytest
import torch

from scfoundation_hf.modeling_scfoundation.losses import IGNORED_LABEL, masked_mean_squared_error


def test_mean_over_valid_targets():
    predicted = torch.tensor([[1.0, 2.0, 9.0], [0.0, 9.0, 9.0]])
    labels = torch.tensor([[0.0, 4.0, IGNORED_LABEL], [3.0, IGNORED_LABEL, IGNORED_LABEL]])
    assert masked_mean_squared_error(predicted, labels).item() == pytest.approx((1 + 4 + 9) / 3)


@pytest.mark.parametrize("number", [6, torch.tensor(6)], ids=["int", "tensor"])
def test_divided_by_the_items_of_the_whole_batch(number: int | torch.Tensor):
    loss = masked_mean_squared_error(torch.zeros(1, 2), torch.tensor([[3.0, 1.0]]), num_items_in_batch=number)
    assert loss.item() == pytest.approx(10 / 6)


def test_parts_of_a_batch_add_up_to_the_whole():
    torch.manual_seed(0)
    predicted, labels = torch.rand(4, 5), torch.rand(4, 5)
    labels[0, 2:] = IGNORED_LABEL
    number = int((labels != IGNORED_LABEL).sum())
    parts = [
        masked_mean_squared_error(predicted[i : i + 1], labels[i : i + 1], num_items_in_batch=number) for i in range(4)
    ]
    torch.testing.assert_close(sum(parts), masked_mean_squared_error(predicted, labels))


def test_no_valid_target_gives_zero_and_no_gradient():
    predicted = torch.rand(2, 3, requires_grad=True)
    loss = masked_mean_squared_error(predicted, torch.full((2, 3), float(IGNORED_LABEL)))
    loss.backward()
    assert loss.item() == 0
    assert not predicted.grad.any()


def test_half_precision_predictions_are_compared_in_float32():
    labels = torch.tensor([[1.001]])
    loss = masked_mean_squared_error(torch.ones(1, 1, dtype=torch.bfloat16), labels)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(1e-6, rel=1e-3)


def test_shapes_must_agree():
    with pytest.raises(ValueError, match=r"labels have shape \(2, 3\), predictions \(2, 4\); pass target_ids"):
        masked_mean_squared_error(torch.zeros(2, 4), torch.zeros(2, 3))
