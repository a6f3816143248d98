"""The documentation builds without a warning, and its examples run.

Every ```python block of docs/*.md and README.md is run, in order and in one process per file, unless the line
before it is `<!-- not run: REASON -->`. The working directory holds `cells.h5ad` (80 of the example cells, so that
it is quick) and the reference model: `scfoundation-3m` for docs/, `examples/reference-model` for the README. Lines that
begin with the command `scfoundation` are not run, but their options must exist.
"""

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import anndata
import pytest
import typer

from scfoundation_hf.cli import app

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.glob("*.md"), *ROOT.glob("README.md")])
NOT_RUN = re.compile(r"<!-- not run: \S.* -->")


class Block(NamedTuple):
    language: str
    first_line: int  # of the code, counted from 0
    code: list[str]
    before: str  # the last line before the block that is not empty


def blocks(page: Path) -> Iterator[Block]:
    lines = page.read_text(encoding="utf-8").splitlines()
    number, before = 0, ""
    while number < len(lines):
        fence = re.fullmatch(r"\s*```\s*(\S*).*", lines[number])
        if fence:
            end = next(n for n in range(number + 1, len(lines)) if lines[n].strip() == "```")
            yield Block(fence[1], number + 1, lines[number + 1 : end], before)
            number, before = end, ""
        elif lines[number].strip():
            before = lines[number].strip()
        number += 1


def script(page: Path) -> str:
    """The page's runnable code, on the lines it has in the page, so that a traceback names the page's lines."""
    lines = [""] * len(page.read_text(encoding="utf-8").splitlines())
    for block in blocks(page):
        if block.language == "python" and not NOT_RUN.fullmatch(block.before):
            lines[block.first_line : block.first_line + len(block.code)] = block.code
    return "\n".join(lines).rstrip()


def names(pages: list[Path]) -> list[str]:
    return [str(page.relative_to(ROOT)) for page in pages]


@pytest.fixture(scope="module")
def workplace(example_cells: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("docs")
    anndata.read_h5ad(example_cells)[::10].copy().write_h5ad(folder / "cells.h5ad")
    for name in ("scfoundation-3m", "examples/reference-model"):
        shutil.copytree(ROOT / "examples" / "reference-model", folder / name)
    return folder


RUNNABLE = [page for page in PAGES if script(page)]


@pytest.mark.slow
@pytest.mark.parametrize("page", RUNNABLE, ids=names(RUNNABLE))
def test_examples_run(page: Path, workplace: Path, tmp_path: Path) -> None:
    shutil.copytree(workplace, tmp_path / "work")
    copy = tmp_path / f"{page.stem}.py"
    copy.write_text(script(page), encoding="utf-8")
    run = subprocess.run(
        [sys.executable, copy],
        cwd=tmp_path / "work",
        env=os.environ | {"MPLBACKEND": "Agg"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, f"{page.relative_to(ROOT)} (line numbers are the page's):\n{run.stderr[-4000:]}"


def commands(page: Path) -> Iterator[str]:
    for line in page.read_text(encoding="utf-8").replace("\\\n", " ").splitlines():
        command = line.strip().removeprefix("$ ")
        if command.startswith("scfoundation "):
            yield command


COMMANDS = [(page, command) for page in PAGES for command in commands(page)]


@pytest.mark.parametrize("command", [command for _, command in COMMANDS], ids=names([page for page, _ in COMMANDS]))
def test_commands_exist(command: str) -> None:
    subcommand, *arguments = shlex.split(command, comments=True)[1:]
    commands_of_app = typer.main.get_command(app).commands
    assert subcommand in commands_of_app, command
    if "--help" not in arguments:
        commands_of_app[subcommand].make_context(subcommand, arguments)  # raises for what it does not know


@pytest.mark.parametrize("command", [command for _, command in COMMANDS], ids=names([page for page, _ in COMMANDS]))
def test_commands_write_to_no_source_folder(command: str) -> None:
    folders = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert not folders & set(shlex.split(command, comments=True)), "whoever runs it in a clone's root is refused"


@pytest.mark.slow
def test_documentation_builds_without_warnings(tmp_path: Path) -> None:
    for package in ("sphinx", "myst_parser", "furo"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    sphinx = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html"]
    build = subprocess.run(
        [*sphinx, "-d", tmp_path / "doctrees", DOCS, tmp_path / "html"], capture_output=True, text=True, timeout=600
    )
    assert build.returncode == 0, build.stderr[-4000:]
    assert (tmp_path / "html" / "index.html").is_file()
