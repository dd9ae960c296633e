"""A checkpoint in another library's form, re-loaded by that library and compared before success is reported.

python -m dino_xcit.export --weights ckpt.pth --to timm|safetensors|hf|onnx|torch-export --out PATH
"""

from __future__ import annotations

# Before torch: it decides how threads wait for each other.
from dino_xcit.runtime import logging as log

import dino_xcit  # noqa: F401  # isort: skip

import sys
from collections.abc import Sequence
from pathlib import Path

from dino_xcit.cli import parse
from dino_xcit.config import ExportConfig
from dino_xcit.errors import InputError, run_main
from dino_xcit.export import model_card, onnx_file, output, safetensors_file, timm_folder, torch_program
from dino_xcit.export.comparison import (
    ROUNDINGS,
    Difference,
    Features,
    differences,
    features_of,
    precise_features_of,
    sizes_compared,
)
from dino_xcit.export.photographs import Photographs, photographs
from dino_xcit.weights import LoadedBackbone, load_backbone


def main(argv: Sequence[str]) -> None:
    """Load, write beside, re-load, compare, rename.

    Raises:
        InputError: a mistake in the command or the files, or an export that differs from its original.
    """
    config = parse(ExportConfig, argv, "python -m dino_xcit.export")
    config.check()
    out = Path(config.out).expanduser()
    output.check_free(out, config.to, config.overwrite, config.weights)
    if config.to == "onnx":
        onnx_file.require_packages()
    loaded = load_backbone(config.weights, config.network, config.arch or None)
    print(loaded.describe(), flush=True)
    if not loaded.transform_from:
        told = ", and config.json tells it to timm" if config.to in ("timm", "hf") else ""
        log.warning(
            f"the file does not say how images are prepared; assumed: {loaded.transform_guess}, "
            f"{loaded.transform}{told}"
        )
    elif loaded.transform_exception:
        log.warning(f"images are prepared in a way that is {loaded.transform_from}")
    cards = [model_card.read_card(Path(path), loaded.hash) for path in config.card]
    pictures = photographs(config.images)

    with output.beside(out) as aside:
        print(f"writing {config.to} ...", flush=True)
        exported = _write_and_reload(config, loaded, aside, pictures)
        found = _compared(config, loaded, exported, pictures)
        if config.to == "hf":
            model_card.write(loaded, cards, found, pictures.origin, aside)
    greatest = max(difference.relative for difference in found)
    print(f"written: {out}; greatest relative difference {greatest:.1e}, on {pictures.origin}")


def _write_and_reload(config: ExportConfig, loaded: LoadedBackbone, path: Path, pictures: Photographs) -> Features:
    if config.to == "safetensors":
        safetensors_file.write(loaded, path)
        return safetensors_file.reload(path, loaded.arch)
    if config.to == "onnx":
        onnx_file.write(loaded, path, config.patch_tokens)
        return onnx_file.reload(path)
    if config.to == "torch-export":
        torch_program.write(loaded, path, config.patch_tokens)
        return torch_program.reload(path)
    timm_folder.write(loaded, path)
    model = timm_folder.reload(path)
    timm_folder.check_transform(model, loaded.transform, pictures)
    return timm_folder.features(model)


def _compared(
    config: ExportConfig, loaded: LoadedBackbone, exported: Features, pictures: Photographs
) -> list[Difference]:
    original = features_of(loaded.backbone, config.patch_tokens)
    precise = precise_features_of(loaded.backbone, config.patch_tokens)
    sizes = sizes_compared(loaded.backbone, loaded.transform)
    found = differences(original, exported, sizes, pictures, loaded.transform, precise)
    for difference in found:
        print(f"  {difference}", flush=True)
    wrong = [difference for difference in found if not difference.passes(config.tolerance)]
    if wrong:
        raise InputError(
            f"the export differs from {loaded.path} at {wrong[0]}, more than {config.tolerance:g} of the greatest "
            f"value and more than {ROUNDINGS} times float32's own rounding, and was removed: choose another --to, or "
            "report it with the versions of torch and of the library"
        )
    return found


def command() -> None:
    """The console entry."""
    run_main(lambda: main(sys.argv[1:]))


if __name__ == "__main__":
    command()
