"""Export a checkpoint for another library, reload it with that library and compare the features (docs/export.md).

python -m dino_xcit.export --weights ckpt.pth --to timm|safetensors|hf|onnx|torch-export --out PATH

B: batch size, N: tokens, D: features.
"""

from __future__ import annotations

# Before torch, as it configures the threads of OpenMP.
from dino_xcit.runtime import logging as log

import dino_xcit  # isort: skip

import contextlib
import copy
import importlib.util
import json
import logging
import math
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn

from dino_xcit.cli import parse
from dino_xcit.data import open_source
from dino_xcit.data.decode import read_image
from dino_xcit.data.source import evenly_spaced
from dino_xcit.errors import InputError, one_line, printable, run_main
from dino_xcit.models import build_backbone, fused
from dino_xcit.models.xcit import XCIT_SIZES, XCiT
from dino_xcit.runtime import atomic
from dino_xcit.transform import RGB, Channels, EvalTransform, PixelFormat, normalise, size_of, to_tensor
from dino_xcit.weights import LoadedBackbone, load_backbone
from dino_xcit.weights.names import to_timm

Features = Callable[[Tensor], tuple[Tensor, ...]]
"""Normalised images [B, channels, height, width] to class token [B, D] and optionally patch tokens [B, N, D]."""

SUFFIXES = {"safetensors": ".safetensors", "onnx": ".onnx", "torch-export": ".pt2"}
"""File suffixes. The other targets are folders."""
FOLDER_FILES = {"model.safetensors", "config.json", "README.md"}
XCIT_SIZES_COMPARED = ((224, 224), (256, 192), (97, 131))
"""(height, width): square, not square, and not a multiple of any patch size."""
ROUNDINGS, MAX_ROUNDING = 30, 1e-3
"""Maximum relative difference: ``ROUNDINGS`` times the rounding error of the original, at most ``MAX_ROUNDING``."""
MIN_IMAGES, MAX_IMAGES = 3, 4
"""Number of images to compare the features on."""


@dataclass(frozen=True)
class ExportConfig:
    """Export a backbone, and compare the exported network with the original."""

    weights: str = ""
    """Checkpoint to export, in any form that run_knn.py accepts."""
    to: str = ""
    """Format. timm: a folder for timm.create_model; safetensors: one file with the official key names; hf: timm's
    folder with a README, for the Hugging Face Hub; onnx: one file for onnxruntime; torch-export: a .pt2 file."""
    out: str = ""
    """Output path: a folder for timm and hf, a file for the other formats."""
    network: Literal["teacher", "student"] = "teacher"
    """Network to export if the checkpoint contains both."""
    arch: str = ""
    """Architecture, if the file does not determine it."""
    patch_tokens: bool = False
    """For onnx and torch-export: also output the patch tokens of the last block that mixes patches."""
    images: str = "sample:fashion-mnist"
    """Images to compare export and original on: a folder, or another form of docs/data.md. Of the default, a network
    for N channels gets red, green and blue repeated, such as R G B R G for 5."""
    tolerance: float = 1e-5
    """Maximum relative difference between export and original. For an XCiT, up to 30 times the original's float32
    rounding error (at most 1e-3) is accepted too."""
    overwrite: bool = False
    """Replace an earlier export at --out."""

    def check(self) -> None:
        """Check all values.

        Raises:
            InputError: A value is invalid.
        """
        for name, hint in (("weights", "a checkpoint such as runs/.../checkpoint.pth"), ("out", "a path to write to")):
            if not getattr(self, name):
                raise InputError(f"no --{name} given, expected {hint}")
        if self.to not in TARGETS:
            raise InputError(f"to is {self.to!r}, expected one of {', '.join(TARGETS)}, such as --to timm")
        if self.patch_tokens and self.to not in ("onnx", "torch-export"):
            raise InputError(f"patch_tokens is an output of onnx and torch-export, but to is {self.to}: leave it out")
        if not 0 <= self.tolerance <= 0.01:
            raise InputError(f"tolerance is {self.tolerance}, expected 0 to 0.01, such as 1e-5")


