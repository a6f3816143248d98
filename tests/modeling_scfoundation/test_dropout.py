"""Dropout: the share it drops, what it does to what is left, and that it can be drawn again."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from scfoundation_hf.modeling_scfoundation.dropout import ENTRIES_AT_ONCE, LEVELS, ScFoundationDropout

SHAPE = (3, 5, 70_001)  # several blocks, the last of them no multiple of four
NUM_ENTRIES = 3 * 5 * 70_001
# Two-sided, 1 in 10,000 for each comparison: a false alarm is as good as impossible with a fixed seed.
STANDARD_ERRORS = 3.9


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("probability", [0.01, 0.1, 0.5, 0.9])
def test_the_share_dropped_is_the_probability(probability):
    factors = ScFoundationDropout(probability)(torch.ones(SHAPE))
    error = (probability * (1 - probability) / NUM_ENTRIES) ** 0.5
    assert factors.eq(0).float().mean().item() == pytest.approx(probability, abs=STANDARD_ERRORS * error)
    kept = factors[factors.ne(0)].unique()
    assert kept.tolist() == pytest.approx([1 / (1 - probability)], rel=1e-4)
    assert NUM_ENTRIES > 4 * ENTRIES_AT_ONCE


def test_the_expected_output_is_the_input():
    """To the dtype's rounding: the factor belongs to the rounded probability."""
    num_dropped = round(0.1 * LEVELS)
    kept = ScFoundationDropout(0.1)(torch.ones(1_000)).max().item()
    assert kept * (1 - num_dropped / LEVELS) == pytest.approx(1, rel=1e-7)


@pytest.mark.parametrize("distance", [1, 2, 3, 4, ENTRIES_AT_ONCE])
def test_entries_are_dropped_independently(distance):
    """Four neighbours come from one random number, and blocks from one buffer."""
    dropped = ScFoundationDropout(0.1)(torch.ones(NUM_ENTRIES)).eq(0).double() - 0.1
    pairs = dropped[:-distance] * dropped[distance:]
    correlation = pairs.mean().item() / (0.1 * 0.9)
    assert abs(correlation) < STANDARD_ERRORS / len(pairs) ** 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_entries_are_kept_or_dropped_in_every_dtype_and_layout(dtype):
    states = torch.randn(40, 60, dtype=dtype).T  # its rows lie apart in memory
    dropped = ScFoundationDropout(0.5)(states)
    assert dropped.dtype == dtype
    assert torch.equal(dropped[dropped != 0], 2 * states[dropped != 0])
    assert ScFoundationDropout(0.5)(states[:0]).shape == (0, 40)


def test_the_gradient_passes_where_the_state_does():
    states = torch.randn(100, 30, requires_grad=True)
    dropped = ScFoundationDropout(0.25)(states)
    dropped.sum().backward()
    torch.testing.assert_close(states.grad, (dropped / states).detach())


def test_a_seed_and_a_checkpoint_draw_the_same_again():
    dropout, states = ScFoundationDropout(0.3), torch.randn(100, 30, requires_grad=True)
    torch.manual_seed(3)
    first, second = dropout(states), dropout(states)
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    assert torch.equal(dropout(states), first)

    (kept,) = torch.autograd.grad(first.square().sum(), states)
    torch.manual_seed(3)
    again = checkpoint(lambda states: dropout(states).square().sum(), states, use_reentrant=False)
    dropout(states)  # the checkpoint must not go on from here
    assert torch.equal(torch.autograd.grad(again, states)[0], kept)


@pytest.mark.parametrize("probability", [0.0, 1e-6, 1.0])
def test_what_cannot_be_rounded_is_left_to_torch(probability):
    states = torch.randn(200)
    torch.manual_seed(1)
    found = ScFoundationDropout(probability)(states)
    torch.manual_seed(1)
    assert torch.equal(found, nn.Dropout(probability)(states))


def test_evaluation_leaves_states_alone():
    states = torch.randn(200)
    assert ScFoundationDropout(0.5).eval()(states) is states
