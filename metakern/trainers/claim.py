"""A folder that one command writes to: another one, begun meanwhile, is told so or takes another folder."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

_LOCK = ".lock"


@contextmanager
def claimed(folder: Path) -> Iterator[bool]:
    """Whether, inside the block, this command is the only one in `folder`, which is made if there is none.

    A claim ends with the process, however that ends. Nothing is left of it, nor of folders made for it that stay empty.
    """
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):  # nobody writes there
        yield True
        return
    path = folder / _LOCK
    with path.open("w") as file:
        if not _locked(file, path):
            yield False
            return
        try:
            yield True
        finally:
            path.unlink(missing_ok=True)
            with suppress(OSError):  # one has files
                for each in made:
                    each.rmdir()


def _locked(file: IO[str], path: Path) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    # Whoever had it may have removed it between these two calls: another command then makes one of its own.
    return path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat())
