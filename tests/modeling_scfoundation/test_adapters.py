"""LoRA adapters of peft on our models: trained, saved apart from the weights, loaded again, merged."""

import pytest
import torch
from transformers import AutoModelForPreTraining

import scfoundation_hf
from scfoundation_hf import hub

peft = pytest.importorskip("peft")
# peft 0.21 asks transformers 5.23 in its old words
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
LORA = {
    "r": 2,
    "target_modules": ["q_proj", "v_proj"],
    "init_lora_weights": False,
}  # drawn, so that they change numbers


@pytest.fixture
def model(tiny_model_dir) -> scfoundation_hf.ScFoundationForPreTraining:
    return AutoModelForPreTraining.from_pretrained(tiny_model_dir).eval()


@pytest.fixture
def batch(tiny_config) -> dict[str, torch.Tensor]:
    depths = [tiny_config.target_depth_token_id, tiny_config.source_depth_token_id]
    return {
        "input_ids": torch.tensor([[0, 1, 2, *depths]]),
        "values": torch.linspace(0.5, 3, 5)[None],
        "target_ids": torch.tensor([[3, 4]]),
    }


def predict(model, batch) -> torch.Tensor:
    with torch.inference_mode():
        return model(**batch).predicted_values


def test_only_the_adapter_is_trained(model, batch):
    adapted = peft.get_peft_model(model, peft.LoraConfig(**LORA))
    adapted(**batch, labels=torch.ones(1, 2)).loss.backward()
    trained = [name for name, parameter in adapted.named_parameters() if parameter.grad is not None]
    assert trained
    assert all("lora_" in name for name in trained)
    # encoder and decoder bear the same names
    assert {part for name in trained for part in ("encoder", "decoder") if f".{part}.layers" in name} == {
        "encoder",
        "decoder",
    }


def test_an_adapter_is_saved_apart_and_loaded_onto_its_model(model, batch, tmp_path):
    plain = predict(model, batch)
    adapted = peft.get_peft_model(model, peft.LoraConfig(**LORA))
    expected = predict(adapted, batch)
    assert not torch.allclose(expected, plain)
    adapted.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    loaded = AutoModelForPreTraining.from_pretrained(tmp_path / "adapter").eval()  # finds its base model by itself
    torch.testing.assert_close(predict(loaded, batch), expected)


def test_transformers_own_way_to_add_an_adapter(model, batch, tmp_path):
    model.add_adapter(peft.LoraConfig(**LORA))
    expected = predict(model, batch)
    model.save_pretrained(tmp_path / "adapter")
    assert "adapter_model.safetensors" in (tmp_path / "adapter" / "SHA256SUMS").read_text()
    base = AutoModelForPreTraining.from_pretrained(model.config._name_or_path).eval()
    base.load_adapter(tmp_path / "adapter")
    torch.testing.assert_close(predict(base, batch), expected)


def test_a_merged_model_is_an_ordinary_one(model, batch, tmp_path):
    adapted = peft.get_peft_model(model, peft.LoraConfig(**LORA))
    expected = predict(adapted, batch)
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    scfoundation_hf.ScFoundationTokenizer().save_pretrained(tmp_path / "merged")
    exported = hub.export(tmp_path / "merged", tmp_path / "export")
    merged = AutoModelForPreTraining.from_pretrained(exported).eval()
    torch.testing.assert_close(predict(merged, batch), expected, rtol=1e-5, atol=1e-6)
