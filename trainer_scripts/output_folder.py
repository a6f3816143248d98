"""A folder that a job makes: there when it is complete, and only what the same job made is ever replaced."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from scfoundation_hf.inference.writer import check_free, check_parent


def check_output_folder(target: Path, *, maker: str, made_file: str, overwrite: bool) -> None:
    """Refuse a folder that cannot, or must not, be made.

    Args:
        maker: the job, as a message names it.
        made_file: what every folder that it made holds.
    Raises: FileNotFoundError: if the folder above is missing; FileExistsError: if something is there and `overwrite`
        is not set, or something that the job did not make.
    """
    check_parent(target)
    check_free(target, overwrite=overwrite)
    if target.exists() and not (target / made_file).is_file():
        raise FileExistsError(f"{target} was not made by {maker}, so it is not overwritten; remove it yourself.")


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """An empty folder to fill, which gets the name `target` when the block ends without an error."""
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as temporary:
        folder = Path(temporary) / "unfinished"
        folder.mkdir()
        yield folder
        if target.exists():
            target.rename(Path(temporary) / "replaced")
        folder.rename(target)