def main(argv: Sequence[str]) -> None:
    """Load, write to a temporary path, reload, compare, rename.

    Raises:
        InputError: The command line or the files are invalid, or the export differs from the original.
    """
    config = parse(ExportConfig, argv, "python -m dino_xcit.export")
    out = Path(os.path.abspath(os.path.expanduser(config.out)))
    check_free(config, out)
    loaded = load_backbone(config.weights, config.network, config.arch or None)
    if config.to in ("timm", "hf") and loaded.transform.channels != 3:
        raise InputError(
            f"{config.weights} is for images of {loaded.transform.channels} channels, which timm's transforms cannot "
            "read: give --to safetensors, onnx or torch-export"
        )
    print(loaded.describe(), flush=True)
    if not loaded.transform_from:
        log.warning(f"the file has no evaluation transform; assumed: {loaded.transform_guess}, {loaded.transform}")
    elif loaded.transform_exception:
        log.warning(f"the evaluation transform is {loaded.transform_from}")
    own = config.images != ExportConfig.images
    images = compared_images(config.images, loaded.transform.pixel_format if own else RGB)
    with beside(out) as aside:
        print(f"writing {config.to} ...", flush=True)
        exported = TARGETS[config.to](loaded, aside, config.patch_tokens)
        if config.to in ("timm", "hf"):
            check_timm_transform(aside, loaded.transform, images)
        greatest = compare(loaded, exported, images, config)
    print(f"written: {out}; greatest relative difference {greatest:.1e}, on {config.images}")


# ---- Output path: an export appears complete and checked, or not at all


def check_free(config: ExportConfig, out: Path) -> None:
    """Check the output path before anything is computed.

    Raises:
        InputError: The suffix does not match the target, or the path exists and may not be replaced.
    """
    suffix = SUFFIXES.get(config.to)
    if suffix and out.suffix != suffix:
        raise InputError(f"out is {out}, expected a file that ends in {suffix} for --to {config.to}")
    if not os.path.lexists(out):
        return
    if not config.overwrite:
        raise InputError(f"{out} exists: give another --out, or --overwrite to replace it")
    weights = Path(config.weights).expanduser()
    if weights.exists() and any(os.path.samefile(out, path) for path in (weights, *weights.resolve().parents)):
        raise InputError(f"{out} is or contains the weights to export, {weights}: give another --out")
    if suffix and not out.is_file():
        raise InputError(f"{out} is not a file: give the path of the file to write as --out")
    # A folder is replaced with all its content.
    if not suffix and (out.is_symlink() or not out.is_dir() or {path.name for path in out.iterdir()} - FOLDER_FILES):
        raise InputError(
            f"{out} is not an earlier export (expected only {', '.join(sorted(FOLDER_FILES))}): give another --out"
        )


@contextlib.contextmanager
def beside(out: Path) -> Iterator[Path]:
    """Yield a temporary path that is renamed to ``out`` if the block succeeds, else removed.

    Raises:
        InputError: ``out`` is not writable.
    """
    aside, replaced = atomic.aside_of(out), out.with_name(f".{out.name}.old.tmp")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _remove(aside)
        yield aside
        for path in (*aside.glob("*"), aside):
            atomic.flush_folder(path)
        if out.is_dir():
            _remove(replaced)
            os.rename(out, replaced)
        os.replace(aside, out)
        _remove(replaced)
        atomic.flush_folder(out.parent)
    except (OSError, safetensors.SafetensorError) as error:
        raise InputError(f"cannot write {out} ({one_line(error)}): give another --out") from error
    finally:
        with contextlib.suppress(OSError):  # the first error matters more
            _remove(aside)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


# ---- Targets: each writes its form, reloads it, and returns the features function of the other library


def metadata(loaded: LoadedBackbone) -> dict[str, str]:
    """Return the metadata of an exported file.

    :mod:`dino_xcit.weights` reads ``arch`` and ``eval_transform`` (JSON). A guessed transform is stored as
    ``assumed_eval_transform``, so that it remains a guess.
    """
    values = {
        "format": "pt",
        "arch": loaded.arch,
        "eval_transform" if loaded.transform_from else "assumed_eval_transform": json.dumps(loaded.transform.to_dict()),
        "eval_transform_exception": loaded.transform_exception,
        "network": loaded.network,
        "weights_hash": loaded.hash,
        "source_file": loaded.path.name,
        "data": shown_place(loaded.data or ""),
        "written_by": f"dino_xcit {dino_xcit.__version__}",
    }
    return {name: printable(value) for name, value in values.items() if value}


def shown_place(url: str) -> str:
    """Return a data URL without the machine's folders: ``.../imagenet/train``."""
    return re.sub(r"^(\w{2,}:)?(?!//)(?=[/~]).*?([^/]+/[^/]+)/*$", r"\1.../\2", url)


