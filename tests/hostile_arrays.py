"""Invalid .npy files: their headers are Python literals, any part of which may be wrong."""

from __future__ import annotations


def header(text: str) -> bytes:
    """Build a version 1 .npy file with this header and no data."""
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


NO_ARRAYS = {
    "empty": b"",
    "another format": b"PK\x03\x04 a zip archive",
    "larger than any memory": header("{'descr': '<f4', 'fortran_order': False, 'shape': (5, 1000000000000)}"),
    "larger than any number": header(f"{{'descr': '<f4', 'fortran_order': False, 'shape': (5, {10**30})}}"),
    "negative": header("{'descr': '<f4', 'fortran_order': False, 'shape': (-5, 3)}"),
    "objects": header("{'descr': '|O', 'fortran_order': False, 'shape': (5, 3)}"),
    "records": header("{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (0, 3)}"),
    "other keys": header("{1: 2, 'a': 3}"),
    "brackets": header("(" * 100),
    "a text without an end": header("'" * 3),
}
