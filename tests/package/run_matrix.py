"""Run tests with the oldest and the newest versions that pyproject.toml allows of what we build on: `make test-matrix`.

python tests/package/run_matrix.py [oldest] [newest] [-- arguments of pytest]

Each set has a virtual environment under build/matrix/, and a second one without this package, in which the remote code
is loaded. Where the last release is not the one pinned in constraints.txt, "newest" is how a break is found early.
"""

import os
import re
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / "matrix"
VARIED = ("transformers", "datasets", "anndata", "huggingface-hub")
REMOTE_CODE = ("torch", "transformers", "numpy", "scipy", "safetensors")
TESTS = ("tests/package", "tests/configuration", "tests/tokenization", "tests/modeling_scfoundation", "tests/inference")


def pins(kind: str) -> list[str]:
    """Requirements that fix the varied packages at their lower bound, or leave them at the last release allowed.

    All other packages stay at the versions of constraints.txt, so that a failure points at one of the varied.
    """
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    chosen = []
    for dependency in dependencies:
        name = re.split(r"[<>=!~ ]", dependency, maxsplit=1)[0]
        if name in VARIED:
            lowest = re.search(r">=([\d.]+)", dependency)
            assert lowest is not None, dependency
            chosen.append(f"{name}=={lowest[1]}" if kind == "oldest" else dependency)
    return chosen


def constraints(kind: str) -> Path:
    """The project's constraints without the varied packages and what only they bring (their HTTP client)."""
    free = {
        name.replace("-", "_") for name in (*VARIED, "fsspec", "httpx", "httpcore", "httpx2", "httpcore2", "tokenizers")
    }
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    path = FOLDER / f"{kind}-constraints.txt"
    kept = [
        line for line in lines if line.partition("==")[0].replace("-", "_").lower() not in free | {"scfoundation_hf"}
    ]
    path.write_text("\n".join(kept) + "\n", encoding="utf-8")
    return path


def environment(name: str, *requirements: str, limits: Path) -> str:
    """The interpreter of a virtual environment with these requirements."""
    folder = FOLDER / name
    if not folder.is_dir():
        venv.create(folder, with_pip=True)
    python = str(folder / "bin" / "python")
    install = [python, "-m", "pip", "install", "--quiet", "--upgrade", "--constraint", str(limits), *requirements]
    subprocess.run(install, check=True, cwd=ROOT)
    return python


def run(kind: str, arguments: list[str]) -> int:
    """Test one set; returns pytest's exit code."""
    limits, chosen = constraints(kind), pins(kind)
    names = [re.split(r"[<>=]", pin, maxsplit=1)[0] for pin in chosen]
    of_transformers = [pin for pin in chosen if not pin.startswith(("datasets", "anndata"))]
    remote = environment(f"{kind}-remote", *of_transformers, *REMOTE_CODE, limits=limits)
    python = environment(kind, "torch", "setuptools", limits=limits)
    strict = ["--config-settings", "editable_mode=strict", "--editable", ".[train,analysis,onnx,annotate,mapping,dev]"]
    python = environment(kind, *chosen, *strict, limits=limits)
    report = f"import importlib.metadata as m; print({kind!r}, *(f'{{n}} {{m.version(n)}}' for n in {names}), sep=', ')"
    subprocess.run([python, "-c", report], check=True)
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    variables |= {"SCFOUNDATION_REMOTE_PYTHON": remote, "HF_HUB_OFFLINE": "1"}
    own_environment = "tests/package/test_hub_export.py::test_it_works_in_an_environment_of_its_own"
    chosen_tests = arguments or ["-m", "not slow", *TESTS]
    code = 0
    for tests in ([own_environment], chosen_tests):
        code |= subprocess.run([python, "-m", "pytest", "-q", *tests], cwd=ROOT, env=variables).returncode
    return code


def main() -> None:
    """Test the sets that were named, or both."""
    words = sys.argv[1:]
    arguments = words[words.index("--") + 1 :] if "--" in words else []
    kinds = words[: words.index("--") if "--" in words else None] or ["oldest", "newest"]
    if unknown := set(kinds) - {"oldest", "newest"}:
        sys.exit(f"There is no set {', '.join(unknown)}; choose oldest or newest.")
    FOLDER.mkdir(parents=True, exist_ok=True)
    codes = {kind: run(kind, arguments) for kind in kinds}
    print("; ".join(f"{kind}: {'passed' if code == 0 else 'FAILED'}" for kind, code in codes.items()))
    sys.exit(max(codes.values()))


if __name__ == "__main__":
    main()
