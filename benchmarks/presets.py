"""Which small model learns most in an hour: candidates trained for the same time on the same cells, validated alike.

    python benchmarks/presets.py CORPUS --output FOLDER [--minutes 10] [--candidates NAME ...] [--threads 1]

CORPUS comes from `scfoundation prepare` and has a validation split. Every candidate starts from the same seed, sees
the same cells in the same order as fast as it can, and after the time given (its validations not counted) predicts
the hidden genes of the same validation cells over all positions. FOLDER gets one JSON file a candidate, written when
it is done, and a table of all that are there, so that candidates can be run at different times on one machine.
Rates depend on what else the machine does: run one process a core, and candidates that are to be compared together.
"""

import argparse
import json
import time
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from scfoundation_hf.configuration.configuration_scfoundation import ScFoundationConfig
from scfoundation_hf.corpus.streaming import CorpusLoader, CorpusStream
from scfoundation_hf.evaluation.expression_errors import ExpressionErrors
from scfoundation_hf.evaluation.flops import batch_training_flops
from scfoundation_hf.modeling_scfoundation.modeling_scfoundation import ScFoundationForPreTraining
from scfoundation_hf.tokenization.data_collator import ScFoundationReadDepthAwareCollator
from scfoundation_hf.tokenization.tokenization_scfoundation import ScFoundationTokenizer
from scfoundation_hf.trainer_scripts.gene_table import begin_with_principal_components
from scfoundation_hf.trainer_scripts.trainer import log10_source_depth

MICRO_BATCH = 4
EVALUATION_BATCH = 8
WARMUP_STEPS = 100


@dataclass
class Candidate:
    """What is tried: fields of the 3M preset set differently, and how it is trained."""

    sizes: dict[str, Any] = field(default_factory=dict)
    effective_batch_size: int = 4
    learning_rate: float = 1e-3
    decoder_positions: int | None = 2560
    gene_table: str = "principal_components"


