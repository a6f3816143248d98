"""Workers end with the process that started them, however it ends."""

import subprocess
import sys

import psutil
import pytest

from scfoundation_hf.corpus.worker_processes import end_with_parent

SCRIPT = """
import os, sys, time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from scfoundation_hf.corpus.worker_processes import end_with_parent
if __name__ == "__main__":
    with ProcessPoolExecutor(1, mp_context=get_context(sys.argv[1]), initializer=end_with_parent) as pool:
        worker = pool.submit(os.getpid).result()
        pool.submit(time.sleep, 600)
        print(worker, flush=True)
        time.sleep(600)
"""


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_a_worker_ends_with_a_killed_parent(tmp_path, method):
    script = tmp_path / "run.py"
    script.write_text(SCRIPT)
    with subprocess.Popen([sys.executable, str(script), method], stdout=subprocess.PIPE, text=True) as run:
        worker = psutil.Process(int(run.stdout.readline()))
        run.kill()
    _, alive = psutil.wait_procs([worker], timeout=60)
    assert not alive


def test_only_workers_have_a_parent_to_end_with():
    with pytest.raises(RuntimeError, match="belongs into a worker process"):
        end_with_parent()
