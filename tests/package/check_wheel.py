"""Look into a built wheel: one top-level name, the data files, and that it works installed on its own.

python tests/package/check_wheel.py dist/*.whl
"""

import os
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from pathlib import Path

DATA_FILES = (
    "scfoundation_hf/py.typed",
    "scfoundation_hf/configuration/presets/3m.json",
    "scfoundation_hf/configuration/presets/10m.json",
    "scfoundation_hf/configuration/presets/100m.json",
    "scfoundation_hf/tokenization/vocabulary/gene_vocabulary.tsv",
    "scfoundation_hf/tokenization/vocabulary/README.md",
    "scfoundation_hf/trainer_scripts/model_card_template.md",
    "scfoundation_hf/trainer_scripts/recipes/pretrain-3m.yaml",
)
USE = """
import scfoundation_hf
from pathlib import Path
assert Path(scfoundation_hf.__file__).is_relative_to({target!r}), scfoundation_hf.__file__
assert len(scfoundation_hf.GeneVocabulary.default()) == 19264
assert all(hasattr(scfoundation_hf, name) for name in scfoundation_hf.__all__)
assert scfoundation_hf.ScFoundationConfig.from_preset("100m").hidden_size == 768
"""


def check(wheel: Path) -> None:
    """Raise if the wheel is not as it should be."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    dist_info = f"{'-'.join(wheel.name.split('-')[:2])}.dist-info"
    top_level = {name.split("/")[0] for name in names}
    assert top_level == {"scfoundation_hf", dist_info}, f"top-level names: {sorted(top_level)}"
    missing = [name for name in DATA_FILES if name not in names]
    assert not missing, f"missing data files: {missing}"
    licences = [f"{dist_info}/licenses/{name}" for name in ("LICENSE", "NOTICE")]
    assert all(name in names for name in licences), "LICENSE and NOTICE must travel along"
    sources = {name for name in names if name.endswith(".py")}
    absent = [str(path) for path in expected_sources() if str(path) not in sources]
    assert not absent, f"source files that the wheel lacks: {absent}"
    with tempfile.TemporaryDirectory() as target:
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", target, str(wheel)]
        subprocess.run(install, check=True)
        environment = {**os.environ, "PYTHONPATH": target, "HF_HUB_OFFLINE": "1"}
        subprocess.run([sys.executable, "-c", USE.format(target=target)], check=True, cwd=target, env=environment)


def expected_sources() -> list[Path]:
    """Every module of the repository, under the name it has in the wheel."""
    root = Path(__file__).resolve().parents[2]
    mapping = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["package-dir"]
    folders = [folder for package, folder in mapping.items() if package != "scfoundation_hf"]
    mapped = [path.relative_to(root) for folder in folders for path in (root / folder).rglob("*.py")]
    face = [path.relative_to(root / "src" / "scfoundation_hf") for path in (root / "src").rglob("*.py")]
    return [Path("scfoundation_hf") / path for path in mapped + face]


if __name__ == "__main__":
    check(Path(sys.argv[1]))
    print(f"{sys.argv[1]}: as it should be")
