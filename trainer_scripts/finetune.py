"""Fine-tune a classifier of cell types on labelled cells: `scfoundation_hf.finetune` and `scfoundation finetune`.

The flow: labels and split (`labelled_cells.py`), the classifier cut where training begins (`trained_part.py`), what
lies below computed once (`stored_cells.py`), Trainer on what lies above (`finetuning_trainer.py`), then scores,
calibration and the report (`finetuning_report.py`).
"""

import json
import platform
import shutil
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from os import PathLike
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from anndata import AnnData
from torch import nn
from tqdm import tqdm
from transformers import set_seed

from scfoundation_hf.configuration.configuration_scfoundation import ScFoundationConfig
from scfoundation_hf.corpus.whole_files import write_json
from scfoundation_hf.evaluation.annotation_scores import annotation_scores
from scfoundation_hf.inference.calibration import Calibration
from scfoundation_hf.inference.cell_job import TOKENS_PER_BATCH, check_at_least_one
from scfoundation_hf.inference.loading import LoadedModel, ModelSource, load_encoder
from scfoundation_hf.modeling_scfoundation.freezing import count_parameters, freeze
from scfoundation_hf.modeling_scfoundation.modeling_scfoundation import (
    ScFoundationForCellClassification,
    ScFoundationModel,
)
from scfoundation_hf.modeling_scfoundation.pooling import PoolingMode
from scfoundation_hf.tokenization.prepared_cells import OnEmptyCell, PreparedCells, Values

from .cell_splits import SPLITS
from .finetuning_report import CellMaps, calibration_curve, make_finetuning_card, write_html
from .finetuning_settings import (
    FinetuningDtype,
    FinetuningLoss,
    FinetuningSettings,
    Freezing,
    PresetName,
    RareClasses,
    check_packages,
    choose_device,
    loss_fields,
)
from .finetuning_trainer import history, make_trainer
from .labelled_cells import LabelledCells, describe, read_labelled_cells
from .output_folder import check_output_folder, replacing
from .stored_cells import StoredCells
from .throughput import peak_memory_bytes
from .trained_part import TrainedPart, pooled_and_logits, state_bytes, store_cells

REPORT_FILE = "finetuning_report.json"
HTML_FILE = "report.html"
ADAPTER_FOLDER, LOGS_FOLDER = "adapter", "logs"
LORA: dict[str, Any] = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}
MAX_SHARE_OF_DISK = 0.5  # that stored states may take of what is free
MAPPED_CELLS = 2_000  # that the report draws


