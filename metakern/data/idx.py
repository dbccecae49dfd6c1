"""IDX, the format of MNIST and its successors, plain or gzip."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np

# Third byte of the header: the type of the values, which are big-endian.
_TYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}


def read_idx(path: Path) -> np.ndarray:
    """The array in an IDX file, in native byte order, with the shape given by its header.

    The header is 0, 0, type, number of dimensions d, then d big-endian uint32 lengths.
    Raises: ValueError if the file is not IDX, or holds more or fewer values than its header says.
    Source: LeCun, Cortes, Burges, "The MNIST database of handwritten digits".
    """
    raw = path.read_bytes()
    # By content, not by name: browsers unpack .gz downloads and keep the name.
    if raw[:2] == b"\x1f\x8b":
        raw = gzip.decompress(raw)
    if len(raw) < 4 or raw[:2] != b"\0\0" or raw[2] not in _TYPES:
        raise ValueError(f"{path.name}: not an IDX file: expected the bytes 0, 0, type, dimensions; got {raw[:4]!r}")
    start = 4 + 4 * raw[3]
    shape = tuple(int(length) for length in np.frombuffer(raw[4:start], dtype=">u4"))
    values = np.frombuffer(raw, dtype=_TYPES[raw[2]], offset=start) if len(raw) > start else np.empty(0, _TYPES[raw[2]])
    if values.size != int(np.prod(shape)):
        raise ValueError(f"{path.name}: the header says {shape}, the file holds {values.size} values")
    return values.reshape(shape).astype(values.dtype.newbyteorder("="))
