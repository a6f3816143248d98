"""The house keeps its shape: imports point one way, and no bare folder name is imported."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

FOLDERS = (
    "configuration",
    "corpus",
    "evaluation",
    "inference",
    "modeling_scfoundation",
    "tokenization",
    "trainer_scripts",
)


def imported_modules(path: Path) -> list[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.append(node.module or "")
    return names


def test_import_direction(repository):
    script = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports())"
    run = subprocess.run([sys.executable, "-c", script], cwd=repository, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.parametrize("folder", [*FOLDERS, "src", "tests", "examples", "benchmarks"])
def test_nothing_imports_a_bare_folder_name(repository, folder):
    offenders = [
        f"{path.relative_to(repository)}: {name}"
        for path in (repository / folder).rglob("*.py")
        for name in imported_modules(path)
        if name.split(".")[0] in FOLDERS
    ]
    assert offenders == []


def test_every_package_folder_is_packaged(repository):
    configuration = tomllib.loads((repository / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    found = {
        "scfoundation_hf." + ".".join(path.parent.relative_to(repository).parts)
        for folder in FOLDERS
        for path in (repository / folder).rglob("__init__.py")
    }
    assert {"scfoundation_hf", *found} == set(configuration["packages"])


def test_what_the_hub_will_load_imports_only_what_is_there(repository):
    """The files that an export copies must work with torch, transformers, numpy, scipy and safetensors alone."""
    allowed = {"torch", "transformers", "numpy", "scipy", "safetensors", "huggingface_hub", "scfoundation_hf"}
    exported = [
        *(repository / "modeling_scfoundation").glob("*.py"),
        repository / "configuration" / "configuration_scfoundation.py",
        *(
            repository / "tokenization" / f"{name}.py"
            for name in (
                "tokenization_scfoundation",
                "prepared_cells",
                "matrix_reader",
                "gene_vocabulary",
                "read_depth",
                "data_collator",
            )
        ),
    ]
    for path in exported:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        guarded = {id(inner) for node in ast.walk(tree) if isinstance(node, ast.Try) for inner in ast.walk(node)}
        for node in ast.walk(tree):
            if not isinstance(node, ast.Import | ast.ImportFrom) or id(node) in guarded or getattr(node, "level", 0):
                continue
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            foreign = [
                module
                for module in modules
                if module.split(".")[0] not in allowed and module.split(".")[0] not in sys.stdlib_module_names
            ]
            assert foreign == [], f"{path.name} imports {foreign} unguarded"
