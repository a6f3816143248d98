"""Random features are redrawn on schedule, from (seed, step, layer) alone."""

import pytest
import torch
from transformers import TrainerControl, TrainerState, TrainingArguments

from scfoundation_hf.modeling_scfoundation.modeling_scfoundation import ScFoundationForPreTraining
from scfoundation_hf.trainer_scripts.callbacks import RandomFeatureRedraw, redraw_random_features


@pytest.fixture
def model(tiny_config):
    return ScFoundationForPreTraining(tiny_config)


def features(model):
    return [buffer.clone() for name, buffer in model.named_buffers() if name.endswith("projection")]


def test_features_depend_on_seed_step_and_layer_alone(model):
    global_state = torch.get_rng_state()
    redraw_random_features(model, seed=1, step=1000)
    first = features(model)
    assert torch.equal(torch.get_rng_state(), global_state)
    redraw_random_features(model, seed=1, step=2000)
    later = features(model)
    redraw_random_features(model, seed=2, step=1000)
    other_seed = features(model)
    redraw_random_features(model, seed=1, step=1000)
    torch.testing.assert_close(features(model), first, rtol=0, atol=0)
    drawn = [*first, *later, *other_seed]
    assert len(drawn) == 6
    assert not any(torch.equal(a, b) for i, a in enumerate(drawn) for b in drawn[:i])


@pytest.mark.parametrize(("interval", "redrawn_at"), [(3, [3, 6, 9]), (0, [])], ids=["every-3", "never"])
def test_the_schedule(model, tmp_path, interval, redrawn_at):
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    callback, changed = RandomFeatureRedraw(interval=interval, seed=0), []
    for step in range(10):
        before = features(model)
        callback.on_step_begin(args, TrainerState(global_step=step), TrainerControl(), model=model)
        if not torch.equal(before[0], features(model)[0]):
            changed.append(step)
    assert changed == redrawn_at
