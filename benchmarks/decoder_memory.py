"""Peak memory above the weights, and time, of one cell through the 100M model: embedding and predicted expression.

The promise is under 1 GiB for `predicted_values`: the decoder's feature maps are never held whole (in float32 they
would take 8 heads x 19,266 positions x 266 features x 4 bytes = 156 MiB, several times over, in each of 6 layers).
Linux on CPU; run it in a fresh process: `python benchmarks/decoder_memory.py`.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch

from scfoundation_hf.configuration.configuration_scfoundation import PRESETS, ScFoundationConfig
from scfoundation_hf.modeling_scfoundation.modeling_scfoundation import ScFoundationForPreTraining
from scfoundation_hf.modeling_scfoundation.pooling import pool_cells

MIB = 2**20


def memory(field: str) -> int:
    """Bytes of this process: `VmRSS` now, `VmHWM` at most since the last `reset_peak`."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}.")


def reset_peak() -> None:
    """Let `VmHWM` start again at what is held now."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def measure(run: Callable[[], object]) -> dict[str, float]:
    """Peak memory in MiB above what is held before, and seconds, of the first call; seconds of the second."""
    reset_peak()
    held = memory("VmRSS")
    start = time.perf_counter()
    run()
    first = time.perf_counter() - start
    peak = memory("VmHWM") - held
    start = time.perf_counter()
    run()
    return {
        "peak_mib": round(peak / MIB, 1),
        "first_s": round(first, 2),
        "second_s": round(time.perf_counter() - start, 2),
    }


def random_cell(config: ScFoundationConfig, num_expressed: int) -> dict[str, torch.Tensor]:
    """A batch of one cell with this many expressed genes."""
    genes = torch.randperm(config.num_genes)[:num_expressed].sort().values
    depth_tokens = torch.tensor([config.target_depth_token_id, config.source_depth_token_id])
    input_ids = torch.cat([genes, depth_tokens])[None]
    values = torch.cat([0.5 + 3 * torch.rand(num_expressed), torch.tensor([4.0, 3.7])])[None]
    return {"input_ids": input_ids, "values": values, "attention_mask": torch.ones_like(input_ids)}


def main() -> None:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=PRESETS, default="100m")
    parser.add_argument("--num-expressed", type=int, default=2000)
    parser.add_argument("--attention", default="sdpa")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    config = ScFoundationConfig.from_preset(arguments.preset)
    model = ScFoundationForPreTraining._from_config(config, attn_implementation=arguments.attention).eval()
    batch = random_cell(config, arguments.num_expressed)

    def embed() -> torch.Tensor:
        return pool_cells(model.scfoundation(**batch).last_hidden_state, batch["attention_mask"])

    with torch.inference_mode():
        result = {
            **vars(arguments),
            "threads": torch.get_num_threads(),
            "embedding": measure(embed),
            "predicted_values": measure(lambda: model(**batch).predicted_values),
        }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
