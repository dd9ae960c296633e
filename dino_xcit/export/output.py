"""An export appears whole and checked, or not at all: it is made beside its target, then renamed."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from dino_xcit import durable
from dino_xcit.errors import InputError
from dino_xcit.export.timm_folder import CONFIG, WEIGHTS

SUFFIXES = {"safetensors": ".safetensors", "onnx": ".onnx", "torch-export": ".pt2"}
"""How the files end, by which those who read them tell what they are; the other targets are folders."""


def check_free(out: Path, target: str, overwrite: bool) -> None:
    """Whether an export may appear at ``out``; before anything is computed.

    Raises:
        InputError: a name that is none for this target, or something is there that may not be replaced.
    """
    is_folder = target not in SUFFIXES
    if not is_folder and out.suffix != SUFFIXES[target]:
        raise InputError(f"out is {out}, expected a file that ends in {SUFFIXES[target]} for --to {target}")
    if not os.path.lexists(out):
        return
    if not is_folder and not out.is_file():
        raise InputError(f"{out} is no file: --out takes the path of the file to write")
    # A folder goes with all that it holds: only one that an export made.
    if is_folder and not (out.is_dir() and not out.is_symlink() and {WEIGHTS, CONFIG} <= set(os.listdir(out))):
        raise InputError(f"{out} is there and is no earlier export: --out takes a folder that does not exist yet")
    if not overwrite:
        raise InputError(f"{out} is there already: give another --out, or --overwrite to replace it")


@contextlib.contextmanager
def beside(out: Path) -> Iterator[Path]:
    """Where to write; becomes ``out`` if the block ends well, and is removed if not.

    Raises:
        InputError: nothing can be written there.
    """
    aside = durable.aside_of(out)
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
        durable.flush_folder(out.parent)
    except (PermissionError, NotADirectoryError, IsADirectoryError, FileExistsError) as error:
        raise InputError(f"cannot write {out}: {error.strerror}") from error
    finally:
        with contextlib.suppress(OSError):  # what went wrong first is what matters
            _remove(aside)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