def finetune(
    data: AnnData | str | PathLike[str],
    output: str | PathLike[str],
    *,
    label: str,
    model: ModelSource,
    split_by: str | None = None,
    split_column: str | None = None,
    min_cells_per_class: int = 10,
    rare_classes: RareClasses = "error",
    preset: PresetName = "default",
    freezing: Freezing | None = None,
    num_layers: int | None = None,
    pooling: PoolingMode | None = None,
    loss: FinetuningLoss | None = None,
    learning_rate: float | None = None,
    batch_size: int | None = None,
    max_steps: int | None = None,
    patience: int = 10,
    seed: int = 0,
    layer: str | None = None,
    gene_column: str | None = None,
    values: Values = "counts",
    total_counts: np.ndarray | str | None = None,
    min_genes: int | None = None,
    on_empty_cell: OnEmptyCell = "error",
    random_weights: bool = False,
    tokens_per_batch: int | None = None,
    device: str | torch.device | None = None,
    dtype: FinetuningDtype = "float32",
    overwrite: bool = False,
    progress: bool = True,
    report: bool = True,
    report_to: str | Sequence[str] = "tensorboard",
) -> Path:
    """Train a classifier of cell types on labelled cells and measure it on cells held out.

    What no training step changes, the frozen layers below the first trained one, is computed once, with dropout off,
    and kept on disk beside `output` until the run ends. Training keeps the weights with the best macro F1 on the
    validation cells and stops when that no longer rises. The test cells are looked at once, at the end.

    Args:
        data: an AnnData or a .h5ad or .zarr path.
        output: folder to make; it appears when all is done.
        label: column of obs with the cell types. Cells without one (NaN) are left out, with a warning.
        model: the pretrained model: folder, Hub id or loaded model. A classifier's head is replaced.
        split_by: column of obs with the donor or batch, whose groups are held out as a whole (`split_cells` has the
            rule for few groups); recommended wherever there is one.
        split_column: column of obs that says "train", "validation" or "test" itself; where none is "validation", those
            are drawn from the training cells, and "test" may be missing. Neither: 8:1:1, by type.
        min_cells_per_class: a type of fewer cells is rare.
        rare_classes: rare types are an "error", are left out ("drop"), or learned all the same ("keep").
        preset: "default": 32 cells a step. "paper": 64 cells, gradients accumulated over 5 batches, learning rate 1e-3,
            the max over tokens, class weights as printed.
        freezing: what trains beside the head. "head": nothing; "last_n": the last `num_layers` encoder layers;
            "penultimate": the last layer but one, as in the released script; "lora": low-rank adapters in all layers;
            "full": everything. `None`: "penultimate", and "last_n" with 1 for an encoder of one layer.
        num_layers: for "last_n".
        pooling: what the head sees of a cell: the "max" over all tokens, or "all" four pools. `None`: by preset.
        loss: "cross_entropy"; "weighted_as_printed" and "weighted_capped", with class weights from the training cells
            (`class_weights_as_printed`, `capped_class_weights`); "focal". `None`: by preset.
        learning_rate: highest, after a warm-up of a tenth of the steps; it falls to 0 at `max_steps`. `None`: 1e-3, in
            the default preset 3e-3 with "head" and 1e-4 with "full".
        batch_size: cells a batch; at least 2, for batch norm.
        max_steps: updates at most. `None`: at least 300, and 10 times over the training cells if that is more, with
            "head" 50 times.
        patience: validations (of which there are up to 30) without a better macro F1 before training stops.
        seed: of split, new weights, order and dropout: the same seed gives the same model on the same machine.
        layer, gene_column, values, total_counts, min_genes, on_empty_cell: as in `embed`.
        random_weights: train the same network from random weights, embeddings included: the control that shows what
            pretraining bought.
        tokens_per_batch: tokens whose activations are kept at once; a batch of more is computed in parts, to the same
            gradient, so that memory is bounded. `None`: about 1 GiB of them, 8 GiB on a GPU.
        device: "cpu", "cuda" or "mps"; `None`: a GPU if there is one.
        dtype: precision to compute in, "float32" or "bfloat16"; weights stay float32.
        overwrite: replace an earlier fine-tuning.
        progress: show progress bars.
        report: write `report.html`: confusion matrix, types, calibration, maps of the cells before and after.
        report_to: where losses and scores go while it trains, by transformers' names: "tensorboard" (into the folder
            `logs` of `output`), "none", others, or a list.
    Returns: `output`, a model folder for `annotate`, `AutoModelForSequenceClassification` and the pipeline:
        classifier, tokenizer, `calibration.json`, `finetuning_report.json`, `README.md`, `report.html`; with "lora" the
        adapters are merged, and also lie in `adapter`.
    Raises: ValueError: for labels, splits, options or input that cannot be right, saying what to do; KeyError: for a
        missing column; FileExistsError: if something is at `output`; ImportError: for packages of the extra `train`.
    Source: paper, Methods, "Cell type annotation"; `model/finetune_model.py` of the original.
    """
    began = perf_counter()
    target = Path(output)
    check_output_folder(target, maker="fine-tuning", made_file=REPORT_FILE, overwrite=overwrite)
    check_at_least_one(max_steps=max_steps, patience=patience, tokens_per_batch=tokens_per_batch)
    choices = FinetuningSettings(
        preset=preset,
        freezing=freezing,
        num_layers=num_layers,
        pooling=pooling,
        loss=loss,
        learning_rate=learning_rate,
        batch_size=batch_size,
        max_steps=max_steps,
        patience=patience,
        seed=seed,
        random_weights=random_weights,
        tokens_per_batch=tokens_per_batch,
        dtype=dtype,
    )
    loggers = [report_to] if isinstance(report_to, str) else list(report_to)
    needed = {"peft": "freezing='lora'"} if freezing == "lora" else {}
    needed |= {"umap": "report=True", "matplotlib": "report=True"} if report else {}
    needed |= {"tensorboard": "report_to='tensorboard'"} if "tensorboard" in loggers else {}
    check_packages(needed)
    chosen_device = choose_device(device)
    loaded = load_encoder(model, device=None if isinstance(model, nn.Module) else "cpu")
    prepared = loaded.tokenizer.prepare(
        data,
        layer=layer,
        gene_column=gene_column,
        values=values,
        total_counts=total_counts,
        min_genes=min_genes,
        on_empty_cell=on_empty_cell,
    )
    with prepared, replacing(target) as folder:
        if progress:
            tqdm.write(prepared.describe(), file=sys.stderr)
        prepared.warn_left_out()
        cells = read_labelled_cells(
            prepared,
            label=label,
            split_by=split_by,
            split_column=split_column,
            min_cells_per_class=min_cells_per_class,
            rare_classes=rare_classes,
            seed=seed,
        )
        settings = choices.complete(
            num_training_cells=len(cells.cells("train")), num_encoder_layers=len(loaded.model.encoder.layers)
        )
        run = FinetuningRun(
            loaded, prepared, cells, settings, device=chosen_device, work=folder.parent, progress=progress
        )
        drawn = run.draw_cells(MAPPED_CELLS)
        before = run.pooled(drawn) if report else None
        run.train(logs=folder / LOGS_FOLDER, report_to=loggers)
        calibration, scores = run.evaluate()
        record = {
            "data": Path(data).name if isinstance(data, str | PathLike) else "an AnnData in memory",
            "label": label,
            "split_by": split_by,
            "split_column": split_column,
            "min_cells_per_class": min_cells_per_class,
            "rare_classes": rare_classes,
            **run.record(),
            "scores": scores,
            "calibration": asdict(calibration),
            "splits": {split: prepared.cell_names[cells.cells(split)].tolist() for split in SPLITS},
        }
        after = run.pooled(drawn) if report else None
        run.save(folder)
        calibration.save(folder)
        record["seconds"]["total"] = perf_counter() - began
        write_json(folder / REPORT_FILE, record)
        make_finetuning_card(record, base=loaded.name).save(folder / "README.md")
        if before is not None and after is not None:
            rows = cells.used[drawn]
            maps = CellMaps(before, after, cells.names(rows), is_trained=cells.splits[rows] == "train")
            write_html(folder / HTML_FILE, record, maps, seed=seed)
    return target


