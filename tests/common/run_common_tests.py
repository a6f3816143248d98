"""Run transformers' own common model and configuration tests on our models: `make test-common`.

The mixins are in the sdist of transformers, not in its wheel, so this fetches the sdist of the installed version
once, takes its `tests/` out of it and runs `common_test_scfoundation.py` against them.
"""

import argparse
import os
import subprocess
import sys
import tarfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
DOCUMENT = REPOSITORY / "docs" / "common-tests.md"
sys.path.insert(0, str(HERE))

from not_applicable import is_listed, render_document  # noqa: E402

# What the mixins import from other folders of transformers' tests, which the sdist does not hold.
STUBS = {
    "__init__.py": "",
    "exporters/__init__.py": "",
    "exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    "generation/__init__.py": "",
    "generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
    "utils/__init__.py": "",
    # A value unlike its default for every field that PreTrainedConfig itself takes.
    "utils/test_configuration_utils.py": """config_common_kwargs = {
    "return_dict": False,
    "output_hidden_states": True,
    "output_attentions": True,
    "dtype": "float16",
    "chunk_size_feed_forward": 5,
    "architectures": ["ScFoundationModel"],
    "id2label": {0: "label"},
    "label2id": {"label": "0"},
    "problem_type": "regression",
}
""",
}


def download_sdist(cache: Path, release: str) -> Path:
    """The sdist of this release of transformers, fetched by pip unless the cache has it."""
    sdist = cache / f"transformers-{release}.tar.gz"
    if not sdist.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
        subprocess.run([*command, "--dest", str(cache), f"transformers=={release}"], check=True)
    return sdist


def unpack_tests(sdist: Path, release: str, cache: Path) -> Path:
    """Put transformers' `tests/*.py` and the stubs into a package `transformers_tests`; returns its parent.

    Raises: ValueError: if the sdist is not of the installed release.
    """
    if sdist.name != f"transformers-{release}.tar.gz":
        raise ValueError(f"{sdist.name} is not the sdist of the installed transformers, {release}.")
    parent = cache / f"transformers-{release}"
    package = parent / "transformers_tests"
    for name, source in STUBS.items():
        path = package / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source, encoding="utf-8")
    with tarfile.open(sdist) as archive:
        for member in archive.getmembers():
            folder, _, name = member.name.rpartition("/")
            if folder == f"transformers-{release}/tests" and name.endswith(".py"):
                file = archive.extractfile(member)
                assert file is not None
                (package / name).write_bytes(file.read())
    (parent / "pytest.ini").write_text("[pytest]\n", encoding="utf-8")  # not ours: their marks, their warnings
    return parent


def summarise(report: Path) -> list[str]:
    """Print the counts of the run; returns tests that were skipped though docs/common-tests.md does not list them."""
    outcomes: Counter[str] = Counter()
    unlisted = set()
    for case in ElementTree.parse(report).iter("testcase"):
        outcome = next((child.tag for child in case if child.tag in ("skipped", "failure", "error")), "passed")
        outcomes[outcome] += 1
        if outcome == "skipped" and not is_listed(case.get("name", "")):
            unlisted.add(case.get("name", ""))
    print(", ".join(f"{number} {name}" for name, number in outcomes.items()), "(subtests not counted)")
    return sorted(unlisted)


def main() -> int:
    """Run the tests, or write the list of those that do not apply."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sdist", type=Path, help="a transformers sdist on disk, instead of downloading it")
    parser.add_argument("--cache", type=Path, default=REPOSITORY / "build" / "common-tests")
    parser.add_argument("--write-document", action="store_true", help="only write docs/common-tests.md")
    arguments, pytest_arguments = parser.parse_known_args()
    if arguments.write_document:
        DOCUMENT.write_text(render_document(), encoding="utf-8")
        return 0
    release = version("transformers")
    sdist = arguments.sdist or download_sdist(arguments.cache, release)
    parent = unpack_tests(sdist, release, arguments.cache)
    report = parent / "report.xml"
    paths = [str(parent), os.environ.get("PYTHONPATH", "")]
    command = [sys.executable, "-m", "pytest", "-q", "-c", str(parent / "pytest.ini"), f"--junitxml={report}"]
    completed = subprocess.run(
        [*command, str(HERE / "common_test_scfoundation.py"), *pytest_arguments],
        cwd=parent,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "HF_HUB_OFFLINE": "1"},
        check=False,
    )
    if unlisted := summarise(report):
        print(f"Skipped, but not listed in tests/common/not_applicable.py: {', '.join(unlisted)}.")
        return 1
    return completed.returncode


if __name__ == "__main__":
    sys.exit(main())
