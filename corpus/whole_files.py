"""Small files that are there whole or not at all, whatever ends the process that writes them."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Let `write` fill a file under another name, then give it its own."""
    temporary = path.with_name(f"{path.name}.tmp")  # one that a kill left is overwritten the next time
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Write JSON."""
    write_whole(path, lambda file: file.write((json.dumps(content, indent=2) + "\n").encode()))
