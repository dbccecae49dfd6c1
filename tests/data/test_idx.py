import gzip
import struct

import numpy as np
import pytest

from metakern.data import read_idx


def idx_bytes(values: np.ndarray, code: int, dtype: str) -> bytes:
    return (
        bytes([0, 0, code, values.ndim])
        + struct.pack(f">{values.ndim}I", *values.shape)
        + values.astype(dtype).tobytes()
    )


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("code", "dtype"), [(0x08, ">u1"), (0x0B, ">i2"), (0x0D, ">f4")])
def test_reads_what_was_written(tmp_path, packed, code, dtype):
    values = np.arange(24).reshape(2, 3, 4)
    raw = idx_bytes(values, code, dtype)
    path = tmp_path / "array"
    path.write_bytes(gzip.compress(raw) if packed else raw)
    read = read_idx(path)
    assert read.dtype.isnative
    assert read.shape == (2, 3, 4)
    np.testing.assert_array_equal(read, values)


def test_empty_array(tmp_path):
    (tmp_path / "array").write_bytes(idx_bytes(np.zeros((0, 5)), 0x08, ">u1"))
    assert read_idx(tmp_path / "array").shape == (0, 5)


@pytest.mark.parametrize("raw", [b"", b"PK\x03\x04", b"\0\0\x07\x01\0\0\0\x01a"])
def test_refuses_other_formats(tmp_path, raw):
    (tmp_path / "array").write_bytes(raw)
    with pytest.raises(ValueError, match="not an IDX file"):
        read_idx(tmp_path / "array")


def test_refuses_a_cut_off_file(tmp_path):
    (tmp_path / "array").write_bytes(idx_bytes(np.zeros((3, 4)), 0x08, ">u1")[:-1])
    with pytest.raises(ValueError, match=r"the header says \(3, 4\), the file holds 11"):
        read_idx(tmp_path / "array")
