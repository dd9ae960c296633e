"""What stands where a .npy file should: its header is Python's literals, of which anything may be wrong."""

from __future__ import annotations


def header(text: str) -> bytes:
    """A .npy file of version 1 with such a header, and no numbers."""
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
