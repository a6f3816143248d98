"""Publishing to a Hub that speaks HTTP: what arrives, what an interruption leaves, what errors say."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.utils import _http
from packaging.version import Version

from scfoundation_hf import hub
from scfoundation_hf.cli import main

# huggingface_hub hands LFS files to its client in a form that the client wants replaced
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload:DeprecationWarning")

REPO = "lab/tiny"


@pytest.fixture
def here(server, monkeypatch, tmp_path):
    """The server as the Hub of this process."""
    for name, value in server.client_environment(tmp_path / "home").items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(_http.time, "sleep", lambda seconds: None)  # the client waits longer before each retry
    return server


@pytest.fixture(scope="module")
def model(tiny_model_dir) -> Path:
    return tiny_model_dir


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def run_python(server, home: Path, code: str, *arguments: object, log_in: bool = True) -> str:
    """Python in a process of its own, whose Hub is the server; returns what it prints."""
    return server.run_client(home, sys.executable, "-c", code, *arguments, log_in=log_in)


def test_push_publishes_the_export_in_one_commit(here, model, tmp_path):
    before = contents(model)
    commit = hub.push(model, REPO, private=True, commit_message="First model")
    exported = contents(hub.export(model, tmp_path / "export"))
    arrived = here.files(REPO)
    assert {name: arrived[name] for name in exported} == exported
    assert set(arrived) == {*exported, ".gitattributes"}
    assert here.repositories[REPO].private
    assert here.repositories[REPO].messages == ["initial commit", "First model"]
    assert commit.oid == here.repositories[REPO].branches["main"]
    assert contents(model) == before


def test_push_to_a_branch_leaves_main_alone(here, model):
    hub.push(model, REPO, revision="v2")
    assert set(here.files(REPO)) == {".gitattributes"}
    assert "model.safetensors" in here.files(REPO, "v2")
    hub.push(model, REPO, revision="v2")  # the branch may exist
    assert here.repositories[REPO].messages[-1] == f"Upload {model.name}"


def test_what_is_there_already_is_not_sent_again(here, model):
    hub.push(model, REPO)
    assert len(here.received) == 1
    hub.push(model, REPO)
    assert len(here.received) == 1


def test_a_token_that_may_not_write(here, model, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    before = contents(model)
    with pytest.raises(PermissionError, match=r"refuses to write to lab/tiny \(401\): log in with `hf auth login`"):
        hub.push(model, REPO)
    assert here.repositories == {}
    assert contents(model) == before


def test_an_upload_that_keeps_breaking_off(here, model, monkeypatch):
    here.cut_after = 1000
    before = contents(model)
    with pytest.raises(ConnectionError, match=r"The upload to lab/tiny broke off .*model\.safetensors"):
        hub.push(model, REPO)
    assert set(here.files(REPO)) == {".gitattributes"}
    assert contents(model) == before
    here.cut_after = None
    hub.push(model, REPO)
    assert here.files(REPO)["model.safetensors"] == before["model.safetensors"]


@pytest.mark.skipif(
    Version(huggingface_hub.__version__) < Version("1.21"),
    reason="huggingface-hub tries again by itself from 1.21 on; before, the same command has to be given again",
)
def test_an_upload_that_breaks_off_once_goes_on_by_itself(here, model):
    here.cut_after = 1000

    def heal(seconds: float) -> None:
        here.cut_after = None

    _http.time.sleep = heal
    hub.push(model, REPO)
    assert "model.safetensors" in here.files(REPO)


def test_a_hub_that_cannot_be_reached(here, model, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ConnectionError, match="The upload to lab/tiny broke off"):
        hub.push(model, REPO)


def test_a_hub_that_is_offline_by_choice(model):
    with pytest.raises(ConnectionError, match="offline mode"):
        hub.push(model, REPO)


def test_an_incomplete_model_asks_the_hub_nothing(here, model, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        hub.push(tmp_path, REPO)
    assert here.requests == []


def test_the_command_lists_or_sends(here, model, capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(["push", str(model), REPO, "--dry-run"])
    out = capsys.readouterr().out
    assert not exit_info.value.code
    assert "model.safetensors" in out
    assert "modeling_scfoundation.py" in out
    assert f"bytes would go to {REPO}; nothing was sent." in out
    assert here.requests == []
    with pytest.raises(SystemExit) as exit_info:
        main(["push", str(model), REPO, "--private"])
    assert not exit_info.value.code
    assert f"{here.url}/{REPO}/commit/" in capsys.readouterr().out
    assert here.repositories[REPO].private


PUSH = "import sys; from scfoundation_hf import hub; hub.push(sys.argv[1], sys.argv[2])"


@pytest.mark.slow
def test_a_killed_upload_is_resumed_by_the_same_command(server, tmp_path, tiny_model_dir):
    """Two shards: the first arrives, the process is killed within the second, which alone is sent afterwards."""
    import scfoundation_hf

    folder = tmp_path / "sharded"
    whole = scfoundation_hf.ScFoundationForPreTraining.from_pretrained(tiny_model_dir)
    whole.save_pretrained(folder, max_shard_size="1250KB")
    scfoundation_hf.ScFoundationTokenizer().save_pretrained(folder)
    sizes = sorted(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert len(sizes) == 2
    before = contents(folder)
    server.stall_after = sizes[0] + 1
    environment = server.process_environment(tmp_path / "home")
    process = subprocess.Popen([sys.executable, "-c", PUSH, folder, REPO], env=environment, stderr=subprocess.DEVNULL)
    try:
        assert server.stalled.wait(timeout=120)
        deadline = time.monotonic() + 30
        while not server.received and time.monotonic() < deadline:
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert len(server.received) == 1
    assert set(server.files(REPO)) == {".gitattributes"}
    assert contents(folder) == before
    server.stall_after = None
    run_python(server, tmp_path / "home", PUSH, folder, REPO)
    assert len(server.received) == 2
    arrived = server.files(REPO)
    assert all(arrived[name] == content for name, content in before.items() if name.endswith(".safetensors"))


PULL = """
import sys
import torch
from transformers import AutoModel, AutoTokenizer
import scfoundation_hf
for revision in sys.argv[2:]:
    model = AutoModel.from_pretrained(sys.argv[1], revision=revision)
    assert type(model) is scfoundation_hf.ScFoundationModel
    tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], revision=revision)
    print(float(model.encoder.norm.bias[0]), len(tokenizer.vocabulary))