def to_safetensors(loaded: LoadedBackbone, path: Path, _: bool) -> Features:
    """Write one file with the names of this project and the official checkpoints."""
    tensors = {key: value.contiguous() for key, value in loaded.backbone.state_dict().items()}
    safetensors.torch.save_file(tensors, path, metadata(loaded))
    backbone = build_backbone(loaded.arch, loaded.transform.channels)
    backbone.load_state_dict(safetensors.torch.load_file(path))
    return Exported(backbone.eval().requires_grad_(False), patch_tokens=False)


def to_timm_folder(loaded: LoadedBackbone, folder: Path, _: bool) -> Features:
    """Write a folder for ``timm.create_model``, local (``local-dir:``) or on the Hub (``hf-hub:``).

    Raises:
        InputError: timm lacks the architecture or the interpolation.
    """
    import timm  # slow to import

    transform = loaded.transform
    if transform.interpolation == "nearest-exact":
        raise InputError("timm has no interpolation 'nearest-exact': --to safetensors, onnx or torch-export")
    model = _timm_model(loaded)
    timm.models.save_for_hf(model, str(folder), safe_serialization=True)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    # The other entries, such as the license, describe timm's own weights of this name.
    kept = {name: config["pretrained_cfg"].get(name) for name in ("fixed_input_size", "first_conv", "classifier")}
    config["pretrained_cfg"] = kept | {
        "num_classes": 0,
        "input_size": (3, transform.crop, transform.crop),
        "interpolation": transform.interpolation,
        "crop_pct": crop_share(transform),
        "crop_mode": "center",
        "mean": transform.mean,
        "std": transform.std,
    }
    if isinstance(loaded.backbone, XCiT):  # with a fixed size timm would accept images of the crop size only
        config["pretrained_cfg"]["fixed_input_size"] = False
        config["model_args"].pop("img_size", None)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    tensors = {key: value.contiguous() for key, value in model.state_dict().items()}
    safetensors.torch.save_file(tensors, folder / "model.safetensors", metadata(loaded))  # timm's has no metadata
    reloaded = timm.create_model(f"local-dir:{folder}", pretrained=True).eval().requires_grad_(False)
    return lambda images: (reloaded(images),)


def _timm_model(loaded: LoadedBackbone) -> Any:
    import timm

    backbone = loaded.backbone
    if loaded.arch.startswith("timm:"):
        return backbone.model
    if not isinstance(backbone, XCiT):
        raise InputError(f"timm has no name for {loaded.arch}: --to safetensors, onnx or torch-export")
    if backbone.patch_size not in (8, 16):
        raise InputError(
            f"timm's XCiT has patches of 8 or 16 pixels, {loaded.arch} of {backbone.patch_size}: "
            "--to safetensors, onnx or torch-export"
        )
    name = f"{loaded.arch}_224"
    args: dict[str, Any] = {}
    if not timm.is_model(name):  # a size that only this project has: timm's nano with other arguments
        size = XCIT_SIZES[loaded.arch.rpartition("_p")[0]]
        name = f"xcit_nano_12_p{backbone.patch_size}_224"
        args = {
            "patch_size": backbone.patch_size,
            "embed_dim": size.dim,
            "depth": size.depth,
            "num_heads": size.heads,
            "mlp_ratio": size.mlp_ratio,
            "cls_attn_layers": size.class_blocks,
            "eta": size.layer_scale,
            "tokens_norm": size.tokens_norm,
        }
    model = timm.create_model(name, num_classes=0, **args)
    model.load_state_dict(to_timm(backbone.state_dict()))
    return model


def crop_share(transform: EvalTransform) -> float:
    """Return crop_pct for timm, which resizes the shorter side to floor(crop / crop_pct)."""
    share = transform.crop / transform.resize
    while math.floor(transform.crop / share) < transform.resize:  # because of rounding
        share = math.nextafter(share, 0)
    return share


def to_hf_folder(loaded: LoadedBackbone, folder: Path, patch_tokens: bool) -> Features:
    """Write timm's folder and a README with the origin of the weights and the code to load them."""
    from huggingface_hub import ModelCardData

    features = to_timm_folder(loaded, folder, patch_tokens)
    card = ModelCardData(library_name="timm", pipeline_tag="image-feature-extraction", tags=["dino-xcit"])
    facts: dict[str, Any] = {"architecture": loaded.arch, "network": loaded.network, "weights (SHA-256)": loaded.hash}
    facts |= {"trained on": shown_place(loaded.data or "")} | {name: loaded.training.get(name) for name in TOLD}
    facts |= {"image preparation": f"{loaded.transform_guess and 'assumed: '}{loaded.transform}"}
    table = "\n".join(f"{name}: {printable(str(value))}" for name, value in facts.items() if value not in (None, ""))
    text = README.format(card=card.to_yaml(), arch=loaded.arch, version=dino_xcit.__version__, table=table)
    (folder / "README.md").write_text(text, "utf-8")
    return features


