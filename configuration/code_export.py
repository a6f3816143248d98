"""The code of a model or tokenizer, copied beside its files in the flat form that the Hub's loader runs.

The loader of `trust_remote_code=True` follows relative imports within one directory and nothing else. So a class's
module is copied with all it imports of this package, and an import from another folder becomes a relative one.
This file travels along, so that a model loaded that way can be saved with its code again.
"""

import ast
import sys
from importlib.util import find_spec
from os import PathLike
from pathlib import Path

PACKAGE = "scfoundation_hf"
LICENSE_LINE = "# Part of scfoundation-hf. SPDX-License-Identifier: Apache-2.0\n"


def flat_code(cls: type) -> dict[str, str]:
    """Source of the module of `cls` and of every module of this package that it needs, by file name.

    Imports within `try:` stay as they are: they stand for what the copy does without.

    Raises: ValueError: if two modules share a file name, or an import has a form that cannot be made relative.
    """
    module = sys.modules[cls.__module__]
    assert module.__file__ is not None
    waiting = [Path(module.__file__)]
    paths: dict[str, Path] = {}
    sources: dict[str, str] = {}
    while waiting:
        path = waiting.pop()
        if paths.setdefault(path.name, path) != path:
            raise ValueError(f"{path} and {paths[path.name]} would be one file in a flat folder; rename one.")
        if path.name not in sources:
            sources[path.name], needed = _flatten(path)
            waiting += needed
    return dict(sorted(sources.items()))


def save_code(cls: type, folder: str | PathLike[str]) -> list[Path]:
    """Write `flat_code` of `cls` into `folder`; returns the files."""
    written = []
    for name, source in flat_code(cls).items():
        path = Path(folder) / name
        path.write_text(source, encoding="utf-8", newline="\n")
        written.append(path)
    return written


def _flatten(path: Path) -> tuple[str, list[Path]]:
    """A module's source with every import of this package relative, and the modules imported so."""
    source = path.read_text(encoding="utf-8")
    tree = ast.parse(source)
    optional = {id(inner) for node in ast.walk(tree) if isinstance(node, ast.Try) for inner in ast.walk(node)}
    lines, needed = source.splitlines(keepends=True), []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            module = next((alias.name for alias in node.names if alias.name.split(".")[0] == PACKAGE), None)
            is_relative = False
        elif isinstance(node, ast.ImportFrom):
            module, is_relative = node.module, node.level > 0
        else:
            continue
        if id(node) in optional or not (is_relative or (module or "").split(".")[0] == PACKAGE):
            continue
        if isinstance(node, ast.Import) or module is None or (is_relative and (node.level > 1 or "." in module)):
            raise ValueError(
                f"{path}, line {node.lineno}: write `from <module> import <name>`, so that it can be copied."
            )
        leaf = module.rpartition(".")[2]
        if is_relative:
            needed.append(path.with_name(f"{leaf}.py"))
            continue
        spec = find_spec(module)
        assert spec is not None
        assert spec.origin is not None
        needed.append(Path(spec.origin))
        lines[node.lineno - 1] = lines[node.lineno - 1].replace(f"from {module} import", f"from .{leaf} import", 1)
    if lines[0] != LICENSE_LINE:
        lines.insert(0, LICENSE_LINE)
    return "".join(lines), needed
