"""Sphinx configuration: `python -m sphinx -W --keep-going -b html docs docs/_build/html`; needs no network."""

import re
from importlib.metadata import version as installed_version
from typing import Any

project = "scfoundation-hf"
author = "the scfoundation-hf maintainers"
project_copyright = author
release = version = installed_version("scfoundation-hf")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build", "benchmarks/*/*.md"]  # tables that pages include

html_theme = "furo"
html_title = f"scfoundation-hf {release}"
html_show_sourcelink = False

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3

# The docstrings are Google style with Markdown's single backticks.
default_role = "literal"
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_custom_sections = ["Source"]
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_display_short_literal_types = True
python_maximum_signature_line_length = 90
add_module_names = False
toc_object_entries_show_parents = "hide"

# "Returns: text" on one line, as the docstrings write it, which napoleon would take for a sentence.
_ONE_LINE_SECTION = re.compile(r"(\s*)(Returns|Raises|Source): (\S.*)")
_NEXT_EXCEPTION = re.compile(r"[;.] (?=(?:\w+Error, )*\w+Error\b)")
_SEVERAL_NAMES = re.compile(r"(\s*)((?:\w+, )+\w+): (\S.*)")
_ARGUMENT_LIST = re.compile(r"\s+(\w+, )+\w+,")


def unfold_docstring(app: object, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Put one-line sections into the form napoleon reads, and make indented examples code."""
    rest = _join_argument_lists(lines)
    if what == "property":  # napoleon would read "text: more text" as a type
        rest[0] = rest[0].replace(": ", " – ")
    in_attributes = False
    unfolded: list[str] = []
    while rest:
        line = rest.pop(0)
        in_attributes = line.strip() == "Attributes:" or (in_attributes and bool(line.strip()))
        section = _ONE_LINE_SECTION.fullmatch(line)
        if in_attributes and _SEVERAL_NAMES.fullmatch(line):
            unfolded += _one_line_a_name(_with_continuation(line, rest))
        elif section:
            indent, title = section[1], section[2]
            text = _with_continuation(line, rest).split(": ", maxsplit=1)[1]
            entries = [text]
            if title == "Raises":
                entries = [name for entry in _NEXT_EXCEPTION.split(text) for name in _one_line_a_name(entry)]
            unfolded += ["", f"{indent}{title}:", *(f"{indent}    {entry}" for entry in entries)]
        elif line.endswith(":") and len(rest) > 1 and not rest[0] and _is_deeper(rest[1], line):
            unfolded.append(f"{line}:")
        else:
            unfolded.append(line)
    lines[:] = unfolded


def _join_argument_lists(lines: list[str]) -> list[str]:
    """A list of arguments that share one description, broken over two lines, as one line."""
    joined: list[str] = []
    for line in lines:
        if joined and _ARGUMENT_LIST.fullmatch(joined[-1]) and line.strip():
            joined[-1] += f" {line.strip()}"
        else:
            joined.append(line)
    return joined


def _with_continuation(line: str, rest: list[str]) -> str:
    """The line and the deeper ones behind it, which are taken from `rest`, as one."""
    text = line
    while rest and _is_deeper(rest[0], line):
        text += f" {rest.pop(0).strip()}"
    return text


def _one_line_a_name(line: str) -> list[str]:
    """`a, b: text` as `a: text` and `b: text`."""
    several = _SEVERAL_NAMES.fullmatch(line)
    if not several:
        return [line]
    return [f"{several[1]}{name}: {several[3]}" for name in several[2].split(", ")]


def _is_deeper(line: str, than: str) -> bool:
    return bool(line.strip()) and len(line) - len(line.lstrip()) > len(than) - len(than.lstrip())


def setup(app: Any) -> None:
    """Run before napoleon, whose priority is 500."""
    app.connect("autodoc-process-docstring", unfold_docstring, priority=400)
