"""Source code made flat: what is followed, what is rewritten, what is refused."""

import sys

import pytest

from scfoundation_hf.configuration.code_export import LICENSE_LINE, flat_code, save_code


@pytest.fixture
def make_class(tmp_path, monkeypatch):
    """Write modules of a package that bears this package's name, and give a class of one of them."""

    def make(**sources: str) -> type:
        for name, source in sources.items():
            path = tmp_path / f"{name.replace('__', '/')}.py"
            path.parent.mkdir(exist_ok=True)
            path.write_text(source)
        module = type(sys)("start")
        module.__file__ = str(tmp_path / "part" / "start.py")
        monkeypatch.setitem(sys.modules, "start_of_flat_code", module)
        return type("Start", (), {"__module__": "start_of_flat_code"})

    return make


def test_imports_are_followed_and_those_from_other_folders_made_relative(make_class, tmp_path):
    start = make_class(
        part__start=(
            '"""Doc."""\nimport math\nfrom scfoundation_hf.configuration.code_export import (\n    flat_code,\n)\n'
            "from .near import name\n"
        ),
        part__near="import numpy\n",
    )
    code = flat_code(start)
    assert list(code) == ["code_export.py", "near.py", "start.py"]
    assert code["start.py"] == (
        LICENSE_LINE
        + '"""Doc."""\nimport math\nfrom .code_export import (\n    flat_code,\n)\nfrom .near import name\n'
    )
    assert code["near.py"] == LICENSE_LINE + "import numpy\n"
    files = save_code(start, tmp_path)
    assert {file.name: file.read_text() for file in files} == code


def test_code_that_was_exported_is_exported_as_it_is(make_class):
    source = LICENSE_LINE + '"""Doc."""\n'
    assert flat_code(make_class(part__start=source)) == {"start.py": source}


def test_what_may_be_missing_stays(make_class):
    source = "try:\n    from scfoundation_hf.tokenization import anndata_reader\nexcept ImportError:\n    pass\n"
    assert flat_code(make_class(part__start=source)) == {"start.py": LICENSE_LINE + source}


@pytest.mark.parametrize(
    "line",
    [
        "import scfoundation_hf.configuration",
        "from . import near",
        "from .vocabulary.build import x",
        "from ..other import y",
    ],
)
def test_other_forms_are_refused(make_class, line):
    with pytest.raises(ValueError, match=r"start\.py, line 2: write `from <module> import <name>`"):
        flat_code(make_class(part__start=f"x = 1\n{line}\n"))


def test_two_files_of_one_name_are_refused(make_class):
    start = make_class(
        part__start="from .code_export import x\nfrom scfoundation_hf.configuration.code_export import y\n",
        part__code_export="",
    )
    with pytest.raises(ValueError, match="would be one file in a flat folder; rename one"):
        flat_code(start)