class FinetuningRun:
    """A classifier, the cells it learns from, and what is done with both.

    Args:
        settings: from `FinetuningSettings.complete`.
        work: folder for what the run stores; nobody needs it afterwards.
    """

    def __init__(
        self,
        loaded: LoadedModel[ScFoundationModel],
        prepared: PreparedCells,
        cells: LabelledCells,
        settings: Mapping[str, Any],
        *,
        device: torch.device,
        work: Path,
        progress: bool,
    ) -> None:
        set_seed(settings["seed"])
        self.loaded, self.prepared, self.cells, self.settings = loaded, prepared, cells, settings
        self.device, self.work, self.progress = device, work, progress
        self.model = new_classifier(loaded, cells, settings)
        self.model.to(device)  # type: ignore[arg-type]  # transformers' wrapper loses the signature
        self.adapted: Any = None
        if settings["freezing"] == "lora":
            self.adapted = add_adapters(self.model, base=loaded.name)
        else:
            freeze(self.model, settings["freezing"], n=settings["num_layers"])
        self.num_parameters = count_parameters(self.model)
        self.part = TrainedPart(self.model, tokens_per_batch=settings["tokens_per_batch"])
        self.seconds: dict[str, float] = {}
        began = perf_counter()
        self.stored = self._store()
        self.seconds["frozen_part"] = perf_counter() - began
        self.numbers = {split: np.searchsorted(cells.used, cells.cells(split)) for split in SPLITS}

    def _store(self) -> StoredCells:
        used = self.cells.used
        self.state_bytes = state_bytes(self.part, self.prepared, used)
        free = shutil.disk_usage(self.work).free
        with tqdm(total=len(used), unit=" cells", desc="Frozen part", disable=not self.progress) as bar:
            return store_cells(
                self.part,
                self.prepared,
                used,
                self.cells.labels[used],
                self.work,
                with_states=self.state_bytes <= MAX_SHARE_OF_DISK * free,
                tokens_per_batch=TOKENS_PER_BATCH.get(self.device.type, TOKENS_PER_BATCH["cpu"]),
                progress=bar,
            )

    def train(self, *, logs: Path, report_to: Sequence[str]) -> None:
        """Train until validation no longer gains or the steps are done; the best weights stay."""
        began = perf_counter()
        trainer = make_trainer(
            self.part,
            self.stored,
            self.settings,
            train=self.numbers["train"],
            validation=self.numbers["validation"],
            classes=self.cells.classes,
            device=self.device,
            checkpoints=self.work / "checkpoints",
            logs=logs,
            report_to=report_to,
            progress=self.progress,
        )
        trainer.train()
        self.seconds["training"] = perf_counter() - began
        self.history = history(trainer)
        self.best_step = trainer.state.best_global_step

    def evaluate(self) -> tuple[Calibration, dict[str, Any]]:
        """Calibrate on the validation cells, then score them and the test cells."""
        calibration: Calibration | None = None
        scores: dict[str, Any] = {}
        for split in ("validation", "test"):
            numbers = self.numbers[split]
            if not len(numbers):
                continue
            _, logits = pooled_and_logits(self.part, self.stored, numbers, batch_size=self.settings["batch_size"])
            labels = self.stored.labels[numbers]
            calibration = calibration or Calibration.fit(logits, torch.from_numpy(labels))
            scores[split] = _scores(labels, calibration.probabilities(logits).numpy(), self.cells.classes, calibration)
        assert calibration is not None  # there are validation cells
        return calibration, scores

    def draw_cells(self, most: int) -> np.ndarray:
        """Numbers of at most so many cells, the held-out ones first among those drawn."""
        generator = np.random.default_rng(self.settings["seed"])
        held_out = np.concatenate([self.numbers["validation"], self.numbers["test"]])
        in_order = [*generator.permutation(held_out), *generator.permutation(self.numbers["train"])]
        return np.sort(np.array(in_order[:most], dtype=np.int64))

    def pooled(self, numbers: np.ndarray) -> np.ndarray:
        """What the head sees of these cells."""
        pooled, _ = pooled_and_logits(self.part, self.stored, numbers, batch_size=self.settings["batch_size"])
        return pooled

    def save(self, folder: Path) -> None:
        """Write classifier and tokenizer, adapters merged; the adapters alone into a folder of their own."""
        model = self.model
        if self.adapted is not None:
            self.adapted.save_pretrained(folder / ADAPTER_FOLDER)
            model = self.adapted.merge_and_unload()
        model.save_pretrained(folder)
        self.loaded.tokenizer.save_pretrained(folder)

    def record(self) -> dict[str, Any]:
        """What the run was and how it went, JSON-able."""
        frozen, config = self.part.frozen, self.loaded.model.config
        return {
            "base_model": self.loaded.name,
            "base_revision": self.loaded.revision,
            **describe(self.cells),
            "settings": dict(self.settings),
            "input": self.prepared.settings,
            "alignment_report": json.loads(self.prepared.report.to_json()),
            "num_parameters": self.num_parameters.total,
            "num_trained_parameters": self.num_parameters.trainable,
            "frozen_part": {
                "embeddings": frozen.has_embeddings,
                "layers": len(frozen.layers),
                "of_layers": config.num_hidden_layers,
                "stored": self.stored.array_names,
                "bytes": self.stored.num_bytes,
            },
            "history": self.history,
            "steps": int(self.history["validation"][-1][0]),
            "best_step": self.best_step,
            "seconds": self.seconds,
            "peak_memory_bytes": peak_memory_bytes(self.device),
            "hardware": _hardware(self.device),
            "versions": {"python": platform.python_version()}
            | {name: version(name) for name in ("scfoundation-hf", "torch", "transformers")},
        }


