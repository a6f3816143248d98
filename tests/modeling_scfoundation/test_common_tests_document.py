import runpy
import subprocess
import sys
from pathlib import Path


def test_the_page_is_what_the_list_says(repository: Path):
    """Else: python tests/common/run_common_tests.py --write-document"""
    listed = runpy.run_path(str(repository / "tests" / "common" / "not_applicable.py"))
    assert (repository / "docs" / "common-tests.md").read_text(encoding="utf-8") == listed["render_document"]()
    assert listed["is_listed"]("test_eager_matches_batched_and_grouped_inference_0_fp16")
    assert not listed["is_listed"]("test_save_load")


def test_the_sdist_of_another_release_is_refused(repository: Path, tmp_path: Path):
    script = str(repository / "tests" / "common" / "run_common_tests.py")
    command = [sys.executable, script, "--sdist", str(tmp_path / "transformers-0.0.1.tar.gz"), "--cache", str(tmp_path)]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode != 0
    assert "transformers-0.0.1.tar.gz is not the sdist of the installed transformers" in finished.stderr