TOLD = ("recipe", "epochs_trained", "batch_size_per_gpu", "optimizer", "lr", "global_crops_size", "local_crops_number")
"""Stored settings for the README. None of them is a local path."""
README = """\
---
{card}
# license: choose one
---

# {arch}

An image encoder, exported by dino_xcit {version}.

```
{table}
```

```python
import timm

model = timm.create_model("hf-hub:USER/NAME", pretrained=True).eval()  # or "local-dir:FOLDER"
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
features = model(transform(image)[None])
```
"""


class Exported(nn.Module):
    """Normalised images [B, channels, height, width] to the class token [B, D].

    With ``patch_tokens`` also to the patch tokens of the last block that mixes patches, [B, N, D], in row-major order.
    """

    def __init__(self, backbone: nn.Module, patch_tokens: bool) -> None:
        super().__init__()
        self.backbone = backbone
        self.patch_tokens = patch_tokens

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        out = self.backbone(images)
        return (out.cls_token, out.patch_tokens) if self.patch_tokens else (out.cls_token,)


def traced(loaded: LoadedBackbone, patch_tokens: bool) -> torch.export.ExportedProgram:
    """Trace the network to a graph of ATen operations, for any batch size and for XCiT any height and width.

    Raises:
        InputError: PyTorch cannot trace the network.
    """
    shapes, height, width = {0: torch.export.Dim("batch")}, loaded.transform.crop, loaded.transform.crop
    if isinstance(loaded.backbone, XCiT):
        patch = loaded.backbone.patch_size
        # At least two tokens per side, as PyTorch specializes the strides of a single row.
        shapes |= {2: torch.export.Dim("height", min=patch + 1), 3: torch.export.Dim("width", min=patch + 1)}
        height, width = 4 * patch, 5 * patch
    network = Exported(loaded.backbone, patch_tokens).eval().requires_grad_(False)
    try:
        with fused.plain():
            return torch.export.export(
                network, (torch.zeros(2, loaded.transform.channels, height, width),), dynamic_shapes={"images": shapes}
            )
    except Exception as error:  # torch.export raises many types
        raise InputError(f"PyTorch cannot trace {loaded.arch} ({one_line(error)}): --to timm or safetensors") from error


def to_torch_program(loaded: LoadedBackbone, path: Path, patch_tokens: bool) -> Features:
    """Write a .pt2 file, a graph that runs without this project's code, with the metadata as extra files."""
    program = traced(loaded, patch_tokens)
    with open(path, "wb") as file:
        torch.export.save(program, file, extra_files=dict(metadata(loaded)))
    with open(path, "rb") as file:
        network: Features = torch.export.load(file).module()  # noqa: TID251 - written by this process
    return network


def to_onnx(loaded: LoadedBackbone, path: Path, patch_tokens: bool) -> Features:
    """Write one ONNX file that includes the weights.

    Raises:
        InputError: A package is missing, or PyTorch cannot convert the network to ONNX.
    """
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"--to onnx needs {', '.join(missing)}: pip install 'dino-xcit[onnx]'")
    import onnxruntime

    logging.getLogger("onnxscript").setLevel(logging.ERROR)  # its optimizer logs each skipped node
    try:
        exported = torch.onnx.export(
            traced(loaded, patch_tokens),
            input_names=["images"],
            output_names=["cls_token", "patch_tokens"][: 1 + patch_tokens],
            dynamic_shapes={"images": {0: "batch", 2: "height", 3: "width"}},
            dynamo=True,
            verbose=False,
        )
    except RuntimeError as error:
        raise InputError(
            f"cannot convert {loaded.arch} to ONNX ({one_line(error)}): --to timm or safetensors"
        ) from error
    assert exported is not None
    proto = exported.model_proto
    for name, value in metadata(loaded).items():
        proto.metadata_props.add(key=name, value=value)
    path.write_bytes(proto.SerializeToString())
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda images: tuple(torch.from_numpy(output) for output in session.run(None, {"images": images.numpy()}))


