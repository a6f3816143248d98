"""How sure a classifier may say it is: the temperature of its logits, and the confidence below which no type is named.

`scfoundation finetune` fits both on the validation cells and leaves them in the model's folder; `annotate` and the
pipeline apply them.
"""

import json
import math
from dataclasses import asdict, dataclass, replace
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .model_folder import find_file

CALIBRATION_FILE = "calibration.json"
MAX_SHARE_LOST = 0.05  # of the correctly called validation cells, by the threshold


@dataclass(frozen=True)
class Calibration:
    """What turns logits into probabilities that can be believed, and when to call a cell "unassigned".

    Args:
        temperature: what logits are divided by; above 1 for a model that is too sure.
        unassigned_below: the confidence (largest probability) below which a cell is unassigned; 0: none is.
    Raises: ValueError: for a temperature that is not above 0, or a threshold that is no probability.
    """

    temperature: float
    unassigned_below: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ValueError(f"temperature is {self.temperature}; it must be above 0 and finite.")
        if not 0 <= self.unassigned_below <= 1:
            raise ValueError(f"unassigned_below is {self.unassigned_below}; it must be a probability, 0 to 1.")

    @classmethod
    def fit(cls, logits: Tensor, labels: Tensor) -> "Calibration":
        """Calibrate on cells that the model was not trained on.

        The temperature minimises the negative log likelihood, with the true class taken as 1 / (N + 2) short of
        certain: without that, a model that calls all validation cells right would get a temperature of 0. The threshold
        is the largest, in steps of 0.0001, that at most 5 % of the correctly called cells fall below.

        Args:
            logits: `(N, C)`.
            labels: `(N,)` int64, the true classes.
        Raises: ValueError: for no cells, shapes or labels that do not fit, logits that are not finite, or if no cell is
            called right.
        Source: Guo et al. 2017 (temperature scaling); Platt 1999 (targets short of certain).
        """
        _check(logits, labels)
        logits, labels = logits.detach().double().cpu(), labels.cpu()
        calibration = cls(_fit_temperature(logits, labels), unassigned_below=0.0)
        confidence, called = calibration.probabilities(logits).max(dim=-1)
        right = confidence[called == labels].sort().values
        if not len(right):
            raise ValueError(
                f"The model calls none of the {len(labels):,} validation cells right, so there is no confidence to "
                "trust: train it longer, or on more cells."
            )
        threshold = float(right[int(MAX_SHARE_LOST * len(right))])
        # Rounded down, so that a cell on the threshold stays there when its last digits move with its batch.
        return replace(calibration, unassigned_below=max(0, math.floor(threshold * 1e4 - 0.5)) / 1e4)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Calibrated probabilities, float32 `(N, C)`."""
        return (logits.float() / self.temperature).softmax(dim=-1)

    def save(self, folder: str | PathLike[str]) -> Path:
        """Write `calibration.json` into a model's folder; returns the file."""
        path = Path(folder) / CALIBRATION_FILE
        unfinished = path.with_name(f".{CALIBRATION_FILE}.unfinished")
        unfinished.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")
        return unfinished.replace(path)

    @classmethod
    def load(cls, model: str | PathLike[str] | PreTrainedModel) -> "Calibration | None":
        """The calibration that lies with a model: a folder, a Hub id, or a loaded model that came from one.

        Returns: `None` where there is none.
        Raises: ValueError: for a file that is no calibration.
        """
        name, revision = str(model), None
        if isinstance(model, PreTrainedModel):
            name, revision = model.config._name_or_path, getattr(model.config, "_commit_hash", None)
        path = find_file(name, CALIBRATION_FILE, revision=revision) if name else None
        if path is None:
            return None
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            return cls(float(content["temperature"]), float(content["unassigned_below"]))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is no calibration ({error!r}); fit and save it again.") from error


def _fit_temperature(logits: Tensor, labels: Tensor) -> float:
    log_inverse = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([log_inverse], max_iter=100, line_search_fn="strong_wolfe")
    smoothing = 1 / (len(labels) + 2)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(logits * log_inverse.exp(), labels, label_smoothing=smoothing)
        loss.backward()
        return loss

    optimizer.step(closure)
    return float((-log_inverse.detach()).exp())


def _check(logits: Tensor, labels: Tensor) -> None:
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or not len(labels):
        raise ValueError(
            f"logits have shape {tuple(logits.shape)} and labels {tuple(labels.shape)}; calibration takes (N, C) and "
            "(N,), of at least one cell."
        )
    if not torch.isfinite(logits).all():
        cell = int((~torch.isfinite(logits)).any(dim=1).nonzero()[0])
        raise ValueError(f"The logits of validation cell {cell} are not finite: training went astray.")
    is_class = (labels >= 0) & (labels < logits.shape[1])
    if not is_class.all():
        wrong = int(labels[~is_class][0])
        raise ValueError(f"labels hold {wrong}, but the classes are 0 to {logits.shape[1] - 1}.")