ORIGINAL_SMALL: dict[str, Any] = {
    "num_hidden_layers": 4,
    "intermediate_size": 512,
    "decoder_hidden_size": 128,
    "decoder_num_attention_heads": 4,
    "decoder_intermediate_size": 512,
}
CANDIDATES = {
    "the preset": Candidate(),
    "table drawn at 0.1": Candidate(gene_table="random"),
    "table drawn at 1": Candidate({"embedding_initializer_range": 1.0}, gene_table="random"),
    "projections drawn at 0.06": Candidate({"initializer_range": 0.06}),
    "batch 16": Candidate(effective_batch_size=16),
    "learning rate 5e-4": Candidate(learning_rate=5e-4),
    "learning rate 2e-3": Candidate(learning_rate=2e-3),
    "learning rate 4e-3": Candidate(learning_rate=4e-3),
    "encoder heads of 64": Candidate({"num_attention_heads": 2}),
    "one decoder head of 64": Candidate({"decoder_num_attention_heads": 1, "decoder_head_dim": 64}),
    "64 random features": Candidate({"decoder_num_random_features": 64}),
    "encoder of 2 layers": Candidate({"num_hidden_layers": 2}),
    "encoder 64 wide": Candidate({"hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 128}),
    "encoder 192 wide": Candidate({"hidden_size": 192, "num_attention_heads": 6, "intermediate_size": 384}),
    "decoder 32 wide": Candidate(
        {"decoder_hidden_size": 32, "decoder_num_attention_heads": 1, "decoder_intermediate_size": 128}
    ),
    "decoder 128 wide": Candidate(
        {"decoder_hidden_size": 128, "decoder_num_attention_heads": 4, "decoder_intermediate_size": 512}
    ),
    "4 x 128 and 2 x 128, as the original's small model": Candidate(ORIGINAL_SMALL),
    "all positions": Candidate(decoder_positions=None),
    "1,280 positions": Candidate(decoder_positions=1280),
}


def train(model: ScFoundationForPreTraining, candidate: Candidate, corpus: Path, seconds: float) -> dict[str, float]:
    """Train for a time. Returns: what was done in it."""
    collator = ScFoundationReadDepthAwareCollator(
        ScFoundationTokenizer(), seed=0, layout="packed", decoder_positions=candidate.decoder_positions
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=candidate.learning_rate, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / WARMUP_STEPS, 1.0))
    parts = candidate.effective_batch_size // MICRO_BATCH
    cells, steps, flops, start = 0, 0, 0.0, time.perf_counter()
    loader = CorpusLoader(CorpusStream(corpus, batch_size=MICRO_BATCH, seed=0), collator)
    model.train()
    while time.perf_counter() - start < seconds:
        for part, batch in enumerate(loader, start=1):
            (model(**batch).loss / parts).backward()
            cells += MICRO_BATCH
            flops += float(batch_training_flops(model.config, batch))
            if part % parts == 0:
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
                steps += 1
                if time.perf_counter() - start >= seconds:
                    break
    return {"cells": cells, "steps": steps, "flops": flops, "seconds": time.perf_counter() - start}


@torch.no_grad()
def validate(model: ScFoundationForPreTraining, corpus: Path, num_cells: int) -> float:
    """Mean squared error over the hidden genes of cells spread over the validation split."""
    stream = CorpusStream(corpus, split="validation", batch_size=EVALUATION_BATCH)
    collator = ScFoundationReadDepthAwareCollator(ScFoundationTokenizer(), seed=1, layout="packed")
    loader = CorpusLoader(stream, collator)
    stride = max(len(loader) * EVALUATION_BATCH // num_cells, 1)
    model.eval()
    errors = ExpressionErrors()
    for batch in islice(loader, 0, None, stride):
        labels = batch.pop("labels")
        errors.update(model(**batch).predicted_values, labels, log10_source_depth(batch))
    return errors.compute()["mse"]


def table(folder: Path) -> str:
    """Markdown of all results in the folder, the best first."""
    results = sorted((json.loads(file.read_text()) for file in folder.glob("*.json")), key=lambda row: row["loss"])
    lines = [
        "| candidate | parameters | batch | learning rate | cells/s | cells shown | updates | validation loss |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {row['name']} | {row['parameters']:,} | {row['effective_batch_size']} | {row['learning_rate']:g} "
        f"| {row['cells'] / row['seconds']:.2f} | {row['cells']:,} | {row['steps']:,} | {row['loss']:.4f} |"
        for row in results
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Train the candidates one after the other and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", nargs="?", type=Path)
    parser.add_argument("--output", type=Path, default=Path("presets"))
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--candidates", nargs="+", choices=list(CANDIDATES), default=list(CANDIDATES))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--validation-cells", type=int, default=128)
    arguments = parser.parse_args()
    if arguments.corpus is None:
        print("Skipped: pass a corpus made by `scfoundation prepare`.")
        return
    torch.set_num_threads(arguments.threads)
    arguments.output.mkdir(parents=True, exist_ok=True)
    for name in arguments.candidates:
        candidate = CANDIDATES[name]
        torch.manual_seed(0)
        model = ScFoundationForPreTraining(ScFoundationConfig.from_preset("3m", **candidate.sizes))
        if candidate.gene_table == "principal_components":
            begin_with_principal_components(model, str(arguments.corpus))
        done = train(model, candidate, arguments.corpus, 60 * arguments.minutes)
        result = {
            "name": name,
            "parameters": model.num_parameters(),
            "effective_batch_size": candidate.effective_batch_size,
            "learning_rate": candidate.learning_rate,
            **done,
            "loss": validate(model, arguments.corpus, arguments.validation_cells),
        }
        print(json.dumps(result), flush=True)
        file = arguments.output / f"{name.replace(' ', '-').replace(',', '')}.json"
        file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    (arguments.output / "README.md").write_text(table(arguments.output), encoding="utf-8")
    print(table(arguments.output))


if __name__ == "__main__":
    main()