TARGETS: dict[str, Callable[[LoadedBackbone, Path, bool], Features]] = {
    "timm": to_timm_folder,
    "safetensors": to_safetensors,
    "hf": to_hf_folder,
    "onnx": to_onnx,
    "torch-export": to_torch_program,
}

# ---- Comparison with the original


def compared_images(url: str, format: PixelFormat) -> list[Image.Image | Channels]:
    """Return up to :data:`MAX_IMAGES` evenly spaced images of a source.

    Raises:
        InputError: There are fewer than :data:`MIN_IMAGES`, or one is unreadable.
    """
    source = open_source(url, "val")
    if len(source) < MIN_IMAGES:
        raise InputError(f"{source.url} has {len(source)} images, expected at least {MIN_IMAGES} to compare on")
    chosen = evenly_spaced(len(source), MAX_IMAGES)
    return [read_image(source, index, format) for index in chosen]


def compare(
    loaded: LoadedBackbone, exported: Features, images: list[Image.Image | Channels], config: ExportConfig
) -> float:
    """Return the maximum difference of any output value, relative to the maximum of the output.

    Float32 results with other orders of summation differ by about their rounding error, which in a deep network may
    exceed the tolerance. For XCiT this rounding error is therefore measured against float64.

    Raises:
        InputError: The export differs by more than rounding, or the original's features are zero or not finite.
    """
    transform, is_xcit = loaded.transform, isinstance(loaded.backbone, XCiT)
    original = Exported(loaded.backbone, config.patch_tokens)
    sizes = dict.fromkeys([(transform.crop, transform.crop), *(XCIT_SIZES_COMPARED if is_xcit else ())])
    greatest = 0.0
    for number, (height, width) in enumerate(sizes):
        fitted = [
            to_tensor(ImageOps.fit(image, (width, height))) if isinstance(image, Image.Image)
            else transform.resized(image, [height, width])
            for image in images[: max(1, len(images) - number)]
        ]  # fmt: skip
        pixels = torch.stack(fitted)
        pixels = pixels[:, torch.arange(transform.channels) % pixels.shape[1]]  # the sample is RGB
        batch = normalise(pixels, transform.mean, transform.std)
        with torch.no_grad():
            expected = original(batch)
            relative, rounding = difference(expected, exported(batch)), 0.0
            if is_xcit:
                rounding = difference(copy.deepcopy(original).double()(batch.double()), expected)
        where = f"{height} x {width}, batch {len(batch)}: {relative:.1e} (float32 itself {rounding:.1e})"
        print(f"  {where}", flush=True)
        if not relative <= max(config.tolerance, min(ROUNDINGS * rounding, MAX_ROUNDING)):
            raise InputError(
                f"the export differs from {loaded.path} at {where}, more than {config.tolerance:g} and more than "
                f"{ROUNDINGS} times float32's own rounding, and was removed: choose another --to"
            )
        greatest = max(greatest, relative)
    return greatest


def difference(expected: Sequence[Tensor], given: Sequence[Tensor]) -> float:
    """Return the maximum of |a - b| / max |a| over pairs of outputs; infinite for unequal shapes and NaN.

    Raises:
        InputError: An expected output is all zero or not finite.
    """
    found = []
    for a, b in zip(expected, given, strict=True):
        largest = float(a.abs().max())
        if not math.isfinite(largest) or largest == 0:
            raise InputError("the network's features are all zero or not finite: export an earlier checkpoint")
        found.append(float((a - b).abs().max()) / largest if a.shape == b.shape else math.inf)
    return max(math.inf if math.isnan(value) else value for value in found)


def check_timm_transform(folder: Path, transform: EvalTransform, images: list[Image.Image | Channels]) -> None:
    """Compare timm's transform from config.json with the checkpoint's.

    Raises:
        InputError: The pixels differ.
    """
    import timm

    data: Any = timm.data  # untyped
    settings = data.resolve_model_data_config(timm.create_model(f"local-dir:{folder}"))
    theirs = data.create_transform(**settings, is_training=False)
    for image in images:
        ours = normalise(transform(image)[None], transform.mean, transform.std)[0]
        given: Tensor = theirs(image)
        if ours.shape != given.shape or float((ours - given).abs().max()) > 1e-5:
            raise InputError(
                f"timm prepares an image of {' x '.join(map(str, size_of(image)))} pixels (height x width) differently "
                f"than {transform}: export with --to safetensors instead"
            )


def command() -> None:
    """Run :func:`main` with the exit codes of docs/reliability.md."""
    run_main(lambda: main(sys.argv[1:]))


if __name__ == "__main__":
    command()
