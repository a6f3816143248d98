"""Pretrain a model on a prepared corpus. Also `scfoundation pretrain`.

accelerate launch -m scfoundation_hf.trainer_scripts.pretrain pretrain-3m --corpus CORPUS --output-dir RUN
"""

import json
import os
import platform
import shutil
import sys
from dataclasses import asdict
from importlib.metadata import version
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState  # type: ignore[import-untyped]
from transformers import set_seed
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

from scfoundation_hf.configuration.configuration_scfoundation import PRESETS, ScFoundationConfig
from scfoundation_hf.corpus.lookup import MANIFEST_FILE, MEMBERS_FILE, TrainingCells, record_training_data
from scfoundation_hf.corpus.streaming import CorpusStream
from scfoundation_hf.corpus.whole_files import write_json
from scfoundation_hf.modeling_scfoundation.modeling_scfoundation import ScFoundationForPreTraining
from scfoundation_hf.tokenization.data_collator import ScFoundationReadDepthAwareCollator
from scfoundation_hf.tokenization.read_depth_aware import ReadDepthAwareRecipe
from scfoundation_hf.tokenization.tokenization_scfoundation import ScFoundationTokenizer

from .gene_table import begin_with_principal_components
from .model_card import REPORT_FILE, licence_of, make_model_card
from .pretraining_config import PretrainingConfig, read_config
from .trainer import UNFINISHED, ScFoundationTrainer
from .training_args import ScFoundationTrainingArguments

logger = logging.get_logger(__name__)

SETTINGS_NAME = "pretraining_settings.json"
# What makes the numbers of a run: a folder is continued only with the same. All else may change between its parts.
FIXED_ARGUMENTS = (
    "seed",
    "per_device_train_batch_size",
    "effective_batch_size",
    "gradient_accumulation_steps",
    "tokens_per_batch",
    "learning_rate",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "weight_decay",
    "optim",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "bf16",
    "fp16",
    "masking",
    "masking_overrides",
    "layout",
    "feature_redraw_interval",
    "decoder_positions",
    "all_positions_from",
)


def pretrain(config: PretrainingConfig | str | PathLike[str]) -> Path:
    """Train until `max_steps` and make `output_dir` a model folder; a run that was cut short goes on.

    Run under `accelerate launch` or `torchrun`, every process calls this.

    Args:
        config: the run, or a file or recipe that describes it.
    Returns: `output_dir`: model, tokenizer, `training_report.json`, its training data (`data_manifest.json`, hashes
        of the cells in `training_cells.safetensors`), a model card, and the last checkpoints.
    Raises: ValueError: if `output_dir` holds another run or the model cannot be trained; FileExistsError: if it holds
        something else; FileNotFoundError: for no corpus or model; RuntimeError: if a loader worker dies.
    """
    if not isinstance(config, PretrainingConfig):
        config = read_config(config)
    args = config.training
    folder = Path(args.output_dir or "")
    _check_new(config)
    train, validation = open_corpus(config)
    set_seed(args.seed)
    logging.disable_progress_bar()  # one for each checkpoint's file; the bar of the training is not among them
    model, tokenizer = load_model(config)
    _warn_of_dropout_on_cpu(model.config, args)
    with args.main_process_first(local=False):
        if args.should_save:
            _open_run(folder, config)
    checkpoint = get_last_checkpoint(str(folder))
    if config.gene_table == "principal_components" and checkpoint is None:
        begin_with_principal_components(model, config.corpus)
    if args.max_steps <= 0:
        steps = args.num_train_epochs * len(train) / args.gradient_accumulation_steps
        args.max_steps = max(round(steps), 1)
    trainer = ScFoundationTrainer(
        model,
        args,
        data_collator=ScFoundationReadDepthAwareCollator(
            tokenizer,
            recipe=ReadDepthAwareRecipe.from_name(args.masking, **(args.masking_overrides or {})),
            seed=args.seed,
            layout=args.layout,
        ),
        train_dataset=train,
        eval_dataset=validation,
    )
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        saved = get_last_checkpoint(str(folder)) or "the beginning, as there is no checkpoint yet"
        raise RuntimeError(f"{error}\nRun the same command again to go on from {saved}.") from error
    _finish(trainer, config)
    return folder


def _warn_of_dropout_on_cpu(config: ScFoundationConfig, args: ScFoundationTrainingArguments) -> None:
    share = config.attention_probs_dropout_prob
    if args.device.type == "cpu" and share > 0 and args.should_log:
        logger.warning(
            f"attention_probs_dropout_prob is {share}. With dropout on attention weights a CPU holds all of them, "
            "N x N a head and layer for a cell of N genes, and a step takes twice as long or longer; leave it out "
            "with model_overrides: {attention_probs_dropout_prob: 0}."
        )


def _check_new(config: PretrainingConfig) -> None:
    """Refuse what only a new model can be given, for one to continue from."""
    if config.model.lower() in PRESETS:
        return
    if config.gene_table != "random":
        raise ValueError(
            f"gene_table {config.gene_table} is what a new model begins with, and {config.model} has a table that it "
            "learnt; leave it out."
        )
    stated = licence_of(config.model)
    if stated and config.license is not None:
        raise ValueError(
            f"The weights of {config.model} are licensed as {stated.get('license_name', stated['license'])}, which "
            f"holds for what is trained from them; leave out license {config.license!r}."
        )


