"""The whole job: a folder that loads, runs that go on after whatever stopped them, and refusals in words."""

import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import anndata
import psutil
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForPreTraining, AutoTokenizer

import scfoundation_hf
from scfoundation_hf.cli import main as cli
from scfoundation_hf.modeling_scfoundation.modeling_scfoundation import ScFoundationModel
from scfoundation_hf.trainer_scripts.gene_table import begin_with_principal_components
from scfoundation_hf.trainer_scripts.pretrain import load_model, pretrain

from .conftest import TINY_MODEL, WITHOUT_DROPOUT

JOB = "scfoundation_hf.trainer_scripts.pretrain"


def weights(folder):
    return load_file(Path(folder) / "model.safetensors")


def report(folder):
    return json.loads((Path(folder) / "training_report.json").read_text())


def command(tmp_path, settings, *launcher):
    """The command line of a run in a process of its own."""
    path = tmp_path / f"{Path(settings['output_dir']).name}.yaml"
    path.write_text(yaml.safe_dump(settings))
    return [sys.executable, "-W", "ignore", *launcher, *(() if launcher else ("-m", JOB)), str(path)]


@contextmanager
def launch(arguments):
    """The running job; it is ended if the test is."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # the same sums whatever else the machine does
    with subprocess.Popen(
        arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    ) as process:
        try:
            yield process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def finish(arguments):
    with launch(arguments) as process:
        output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output[-4000:]


def wait_for(path, process):
    while not path.exists():
        assert process.poll() is None, process.communicate()[0][-4000:]
        time.sleep(0.01)


@pytest.mark.parametrize(("share", "is_named"), [(0.1, True), (0.0, False)])
def test_dropout_on_attention_weights_is_named_on_a_cpu(make_config, caplog, share, is_named):
    """A step takes several times as long with it, and nothing else would say why."""
    overrides = {**TINY_MODEL, "attention_probs_dropout_prob": share}
    pretraining_logger = logging.getLogger(JOB)
    pretraining_logger.addHandler(caplog.handler)  # transformers' loggers pass nothing on
    try:
        pretrain(make_config(model_overrides=overrides, max_steps=1))
    finally:
        pretraining_logger.removeHandler(caplog.handler)
    assert ("attention_probs_dropout_prob is 0.1" in caplog.text) == is_named


def test_the_folder_is_a_model_with_its_figures(make_config, example_cells):
    config = make_config(eval_strategy="steps", eval_steps=8, max_eval_cells=10, learning_rate="3e-2", max_steps=30)
    folder = pretrain(config)

    assert len(AutoTokenizer.from_pretrained(folder).vocabulary) == 19264
    model = AutoModelForPreTraining.from_pretrained(folder)
    assert model.dtype == torch.float32
    encoder = AutoModel.from_pretrained(folder)
    torch.testing.assert_close(encoder.state_dict(), model.scfoundation.state_dict(), rtol=0, atol=0)
    cells = anndata.read_h5ad(example_cells)[:5].copy()
    assert scfoundation_hf.embed(cells, folder, progress=False).obsm["X_scfoundation"].shape == (5, 64)

    figures = report(folder)
    assert figures["steps"] == 30
    assert figures["cells"] == 120
    assert figures["num_parameters"] == model.num_parameters()
    assert figures["flops"] > 0
    assert figures["validation"]["step"] == 30  # validated a last time, though 30 is no multiple of 8
    assert figures["losses"][-1][1] < 0.8 * figures["losses"][0][1]
    assert figures["settings"]["model_overrides"] == TINY_MODEL
    card = ModelCard.load(folder / "README.md")
    for figure in ("120 in 30 steps", f"{figures['validation']['eval_loss']:.4f}", f"{figures['num_parameters']:,}"):
        assert figure in card.text


def test_a_finished_run_is_left_and_a_longer_one_goes_on(make_config, settings, tmp_path):
    folder = pretrain(make_config(max_steps=4, all_positions_from=None))
    first = weights(folder)
    pretrain(make_config(max_steps=4, all_positions_from=None))
    torch.testing.assert_close(weights(folder), first, rtol=0, atol=0)
    assert report(folder)["steps"] == 4
    pretrain(make_config(all_positions_from=None))
    at_once = pretrain(make_config(all_positions_from=None, output_dir=str(tmp_path / "at-once")))
    torch.testing.assert_close(weights(folder), weights(at_once), rtol=0, atol=0)
    assert report(folder)["losses"] == report(at_once)["losses"]


def test_epochs_are_turned_into_steps(make_config, corpus):
    config = make_config(
        max_steps=-1, num_train_epochs=0.01, per_device_train_batch_size=1, effective_batch_size=1, save_strategy="no"
    )
    train_cells = json.loads((corpus / "manifest.json").read_text())["num_cells"]["train"]
    assert report(pretrain(config))["steps"] == round(0.01 * train_cells)


def test_another_run_in_the_folder_is_refused_unless_it_is_to_be_overwritten(make_config, settings):
    folder = pretrain(make_config(max_steps=1))
    with pytest.raises(ValueError, match=r"seed was 42, now 7; learning_rate was 0.0001, now 0.1\. Take those to"):
        pretrain(make_config(seed=7, learning_rate=0.1))
    assert report(pretrain(make_config(seed=7, max_steps=1, overwrite=True)))["settings"]["seed"] == 7
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match="holds files that no pretraining run made"):
        pretrain(make_config(overwrite=True))
    assert [path.name for path in folder.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("missing", ["corpus", "model"])
def test_a_run_without_corpus_or_model_leaves_no_folder(make_config, tmp_path, missing):
    config = make_config(**{missing: str(tmp_path / "nowhere")})
    with pytest.raises(OSError, match="nowhere"):
        pretrain(config)
    assert not Path(config.training.output_dir).exists()


def test_pretraining_continues_from_a_converted_official_checkpoint(make_config, parity_dir, tmp_path):
    original = scfoundation_hf.convert_checkpoint(parity_dir / "models.ckpt", tmp_path / "original", key="gene")
    folder = pretrain(make_config(model=str(original), model_overrides={}, max_steps=2, learning_rate=1e-3))
    before, after = weights(original), weights(folder)
    assert before.keys() == after.keys()
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert len(changed) > 0.9 * sum(not name.endswith("projection") for name in before)
    card = ModelCard.load(folder / "README.md")
    assert card.data.license_name == "scfoundation-model-license-non-commercial"
    assert card.data.base_model == str(original)
    assert f"continued from `{original}`" in card.text


def test_the_licence_of_a_model_to_continue_from_is_not_replaced(make_config, tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n# Base\n")
    with pytest.raises(ValueError, match=r"are licensed as cc-by-nc-4.0.*leave out license 'mit'"):
        pretrain(make_config(model=str(tmp_path), model_overrides={}, license="mit"))


def test_a_table_that_was_learnt_is_not_begun_again(make_config, tmp_path):
    with pytest.raises(ValueError, match=r"has a table that it learnt; leave it out"):
        pretrain(make_config(model=str(tmp_path), model_overrides={}, gene_table="principal_components"))


def test_a_new_model_can_begin_with_what_genes_have_in_common(make_config):
    plain = make_config(gene_table="principal_components", max_steps=1, learning_rate=1e-9)
    folder = pretrain(plain)
    begun, _ = load_model(plain)
    begin_with_principal_components(begun, plain.corpus)
    found = weights(folder)["scfoundation.embeddings.identity_embedding.weight"]
    expected = begun.get_input_embeddings().weight.detach()
    torch.testing.assert_close(found[:19264], expected[:19264], rtol=0, atol=1e-6)  # the rows of T and S were drawn
    assert report(folder)["settings"]["gene_table"] == "principal_components"
    assert "begun with the principal components of training cells" in ModelCard.load(folder / "README.md").text


def test_a_model_without_its_decoder_is_refused(make_config, tiny_config, tmp_path):
    ScFoundationModel(tiny_config).save_pretrained(tmp_path / "encoder")
    scfoundation_hf.ScFoundationTokenizer().save_pretrained(tmp_path / "encoder")
    with pytest.raises(ValueError, match=r"lack \d+ tensors \(decoder"):
        load_model(make_config(model=str(tmp_path / "encoder"), model_overrides={}))


def test_a_dead_loader_worker_ends_the_run_with_words(make_config, settings, monkeypatch):
    config = make_config(dataloader_num_workers=1)
    from scfoundation_hf.trainer_scripts.trainer import ScFoundationTrainer

    training_step = ScFoundationTrainer.training_step

    def kill_worker_later(trainer, *arguments):
        if trainer.state.global_step == 5:
            for child in psutil.Process().children():
                child.send_signal(signal.SIGKILL)
        return training_step(trainer, *arguments)

    monkeypatch.setattr(ScFoundationTrainer, "training_step", kill_worker_later)
    with pytest.raises(RuntimeError, match=r"(?s)worker .* killed.*same command again to go on from .*checkpoint-4"):
        pretrain(config)
    monkeypatch.undo()
    alone = pretrain(make_config(output_dir=settings["output_dir"] + "-alone"))
    torch.testing.assert_close(weights(pretrain(config)), weights(alone), rtol=0, atol=0)


def test_the_command_line(settings, tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(settings | {"max_steps": 1}))
    with pytest.raises(SystemExit) as stop:
        cli(["pretrain", str(path), "--seed", "3"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.strip().endswith(settings["output_dir"])
    assert report(settings["output_dir"])["settings"]["seed"] == 3
    with pytest.raises(SystemExit) as stop:
        cli(["pretrain", str(path), "--max-step", "3"])
    assert stop.value.code == 1
    assert "did you mean 'max_steps'" in capsys.readouterr().err


@pytest.mark.slow
def test_a_killed_run_ends_as_one_left_alone(settings, tmp_path):
    settings |= {"max_steps": 200, "save_steps": 20, "effective_batch_size": 2, "all_positions_from": 190}
    finish(command(tmp_path, settings | {"output_dir": str(tmp_path / "alone")}))

    last_save = random.randrange(20, 180, 20)
    with launch(command(tmp_path, settings)) as process:
        wait_for(Path(settings["output_dir"]) / f"checkpoint-{last_save}", process)
        time.sleep(random.uniform(0, 2))
        process.send_signal(signal.SIGKILL)
    assert not (Path(settings["output_dir"]) / "training_report.json").exists()
    finish(command(tmp_path, settings | {"dataloader_num_workers": 2}))

    alone, resumed = tmp_path / "alone", settings["output_dir"]
    torch.testing.assert_close(weights(resumed), weights(alone), rtol=0, atol=0)
    assert report(resumed)["losses"] == report(alone)["losses"]


@pytest.mark.slow
@pytest.mark.parametrize("sharded", [False, True], ids=["ddp", "fsdp"])
def test_two_processes_learn_what_one_learns_also_when_one_is_killed(settings, tmp_path, sharded):
    settings |= {"model_overrides": TINY_MODEL | WITHOUT_DROPOUT, "logging_steps": 1, "eval_strategy": "steps"}
    settings |= {"gene_table": "principal_components"}
    alone, together = tmp_path / "alone", tmp_path / "together"
    finish(command(tmp_path, settings | {"output_dir": str(alone)}))

    script = Path(__file__).with_name("launch_on_cpus.py")
    (tmp_path / "fsdp.yaml").write_text(yaml.safe_dump(FSDP_CONFIG))
    launcher = ["torch.distributed.run", "--nproc-per-node", "2"]
    if sharded:
        launcher = ["accelerate.commands.launch", "--config_file", str(tmp_path / "fsdp.yaml")]
    job = command(tmp_path, settings | {"output_dir": str(together)}, "-m", *launcher, str(script))
    with launch(job) as process:
        wait_for(together / "checkpoint-4", process)
        ranks = [child for child in psutil.Process(process.pid).children() if str(script) in child.cmdline()]
        ranks[1].send_signal(signal.SIGKILL)
        output, _ = process.communicate(timeout=100)
    assert process.returncode != 0
    assert "Signal 9 (SIGKILL)" in output
    finish(job)

    assert [step for step, _ in report(together)["losses"]] == list(range(1, 9))
    # Sums over cells are taken in another order, in float32.
    assert report(together)["losses"] == [
        [step, pytest.approx(loss, rel=1e-5)] for step, loss in report(alone)["losses"]
    ]
    torch.testing.assert_close(weights(together), weights(alone), rtol=0, atol=1e-6)
    assert report(together)["validation"]["eval_loss"] == pytest.approx(
        report(alone)["validation"]["eval_loss"], rel=1e-4
    )
    assert (together / "checkpoint-8" / "pytorch_model_fsdp.bin").exists() == sharded


FSDP_CONFIG = {
    "distributed_type": "FSDP",
    "num_processes": 2,
    "num_machines": 1,
    "machine_rank": 0,
    "use_cpu": True,
    "mixed_precision": "no",
    "fsdp_config": {
        "fsdp_version": 2,
        "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "fsdp_transformer_layer_cls_to_wrap": "ScFoundationEncoderLayer,ScFoundationDecoderLayer",
        "fsdp_state_dict_type": "FULL_STATE_DICT",
        "fsdp_cpu_ram_efficient_loading": False,
    },
}