def new_classifier(
    loaded: LoadedModel[ScFoundationModel], cells: LabelledCells, settings: Mapping[str, Any]
) -> ScFoundationForCellClassification:
    """A classifier of these types with a new head on the pretrained encoder, or on a new one of its sizes."""
    fields = loaded.model.config.to_dict()
    fields.pop("_name_or_path", None)
    counts = [counts["train"] for counts in cells.counts().values()]
    config = ScFoundationConfig.from_dict(
        fields
        | loss_fields(settings["loss"], counts)
        | {
            "id2label": dict(enumerate(cells.classes)),
            "label2id": {name: number for number, name in enumerate(cells.classes)},
            "classifier_pooling": settings["pooling"],
            # On a CPU, attention with dropout holds all N x N weights of a cell, and takes several times as long.
            "attention_probs_dropout_prob": 0.0,
        }
    )
    attention = loaded.model.config._attn_implementation
    model = ScFoundationForCellClassification._from_config(config, dtype=torch.float32, attn_implementation=attention)
    if not settings["random_weights"]:
        model.scfoundation.load_state_dict(loaded.model.state_dict())
    return model


def add_adapters(model: ScFoundationForCellClassification, *, base: str) -> Any:
    """The classifier with low-rank adapters in all attention projections, which train with the head; a PeftModel."""
    import peft

    with warnings.catch_warnings():  # peft 0.21 asks transformers 5.23 in its old words
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        adapted = peft.get_peft_model(model, peft.LoraConfig(**LORA, modules_to_save=["classifier"]))
    adapted.peft_config["default"].base_model_name_or_path = base
    return adapted


def _scores(
    labels: np.ndarray, probabilities: np.ndarray, classes: Sequence[str], calibration: Calibration
) -> dict[str, Any]:
    names = np.array(classes, dtype=object)
    called, confidence = probabilities.argmax(axis=1), probabilities.max(axis=1)
    confusion = np.zeros((len(classes), len(classes)), dtype=np.int64)
    np.add.at(confusion, (labels, called), 1)
    return {
        **annotation_scores(names[labels], names[called], probabilities, classes=classes),
        "share_unassigned": float((confidence < calibration.unassigned_below).mean()),
        "confusion_matrix": confusion.tolist(),
        "calibration_curve": calibration_curve(confidence, called == labels),
    }


def _hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} threads of {platform.processor() or platform.machine()} ({device.type})"