def load_model(config: PretrainingConfig) -> tuple[ScFoundationForPreTraining, ScFoundationTokenizer]:
    """The model to train, in float32, and its tokenizer: new from a preset, or one to continue from.

    Raises: ValueError: if a folder's weights are incomplete; OSError: if there is no such folder.
    """
    options: dict[str, Any] = {}
    if config.attn_implementation is not None:
        options["attn_implementation"] = config.attn_implementation
    if config.model.lower() in PRESETS:
        model_config = ScFoundationConfig.from_preset(config.model, **config.model_overrides)
        return ScFoundationForPreTraining._from_config(model_config, **options), ScFoundationTokenizer()
    loaded: Any = ScFoundationForPreTraining.from_pretrained(
        config.model, dtype=torch.float32, output_loading_info=True, **options, **config.model_overrides
    )
    model, info = loaded
    if info["missing_keys"]:
        names = ", ".join(sorted(info["missing_keys"])[:5])
        raise ValueError(
            f"The weights in {config.model} lack {len(info['missing_keys'])} tensors ({names}, ...), which would be "
            "random; continue from a model that was saved with its decoder."
        )
    return model, ScFoundationTokenizer.from_pretrained(config.model)


def open_corpus(config: PretrainingConfig) -> tuple[CorpusStream, CorpusStream | None]:
    """This process's share of the training split and, if it is to be evaluated, of the validation split."""
    args = config.training
    share = {"process_index": args.process_index, "num_processes": args.world_size}
    train = CorpusStream(
        config.corpus,
        split="train",
        batch_size=args.per_device_train_batch_size,
        tokens_per_batch=args.tokens_per_batch,
        seed=args.seed,
        **share,
    )
    if args.eval_strategy == "no":
        return train, None
    batch_size = args.per_device_eval_batch_size
    return train, CorpusStream(config.corpus, split="validation", batch_size=batch_size, **share)


def _open_run(folder: Path, config: PretrainingConfig) -> None:
    """Make the folder of a new run, or check that it holds the one that is to go on."""
    stored = folder / SETTINGS_NAME
    settings = _settings(config)
    if config.overwrite and stored.is_file():
        shutil.rmtree(folder)
    if not stored.is_file():
        if folder.is_dir() and any(folder.iterdir()):
            raise FileExistsError(
                f"{folder} holds files that no pretraining run made; choose another output_dir or empty it."
            )
        folder.mkdir(parents=True, exist_ok=True)
        write_json(stored, settings)
        return
    earlier = json.loads(stored.read_text(encoding="utf-8"))
    changed = [key for key in settings if settings[key] != earlier.get(key)]
    if changed:
        differences = "; ".join(f"{key} was {earlier.get(key)!r}, now {settings[key]!r}" for key in changed)
        raise ValueError(
            f"{folder} holds a run with other settings: {differences}. Take those to continue it, another output_dir "
            "for another run, or overwrite=True (--overwrite) to throw it away."
        )
    shutil.rmtree(folder / UNFINISHED, ignore_errors=True)  # a checkpoint that a kill left half written


def _settings(config: PretrainingConfig) -> dict[str, Any]:
    arguments = config.training.to_dict()  # choices as text
    return {
        "model": config.model,
        "model_overrides": config.model_overrides,
        "gene_table": config.gene_table,
        **{name: arguments[name] for name in FIXED_ARGUMENTS},
    }


def _finish(trainer: ScFoundationTrainer, config: PretrainingConfig) -> None:
    """Validate a last time, then write model, tokenizer, report and card into the run's folder."""
    folder, state = trainer.run_folder, trainer.state
    validations = [line for line in state.log_history if "eval_loss" in line]
    if trainer.eval_dataset is not None and (not validations or validations[-1]["step"] != state.global_step):
        trainer.evaluate()
    report = make_report(trainer, config)
    trainer.save_model(str(folder))
    if trainer.args.should_save:
        write_json(folder / REPORT_FILE, report)
        record_training_data(config.corpus, folder)
        card = make_model_card(
            report,
            base_folder=None if report["base_model"] is None else Path(config.model),
            manifest=json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8")),
            training_cells=TrainingCells.load(folder / MEMBERS_FILE),
        )
        card.save(folder / "README.md")
    trainer.accelerator.wait_for_everyone()


def make_report(trainer: ScFoundationTrainer, config: PretrainingConfig) -> dict[str, Any]:
    """The figures of a run, ready for JSON: settings, losses, work, hardware. Every process must call it."""
    args, state = trainer.args, trainer.state
    model = trainer.accelerator.unwrap_model(trainer.model)
    work = trainer.total_work()
    training = [line for line in state.log_history if "loss" in line]
    validation = [line for line in state.log_history if "eval_loss" in line]
    return {
        "base_model": None if config.model.lower() in PRESETS else config.model,
        "license": config.license,
        "settings": _settings(config),
        "corpus": {"train_cells": trainer.train_stream.num_cells},
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "configuration": model.config.to_diff_dict(),
        "steps": state.global_step,
        "num_processes": args.world_size,
        **asdict(work),
        **work.rates(matrix_rate=trainer.matrix_rate),
        "matrix_rate": trainer.matrix_rate,
        "losses": [[line["step"], line["loss"]] for line in training],
        "validation_losses": [[line["step"], line["eval_loss"]] for line in validation],
        "validation": validation[-1] if validation else None,
        "hardware": _hardware(args),
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("scfoundation-hf", "torch", "transformers", "accelerate")},
    }


def _hardware(args: ScFoundationTrainingArguments) -> str:
    if args.device.type == "cuda":
        return f"{args.world_size} x {torch.cuda.get_device_name(args.device)}"
    return f"{os.cpu_count()} cores of {platform.processor() or platform.machine()} ({args.device.type})"


def main() -> None:
    """Pretrain from the command line."""
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit("Usage: pretrain CONFIG.yaml [--KEY VALUE ...]; the keys are those of the file.")
    folder = pretrain(read_config(sys.argv[1], sys.argv[2:]))
    state = PartialState()
    state.print(folder)
    state.destroy_process_group()


if __name__ == "__main__":
    main()
