"""The defaults are the released recipe, and arguments that do not fit each other are refused in words."""

import pytest
import torch

from scfoundation_hf.trainer_scripts.training_args import ScFoundationTrainingArguments


def make(tmp_path, **arguments):
    return ScFoundationTrainingArguments(output_dir=str(tmp_path), **arguments)


def test_the_defaults_are_the_released_recipe(tmp_path):
    args = make(tmp_path)
    assert args.optim.value == "adamw_torch_fused"
    assert (args.learning_rate, args.weight_decay, args.warmup_steps, args.max_grad_norm) == (1e-4, 0, 9766, 1)
    assert args.bf16
    assert args.per_device_train_batch_size * args.gradient_accumulation_steps == 1024
    assert args.use_cpu is not torch.accelerator.is_available()


def test_accumulation_follows_from_the_effective_batch(tmp_path):
    assert make(tmp_path, per_device_train_batch_size=16).gradient_accumulation_steps == 64
    assert make(tmp_path, effective_batch_size=128).gradient_accumulation_steps == 1
    free = make(tmp_path, effective_batch_size=None, gradient_accumulation_steps=3, tokens_per_batch=1000)
    assert free.gradient_accumulation_steps == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"effective_batch_size": 100, "per_device_train_batch_size": 8}, "100 is not a multiple of .* 8 x 1 proc"),
        ({"effective_batch_size": 64}, "64 is not a multiple of per_device_train_batch_size 128"),
        ({"gradient_accumulation_steps": 3}, "3 x 128 cells a micro-batch do not make effective_batch_size 1024"),
        ({"tokens_per_batch": 9000}, "With tokens_per_batch 9000 the cells of a step vary"),
        ({"all_positions_from": 0.9}, "all_positions_from is 0.9, but without decoder_positions"),
        ({"feature_redraw_interval": -1}, "feature_redraw_interval is -1; it cannot be negative"),
        ({"ignore_data_skip": False}, "the corpus goes to its saved position by itself"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_arguments_that_do_not_fit(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        make(tmp_path, **arguments)


def test_positions_are_switched_at_a_step_or_a_share(tmp_path):
    args = make(tmp_path, max_steps=200, decoder_positions=512)
    assert args.decoder_positions_at(199) == 512
    args.all_positions_from = 0.9
    assert [args.decoder_positions_at(step) for step in (0, 179, 180)] == [512, 512, None]
    args.all_positions_from = 50
    assert [args.decoder_positions_at(step) for step in (49, 50)] == [512, None]


def test_the_arguments_survive_a_round_trip(tmp_path):
    args = make(tmp_path, masking="paper", decoder_positions=99, bf16=False)
    again = ScFoundationTrainingArguments(**{key: getattr(args, key) for key in args.to_dict() if key != "hub_token"})
    assert again.to_dict() == args.to_dict()
