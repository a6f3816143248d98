"""The encoder as a graph: the same numbers, for any batch, in torch.export and in onnxruntime."""

import numpy as np
import pytest
import torch

import scfoundation_hf
from scfoundation_hf.cli import main
from scfoundation_hf.inference import onnx_export
from scfoundation_hf.inference.onnx_export import INPUT_NAMES, export_encoder, export_onnx

# torch 2.13's exporter against its own tree library, and its look for torchvision
pytestmark = pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)`:FutureWarning")


@pytest.fixture(scope="module")
def model(tiny_model_dir) -> scfoundation_hf.ScFoundationModel:
    return scfoundation_hf.ScFoundationModel.from_pretrained(tiny_model_dir).eval()


def batches(example_cells):
    """One cell alone, and several of different lengths."""
    import anndata

    cells = anndata.read_h5ad(example_cells)
    tokenizer = scfoundation_hf.ScFoundationTokenizer()
    for rows in (slice(0, 1), slice(0, 40, 10)):
        yield tokenizer(cells[rows].copy(), gene_column="symbol")


def test_the_exported_graph_takes_any_batch(model, example_cells):
    graph = export_encoder(model).module()
    for batch in batches(example_cells):
        with torch.inference_mode():
            pooled, states = graph(*(batch[name] for name in INPUT_NAMES))
            expected = model(**batch)
        torch.testing.assert_close(pooled, expected.pooler_output, rtol=0, atol=1e-5)
        torch.testing.assert_close(states, expected.last_hidden_state, rtol=0, atol=1e-5)


def test_onnxruntime_computes_the_same(model, tiny_model_dir, example_cells, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    with pytest.raises(SystemExit) as exit_info:
        main(["export", str(tiny_model_dir), str(tmp_path / "encoder.onnx"), "--format", "onnx"])
    assert not exit_info.value.code
    assert [path.name for path in tmp_path.iterdir()] == ["encoder.onnx"]
    session = onnxruntime.InferenceSession(tmp_path / "encoder.onnx")
    for batch in batches(example_cells):
        found = session.run(None, {name: batch[name].numpy() for name in INPUT_NAMES})
        with torch.inference_mode():
            expected = model(**batch)
        np.testing.assert_allclose(found[0], expected.pooler_output, rtol=0, atol=1e-5)
        is_real = batch["attention_mask"].bool().numpy()
        np.testing.assert_allclose(found[1][is_real], expected.last_hidden_state[is_real], rtol=0, atol=1e-5)


def test_int8_weights_are_smaller_and_close(model, example_cells, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    whole = export_onnx(model, tmp_path / "float32.onnx")
    small = export_onnx(model, tmp_path / "int8.onnx", weights="int8")
    assert small.stat().st_size < 0.5 * whole.stat().st_size  # a quarter of the weights; this graph is mostly names
    *_, batch = batches(example_cells)
    inputs = {name: batch[name].numpy() for name in INPUT_NAMES}
    found = onnxruntime.InferenceSession(small).run(["pooler_output"], inputs)[0]
    with torch.inference_mode():
        expected = model(**batch).pooler_output
    cosine = torch.cosine_similarity(torch.from_numpy(found), expected)
    assert 0.99 < cosine.min() < 1  # close, and really another arithmetic


def test_the_model_is_left_as_it_was(tiny_model_dir):
    model = scfoundation_hf.ScFoundationForPreTraining.from_pretrained(tiny_model_dir).train()
    export_encoder(model)
    assert model.scfoundation.training
    assert not model.scfoundation.add_pooling_layer


def test_a_graph_that_computes_something_else_is_not_written(model, tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(onnx_export, "TOLERANCE", -1)
    with pytest.raises(ValueError, match="The ONNX file does not compute what the model does"):
        export_onnx(model, tmp_path / "encoder.onnx")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_file_is_kept(model, tmp_path):
    (tmp_path / "encoder.onnx").write_text("mine")
    with pytest.raises(FileExistsError, match=r"encoder\.onnx exists already"):
        export_onnx(model, tmp_path / "encoder.onnx")


def test_without_the_extra_it_says_what_to_install(model, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnx", None)
    with pytest.raises(ImportError, match=r"needs onnx: pip install 'scfoundation-hf\[onnx\]'"):
        export_onnx(model, tmp_path / "encoder.onnx")
