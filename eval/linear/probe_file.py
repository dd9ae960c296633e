"""linear.pth and logreg.pth: a probe's classifiers, where it stands, what it found. Read without executing anything."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dino_xcit import safe_load
from dino_xcit.errors import InputError
from dino_xcit.runtime import atomic

FORMAT = "dino-xcit-linear-1"
FILE_NAME = "linear.pth"
LOGREG_NAME = "logreg.pth"

Settings = dict[str, Any]
"""All that decides what a probe learns, as plain values: two probes are the same where these are equal."""


def read_probe(folder: Path, settings: Settings, name: str = FILE_NAME) -> dict[str, Any] | None:
    """The probe in ``folder``, if it holds one.

    Raises:
        InputError: it is another probe, or the file is no probe at all.
    """
    path = folder / name
    if not path.exists():
        return None
    try:
        content = safe_load.read(path)
    except InputError as error:
        raise InputError(f"{error}; choose another --output-dir, or --resume never to overwrite it") from error
    if content.get("format") != FORMAT or not isinstance(content.get("settings"), Mapping):
        raise InputError(f"{path} is no linear probe: choose another --output-dir, or --resume never to overwrite it")
    changed = differences(content["settings"], settings)
    if changed:
        more = "; ..." if len(changed) > 4 else ""
        raise InputError(
            f"{folder if name == FILE_NAME else path} holds another probe ({'; '.join(changed[:4])}{more}): choose "
            "another --output-dir, or --resume never to overwrite it"
        )
    return content


def write_probe(folder: Path, content: Mapping[str, Any], settings: Settings, name: str = FILE_NAME) -> None:
    """Write ``content`` with the settings it belongs to; aside, then renamed.

    Raises:
        InputError: the folder cannot be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        atomic.write_torch(folder / name, {"format": FORMAT, "settings": settings, **content})
    except (PermissionError, NotADirectoryError, IsADirectoryError, FileExistsError) as error:
        raise InputError(f"cannot write {folder / name}: {error.strerror}; choose another --output-dir") from error


def demand_folder(folder: Path) -> None:
    """Make the folder of a probe: before the first epoch, which may take hours, rather than after it.

    Raises:
        InputError: it cannot be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        problem = "" if os.access(folder, os.W_OK | os.X_OK) else "permission denied"
    except OSError as error:
        problem = error.strerror or str(error)
    if problem:
        raise InputError(f"output_dir is {folder}, which cannot be written to: {problem}; choose another")


def differences(then: Mapping[str, Any], now: Settings) -> list[str]:
    """``name then -> now`` for each setting that differs; long values are cut short."""
    return [
        f"{name} {_short(then.get(name))} -> {_short(now.get(name))}"
        for name in sorted(then.keys() | now.keys())
        if then.get(name) != now.get(name)
    ]


def _short(value: object) -> str:
    text = " ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= 40 else f"{text[:12]}..."