"""


@pytest.mark.slow
def test_a_revision_is_pulled_with_and_without_the_package(server, tmp_path, tiny_model_dir):
    import scfoundation_hf

    whole = scfoundation_hf.ScFoundationForPreTraining.from_pretrained(tiny_model_dir)
    for number in (1, 2):
        with torch.no_grad():
            whole.scfoundation.encoder.norm.bias[0] = number
        folder = tmp_path / f"v{number}"
        whole.save_pretrained(folder)
        scfoundation_hf.ScFoundationTokenizer().save_pretrained(folder)
        run_python(server, tmp_path / "home", PUSH, folder, REPO)
    first = next(oid for oid, files in server.repositories[REPO].commits.items() if "model.safetensors" in files)
    out = run_python(server, tmp_path / "other-home", PULL, REPO, first, "main", log_in=False)
    assert out.splitlines() == ["1.0 19264", "2.0 19264"]

    cells = tmp_path / "cells.npz"
    counts = np.zeros((2, 2000), dtype=np.int64)
    counts[:, ::50] = 3
    names = np.array(scfoundation_hf.GeneVocabulary.default().symbols[:2000])
    np.savez(cells, counts=counts, gene_names=names)
    loader = Path(__file__).with_name("load_remote_code.py").read_text(encoding="utf-8")
    for revision in (first, "main"):
        run_python(
            server, tmp_path / "third-home", loader, REPO, cells, tmp_path / f"{revision}.npz", revision, log_in=False
        )
    pooled = {revision: np.load(tmp_path / f"{revision}.npz")["pooled"] for revision in (first, "main")}
    np.testing.assert_allclose(pooled["main"][:, 0] - pooled[first][:, 0], 1.0, rtol=1e-5)


MISSING = """
import sys
from transformers import AutoModel
from scfoundation_hf.inference.loading import load_encoder
for load in (load_encoder, AutoModel.from_pretrained):
    try:
        load(sys.argv[1])
    except OSError as error:
        print(str(error).splitlines()[0])
"""


def test_a_file_that_the_repository_lacks_is_named(here, server, model, tmp_path):
    hub.push(model, REPO)
    repository = server.repositories[REPO]
    files = {name: content for name, content in server.files(REPO).items() if name != "model.safetensors"}
    repository.commit("main", "lose the weights", files)
    out = run_python(server, tmp_path / "home", MISSING, REPO, log_in=False).splitlines()
    assert len(out) == 2
    assert all(REPO in line and "model.safetensors" in line for line in out), out


TRAIN = """
import sys
import torch
from transformers import Trainer, TrainingArguments
import scfoundation_hf

model = scfoundation_hf.ScFoundationForPreTraining.from_pretrained(sys.argv[1])
tokenizer = scfoundation_hf.ScFoundationTokenizer()
row = {"input_ids": torch.tensor([[0, 1, 2, 19264, 19265]]), "values": torch.ones(1, 5)}
row |= {"target_ids": torch.tensor([[3, 4]]), "labels": torch.ones(1, 2)}
args = TrainingArguments(
    sys.argv[2], push_to_hub=True, hub_model_id=sys.argv[3], max_steps=2, save_steps=1, report_to="none", use_cpu=True,
    disable_tqdm=True,
)
trainer = Trainer(
    model, args, train_dataset=[row] * 4, data_collator=lambda rows: rows[0], processing_class=tokenizer
)
trainer.train()
trainer.push_to_hub()
"""


@pytest.mark.slow
def test_a_trainer_pushes_what_loads(server, tmp_path, tiny_model_dir):
    run_python(server, tmp_path / "home", TRAIN, tiny_model_dir, tmp_path / "run", REPO)
    arrived = server.files(REPO)
    local = contents_of_files(tmp_path / "run")
    for name in ("model.safetensors", "config.json", "gene_vocabulary.tsv", "SHA256SUMS", "README.md"):
        assert arrived[name] == local[name], name
    out = run_python(server, tmp_path / "other-home", PULL, REPO, "main", log_in=False)
    assert out.split()[1] == "19264"
    assert json.loads(arrived["config.json"])["architectures"] == ["ScFoundationForPreTraining"]


def contents_of_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
