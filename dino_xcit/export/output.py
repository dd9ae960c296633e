"""An export appears whole and checked, or not at all: it is made beside its target, then renamed."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from dino_xcit.errors import InputError, printable
from dino_xcit.export.model_card import CARD, CURVES
from dino_xcit.export.provenance import is_export
from dino_xcit.export.timm_folder import CONFIG, WEIGHTS
from dino_xcit.runtime import atomic

SUFFIXES = {"safetensors": ".safetensors", "onnx": ".onnx", "torch-export": ".pt2"}
"""How the files end, by which those who read them tell what they are; the other targets are folders."""

_WRITTEN = {WEIGHTS, CONFIG, CARD, CURVES}
"""All that an export's folder may hold."""


def check_free(out: Path, target: str, overwrite: bool, weights: str = "") -> None:
    """Whether an export may appear at ``out``; before anything is computed.

    Args:
        weights: what is exported, as it was asked for: it is never replaced by its own export.

    Raises:
        InputError: a name that is none for this target, or something is there that may not be replaced.
    """
    is_folder = target not in SUFFIXES
    if not is_folder and out.suffix != SUFFIXES[target]:
        raise InputError(f"out is {out}, expected a file that ends in {SUFFIXES[target]} for --to {target}")
    if not os.path.lexists(out):
        return
    try:
        if not is_folder and not out.is_file():
            raise InputError(f"{out} is no file: --out takes the path of the file to write")
        _refuse_own_input(out, Path(weights).expanduser())
        found = _foreign_in(out) if is_folder else ("" if is_export(out) else "nothing in it says that it is one")
    except OSError as error:
        raise InputError(f"cannot read {out}: {error.strerror}; give another --out") from error
    # What is replaced is gone, a folder with all that it holds: only what an export made.
    if found:
        raise InputError(
            f"{out} is there and is no earlier export ({found}): --out takes a path that does not exist yet; give "
            "another, or remove this one yourself"
        )
    if not overwrite:
        raise InputError(f"{out} is there already: give another --out, or --overwrite to replace it")


def _refuse_own_input(out: Path, weights: Path) -> None:
    if not weights.exists():
        return
    if os.path.samefile(out, weights) or any(os.path.samefile(out, folder) for folder in weights.resolve().parents):
        raise InputError(f"{out} is or holds the weights that are to be exported, {weights}: give another --out")


def _foreign_in(folder: Path) -> str:
    """Why a folder is no earlier export, or an empty string."""
    if folder.is_symlink() or not folder.is_dir():
        return "it is no folder"
    with os.scandir(folder) as entries:
        names = {entry.name: entry.is_file(follow_symlinks=False) for entry in entries}
    strange = sorted(name for name, is_file in names.items() if name not in _WRITTEN or not is_file)
    if strange:
        return f"an export writes no {printable(strange[0])}"
    if not {WEIGHTS, CONFIG} <= names.keys():
        return f"it lacks {WEIGHTS} or {CONFIG}"
    return "" if is_export(folder / WEIGHTS) else f"nothing in {WEIGHTS} says that it is one"


@contextlib.contextmanager
def beside(out: Path) -> Iterator[Path]:
    """Where to write; becomes ``out`` if the block ends well, and is removed if not.

    Raises:
        InputError: nothing can be written there.
    """
    aside = atomic.aside_of(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _remove(aside)
        yield aside
        if out.is_dir():
            replaced = out.with_name(f".{out.name}.old.tmp")
            _remove(replaced)
            os.rename(out, replaced)
            os.rename(aside, out)
            _remove(replaced)
        else:
            os.replace(aside, out)
        atomic.flush_folder(out.parent)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):  # run_main has a sentence for them
            raise
        raise InputError(f"cannot write {out}: {error.strerror or error}; give another --out") from error
    finally:
        with contextlib.suppress(OSError):  # what went wrong first is what matters
            _remove(aside)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
