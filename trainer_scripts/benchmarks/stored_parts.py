"""Results of single measurements, each in a file of its own at once, so that a run that was killed goes on."""

import json
import math
import shutil
from collections.abc import Callable, Mapping
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np

from scfoundation_hf.corpus.whole_files import write_json, write_whole
from scfoundation_hf.inference.writer import check_parent

PARTS = "parts"
Remeasure = Literal["nothing", "model", "everything"]
OF_THE_MODEL = {"model", "configuration"}  # what parts depend on, by `what_weights_are`
PART_FIELDS = {"depends_on", "result", "measured"}


class StoredParts:
    """A benchmark's output folder and the parts in it, `parts/<key>.json`.

    Args:
        folder: made where it is missing; an earlier run's is gone on with.
        depends_on: what all parts depend on, JSON-able: a part that was measured with other settings is refused.
        remeasure: of the parts there are: nothing, those of another model once they are asked for, or everything,
            which is thrown away at once.
    Raises: FileNotFoundError: if the folder above is missing; FileExistsError: for a folder that is not a benchmark's.
    """

    def __init__(self, folder: Path, *, depends_on: Mapping[str, Any], remeasure: Remeasure = "nothing") -> None:
        check_parent(folder)
        self.folder, self.depends_on = folder, {"version": version("scfoundation-hf"), **depends_on}
        self.remeasure = remeasure
        self._days: set[str] = set()  # on which the parts asked for were measured
        if folder.exists() and not (folder / PARTS).is_dir() and any(folder.iterdir()):
            raise FileExistsError(f"{folder} was not made by a benchmark, so nothing is written there; choose another.")
        if remeasure == "everything" and (folder / PARTS).is_dir():
            shutil.rmtree(folder / PARTS)
        (folder / PARTS).mkdir(parents=True, exist_ok=True)

    def get(
        self, key: Mapping[str, Any], measure: Callable[[], Mapping[str, Any]], *, depends_on: Mapping[str, Any]
    ) -> dict[str, Any]:
        """The part of this key: read, or measured and written.

        Args:
            key: names the part, such as data set, method, rate and seed.
            depends_on: what this part depends on beyond key and folder, JSON-able.
        Raises: ValueError: if the folder holds a part of this key that was measured with other settings, or that
            another version of this package wrote.
        """
        path = self.folder / PARTS / ("--".join(str(value).replace("/", "_") for value in key.values()) + ".json")
        identity = json.loads(json.dumps({**self.depends_on, **depends_on}))
        if path.is_file():
            stored = json.loads(path.read_text(encoding="utf-8"))
            if missing := PART_FIELDS - stored.keys():
                raise ValueError(
                    f"{path} has no {' and no '.join(sorted(missing))}: another version of this package wrote it. "
                    "Choose another folder, or pass remeasure='everything' (--remeasure everything)."
                )
            differing = [name for name in identity if stored["depends_on"].get(name) != identity[name]]
            if not differing:
                self._days.add(stored["measured"])
                return dict(stored["result"])
            if not OF_THE_MODEL.issuperset(differing):
                raise ValueError(
                    f"{path} was measured with another {' and another '.join(differing)}. Choose another folder, or "
                    "pass remeasure='everything' (--remeasure everything)."
                )
            if self.remeasure != "model":
                raise ValueError(
                    f"{path} was measured with another model. Choose another folder, or pass remeasure='model' "
                    "(--remeasure model), which keeps what does not depend on the model."
                )
        part = {"depends_on": identity, "result": without_nan(measure()), "measured": date.today().isoformat()}
        text = json.dumps(part, allow_nan=False)
        write_whole(path, lambda file: file.write(text.encode()))
        self._days.add(part["measured"])
        return dict(json.loads(text)["result"])

    def write_results(self, results: Mapping[str, Any], tables: str) -> None:
        """Write `results.json` and `tables.md`, each whole, with the days on which the parts were measured."""
        days = sorted(self._days)
        write_json(self.folder / "results.json", without_nan({**results, "measured": days}))
        if len(days) > 1:
            tables += f"\nMeasured on {', '.join(days)}; seconds and memory of different days need not compare.\n"
        write_whole(self.folder / "tables.md", lambda file: file.write(tables.encode()))


def without_nan(value: Any) -> Any:
    """Plain lists and numbers, undefined ones as null: NaN is no JSON."""
    if isinstance(value, Mapping):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
