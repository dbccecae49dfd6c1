"""Where data sets are found, and the error if one is missing."""

from __future__ import annotations

import gzip
import os
import zlib
from pathlib import Path

VARIABLE = "METAKERN_DATA"


class DataNotFound(FileNotFoundError):
    """A data set was not found; the message says what is missing, its format, and where it is published."""


def data_dir(explicit: str | Path | None = None) -> Path | None:
    """The folder of data sets: `explicit` if given, else the environment variable METAKERN_DATA, else None.

    Raises: DataNotFound if the named folder does not exist.
    """
    named = explicit or os.environ.get(VARIABLE)
    if not named:
        return None
    folder = Path(named).expanduser()
    if not folder.is_dir():
        origin = "--data-dir" if explicit else VARIABLE
        raise DataNotFound(f"{origin} names {str(folder)!r}, which is not a folder")
    return folder


def read_text(path: Path) -> str:
    """The UTF-8 text of a file, plain or gzip, with its own line endings.

    Raises: ValueError naming the file if it is neither.
    """
    raw = path.read_bytes()
    try:
        return (gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8") from None
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is no whole gzip file: {error}") from error


def find_file(
    root: Path | None, folders: tuple[str, ...], names: tuple[str, ...], *, data: str, form: str, published: str
) -> Path:
    """The first of root/folder/name that exists, over `folders` and then `names`.

    Raises: DataNotFound naming the data set, the files looked for, their format, and where they are published.
    """
    if root is not None:
        for folder in folders:
            for name in names:
                path = root / folder / name
                if path.is_file():
                    return path
    wanted = " or ".join(repr(name) for name in names)
    where = f"in {str(root)!r} (or its {', '.join(map(repr, folders))})" if root else "because no data folder was named"
    raise DataNotFound(
        f"{data}: {wanted} not found {where}.\n"
        f"  format:    {form}\n"
        f"  published: {published}\n"
        f"  then:      set {VARIABLE} or --data-dir to the folder that holds {folders[0]!r}. "
        f"Without any download, 'digits-4v9' works."
    )
