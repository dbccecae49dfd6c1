"""Digests of the user's own files: a result belongs to the contents that the files had when they were read."""

from __future__ import annotations

import hashlib
from pathlib import Path

from metakern.data.image_folder import images_of


def contents(name: str) -> str | None:
    """A digest of the files behind "csv:FILE" or "images:DIR"; None for a published data set, and if they are gone."""
    kind, _, path = name.partition(":")
    if kind == "csv":
        return _digest({part: Path(part).expanduser() for part in path.split(",")})
    if kind == "images":
        root = Path(path).expanduser()
        images = sorted(file for part in images_of(root).values() for file in part)
        return _digest({str(file.relative_to(root)): file for file in images})
    return None


def _digest(files: dict[str, Path]) -> str | None:
    found = hashlib.sha256()
    for name, file in files.items():
        if not file.is_file():
            return None
        inside = file.read_bytes()
        found.update(f"{name} {len(inside)} ".encode("utf-8", "surrogateescape"))
        found.update(inside)
    return found.hexdigest()[:16] if files else None
