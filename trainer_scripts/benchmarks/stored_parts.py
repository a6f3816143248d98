"""Results of single measurements, each in a file of its own at once, so that a run that was killed goes on."""

import json
import math
import shutil
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from scfoundation_hf.corpus.whole_files import write_json, write_whole
from scfoundation_hf.inference.writer import check_parent

PARTS = "parts"


class StoredParts:
    """A benchmark's output folder and the parts in it, `parts/<key>.json`.

    Args:
        folder: made where it is missing; an earlier run's is gone on with.
        depends_on: what all parts depend on, JSON-able: a part that was measured with other settings is refused.
        overwrite: throw away the parts there are.
    Raises: FileNotFoundError: if the folder above is missing; FileExistsError: for a folder that is not a benchmark's.
    """

    def __init__(self, folder: Path, *, depends_on: Mapping[str, Any], overwrite: bool) -> None:
        check_parent(folder)
        self.folder, self.depends_on = folder, {"version": version("scfoundation-hf"), **depends_on}
        if folder.exists() and not (folder / PARTS).is_dir() and any(folder.iterdir()):
            raise FileExistsError(f"{folder} was not made by a benchmark, so nothing is written there; choose another.")
        if overwrite and (folder / PARTS).is_dir():
            shutil.rmtree(folder / PARTS)
        (folder / PARTS).mkdir(parents=True, exist_ok=True)

    def get(
        self, key: Mapping[str, Any], measure: Callable[[], Mapping[str, Any]], *, depends_on: Mapping[str, Any]
    ) -> dict[str, Any]:
        """The part of this key: read, or measured and written.

        Args:
            key: names the part, such as data set, method, rate and seed.
            depends_on: what this part depends on beyond key and folder, JSON-able.
        Raises: ValueError: if the folder holds a part of this key that was measured with other settings.
        """
        path = self.folder / PARTS / ("--".join(str(value).replace("/", "_") for value in key.values()) + ".json")
        identity = json.loads(json.dumps({**self.depends_on, **depends_on}))
        if path.is_file():
            stored = json.loads(path.read_text(encoding="utf-8"))
            differing = [name for name in identity if stored["depends_on"].get(name) != identity[name]]
            if differing:
                raise ValueError(
                    f"{path} was measured with another {' and another '.join(differing)}. Choose another folder, or "
                    "pass overwrite=True (--overwrite) to measure everything anew."
                )
            return dict(stored["result"])
        text = json.dumps({"depends_on": identity, "result": without_nan(measure())}, allow_nan=False)
        write_whole(path, lambda file: file.write(text.encode()))
        return dict(json.loads(text)["result"])

    def write_results(self, results: Mapping[str, Any], tables: str) -> None:
        """Write `results.json` and `tables.md`, each whole."""
        write_json(self.folder / "results.json", without_nan(results))
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
