"""Worker processes that do not outlive the process that started them."""

import os
from multiprocessing import parent_process
from threading import Thread


def end_with_parent() -> None:
    """Let this process end as soon as the one that started it does: the `initializer` of a pool of processes.

    A process that is killed cannot tell its workers. They would finish what they have, then wait for more for ever, and
    keep their files locked and their memory taken meanwhile.

    Raises: RuntimeError: in a process that multiprocessing did not start.
    """
    parent = parent_process()
    if parent is None:
        raise RuntimeError("end_with_parent belongs into a worker process; nothing started this one.")

    def wait() -> None:
        parent.join()
        os._exit(1)  # an exception would end this thread only

    Thread(target=wait, daemon=True).start()
