"""``--to onnx``: one file for onnxruntime and whatever else reads ONNX; any batch, and for an XCiT any image size."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from dino_xcit.errors import InputError, one_line
from dino_xcit.export.comparison import Features
from dino_xcit.export.plain_network import traced
from dino_xcit.export.provenance import metadata
from dino_xcit.runtime import atomic
from dino_xcit.weights import LoadedBackbone

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
OUTPUTS = ("cls_token", "patch_tokens")
AXES = {0: "batch", 2: "height", 3: "width"}


def require_packages() -> None:
    """Say what is missing, before anything is computed.

    Raises:
        InputError: with what to install.
    """
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"--to onnx needs {', '.join(missing)}: pip install {' '.join(missing)}")


def write(loaded: LoadedBackbone, path: Path, patch_tokens: bool) -> None:
    """One file, the weights inside.

    Raises:
        InputError: PyTorch cannot turn this network into ONNX.
    """
    outputs = OUTPUTS[: 2 if patch_tokens else 1]
    try:
        program = traced(loaded.backbone, patch_tokens, loaded.transform.crop)
        with _without_notes():
            exported = torch.onnx.export(
                program,
                input_names=["images"],
                output_names=list(outputs),
                dynamic_shapes={"images": AXES},
                dynamo=True,
                verbose=False,
            )
    except Exception as error:
        raise InputError(
            f"PyTorch cannot turn {loaded.arch} into ONNX ({one_line(error)}): --to timm or safetensors"
        ) from error
    assert exported is not None
    proto = exported.model_proto
    for name, value in metadata(loaded).items():
        proto.metadata_props.add(key=name, value=value)
    content = proto.SerializeToString()
    atomic.write(path, lambda file: file.write(content))


def reload(path: Path) -> Features:
    """What onnxruntime computes of the file."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def compute(images: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.from_numpy(output) for output in session.run(None, {"images": images.numpy()}))

    return compute


@contextlib.contextmanager
def _without_notes() -> Iterator[None]:
    """The optimiser logs what it leaves as it is."""
    logger = logging.getLogger("onnxscript")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
