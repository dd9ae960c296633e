"""Settings that lie beside weights as JSON, read within bounds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dino_xcit.errors import InputError

CONFIG_LIMIT = 2**20
"""Bytes of such a file."""


def read_settings(path: Path) -> Mapping[str, Any]:
    """The mapping that a file holds.

    Raises:
        InputError: it cannot be read, is too long, or holds no mapping.
    """
    try:
        with open(path, "rb") as file:
            text = file.read(CONFIG_LIMIT + 1)
        stored = json.loads(text) if len(text) <= CONFIG_LIMIT else None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"cannot read {path}: it is damaged, or no JSON; mend it, or move it away") from error
    if not isinstance(stored, Mapping):
        raise InputError(f"{path} holds no settings, or more than {CONFIG_LIMIT >> 20} MiB: mend it, or move it away")
    return stored
