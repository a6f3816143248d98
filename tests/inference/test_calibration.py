"""Temperature and threshold: found again where they are known, kept through a folder, refused where they cannot be."""

import json

import pytest
import torch

from scfoundation_hf.inference.calibration import Calibration
from scfoundation_hf.modeling_scfoundation.modeling_scfoundation import ScFoundationForPreTraining


@pytest.fixture(scope="module")
def calibrated() -> tuple[torch.Tensor, torch.Tensor]:
    """Logits that are as sure as they should be, and labels drawn from them."""
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(4000, 5, generator=generator)
    return logits, torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)[:, 0]


@pytest.mark.parametrize("too_sure", [0.3, 1.0, 3.0])
def test_the_temperature_undoes_how_much_too_sure_a_model_is(calibrated, too_sure):
    logits, labels = calibrated
    calibration = Calibration.fit(too_sure * logits, labels)
    assert calibration.temperature == pytest.approx(too_sure, rel=0.05)
    probabilities = calibration.probabilities(too_sure * logits)
    assert probabilities.dtype == torch.float32
    expected = (too_sure * logits / calibration.temperature).softmax(dim=-1)
    torch.testing.assert_close(probabilities, expected, rtol=0, atol=1e-6)


def test_the_threshold_loses_at_most_a_twentieth_of_the_right_calls(calibrated):
    logits, labels = calibrated
    calibration = Calibration.fit(logits, labels)
    confidence, called = calibration.probabilities(logits).max(dim=-1)
    right = confidence[called == labels]
    assert 0.045 < float((right < calibration.unassigned_below).float().mean()) <= 0.05


def test_a_model_that_is_always_right_is_not_taken_for_certain():
    labels = torch.arange(4).repeat(5)
    calibration = Calibration.fit(3 * torch.eye(4)[labels], labels)
    assert 0.1 < calibration.temperature < 1
    confidence = calibration.probabilities(3 * torch.eye(4)[labels]).max(dim=-1).values
    assert (confidence < 1).all()
    assert (confidence >= calibration.unassigned_below).all()


def test_a_model_that_guesses_is_flattened():
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(500, 4, generator=generator), torch.randint(4, (500,), generator=generator)
    assert float(Calibration.fit(logits, labels).probabilities(logits).max()) < 0.45


def test_a_folder_keeps_it(calibrated, tmp_path):
    calibration = Calibration.fit(*calibrated)
    assert calibration.save(tmp_path) == tmp_path / "calibration.json"
    assert [path.name for path in tmp_path.iterdir()] == ["calibration.json"]
    assert Calibration.load(tmp_path) == calibration
    assert Calibration.load(str(tmp_path)) == calibration


def test_a_model_without_one_gives_none(tiny_model_dir, tiny_config, tmp_path):
    assert Calibration.load(tiny_model_dir) is None
    assert Calibration.load(tmp_path / "nowhere") is None
    assert Calibration.load("nobody/nothing") is None  # a Hub id, and no Hub
    assert Calibration.load(ScFoundationForPreTraining(tiny_config)) is None


def test_a_loaded_model_has_that_of_its_folder(tiny_config, tmp_path):
    ScFoundationForPreTraining(tiny_config).save_pretrained(tmp_path)
    Calibration(2.0, 0.3).save(tmp_path)
    assert Calibration.load(ScFoundationForPreTraining.from_pretrained(tmp_path)) == Calibration(2.0, 0.3)


@pytest.mark.parametrize("content", ["{", "[]", '{"temperature": 2}', '{"temperature": 0, "unassigned_below": 0.1}'])
def test_a_file_that_is_no_calibration_is_refused(tmp_path, content):
    (tmp_path / "calibration.json").write_text(content)
    with pytest.raises(ValueError, match=r"calibration\.json is no calibration .*; fit and save it again"):
        Calibration.load(tmp_path)


def test_numbers_are_checked(tmp_path):
    with pytest.raises(ValueError, match=r"temperature is -1\.0; it must be above 0"):
        Calibration(-1.0, 0.5)
    with pytest.raises(ValueError, match=r"unassigned_below is 1\.5; it must be a probability"):
        Calibration(1.0, 1.5)
    assert json.loads(Calibration(1.5, 0.0).save(tmp_path).read_text()) == {"temperature": 1.5, "unassigned_below": 0.0}


def test_what_cannot_be_fitted_is_refused():
    logits, labels = torch.eye(3), torch.arange(3)
    with pytest.raises(ValueError, match=r"shape \(3, 3\) and labels \(2,\)"):
        Calibration.fit(logits, labels[:2])
    with pytest.raises(ValueError, match="of at least one cell"):
        Calibration.fit(logits[:0], labels[:0])
    with pytest.raises(ValueError, match="labels hold 7, but the classes are 0 to 2"):
        Calibration.fit(logits, torch.tensor([0, 7, 1]))
    with pytest.raises(ValueError, match="logits of validation cell 1 are not finite"):
        Calibration.fit(torch.tensor([[0.0, 1.0], [torch.nan, 0.0]]), torch.tensor([1, 0]))
    with pytest.raises(ValueError, match="calls none of the 3 validation cells right"):
        Calibration.fit(logits, torch.tensor([1, 2, 0]))
