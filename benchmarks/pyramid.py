"""Feature pyramid compared with the official detection backbone of facebookresearch/xcit.

    python benchmarks/pyramid.py --reference DIR

``DIR`` has a checkout of facebookresearch/xcit as ``xcit/``. For S12/16 and S12/8 and three image sizes, both get the
same random weights by the official names. Its imports of mmcv and mmdet are replaced by stand-ins, and SyncBatchNorm by
BatchNorm2d, which computes the same in one process. The last line is one JSON object; ``max_error`` is the largest
absolute difference relative to the largest value of a map.
"""

from __future__ import annotations

import argparse
import json
import sys
import types
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from against import import_peer  # noqa: E402
from torch import nn  # noqa: E402

from dino_xcit.errors import RunStopped, run_main  # noqa: E402
from dino_xcit.models import build_backbone, feature_pyramid  # noqa: E402
from eval.table import table  # noqa: E402

SIZES = ((224, 224), (160, 256), (250, 190))
"""Heights and widths of the images in pixels."""
LIMIT = 1e-5


def import_reference(folder: Path) -> Any:
    """Import the official module without mmcv and mmdet."""

    def stand_in(name: str, **members: Any) -> None:
        sys.modules[name] = types.ModuleType(name)
        vars(sys.modules[name]).update(members)

    class Registry:
        def register_module(self) -> Any:
            return lambda kind: kind

    for name in ("mmcv", "mmdet", "mmdet.models"):
        stand_in(name)
    stand_in("mmcv.runner", load_checkpoint=None)
    stand_in("mmdet.utils", get_root_logger=None)
    stand_in("mmdet.models.builder", BACKBONES=Registry())
    return import_peer(folder, "xcit/detection/backbone/xcit.py")


def compare(reference: Any, patch: int) -> list[tuple[str, float]]:
    """Return the error of each level at each size in training mode, and of the running statistics."""
    torch.manual_seed(0)
    norm = partial(nn.LayerNorm, eps=1e-6)
    theirs = reference.XCiT(patch_size=patch, embed_dim=384, num_heads=8, eta=1.0, norm_layer=norm)
    ours = feature_pyramid(build_backbone(f"xcit_small_12_p{patch}"))
    state = {name: value + 0.02 * torch.randn_like(value) if value.is_floating_point() else value
             for name, value in theirs.state_dict().items()}  # fmt: skip
    state = {name: value.abs() if name.endswith("running_var") else value for name, value in state.items()}
    theirs.load_state_dict(state)
    own = {name if name.startswith("fpn") else f"backbone.{name}": value for name, value in state.items()}
    classes = ("backbone.cls", "backbone.norm.")  # class attention, which the official backbone lacks
    kept = {name: value for name, value in ours.state_dict().items() if name.startswith(classes)}
    ours.load_state_dict(kept | own)
    found = []
    for height, width in SIZES:
        images = torch.randn(2, 3, height, width)
        with torch.no_grad():
            for level, (mine, other) in enumerate(zip(ours(images).values(), theirs(images), strict=True)):
                if mine.shape != other.shape:
                    raise RunStopped(1, f"error: shapes {tuple(mine.shape)} and {tuple(other.shape)} of level {level}")
                error = float((mine - other).abs().max() / other.abs().max())
                found.append((f"p{patch}, {height} x {width}, stride {4 << level}", error))
    buffers = dict(ours.named_buffers())
    for name, value in theirs.named_buffers():
        mine = buffers[name if name.startswith("fpn") else f"backbone.{name}"]
        found.append((f"p{patch}, {name}", float((mine - value).abs().max() / value.abs().max().clamp_min(1))))
    return found


def main() -> None:
    """Compare and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", type=Path, required=True, help="folder with the checkout xcit/")
    reference = import_reference(parser.parse_args().reference)
    nn.SyncBatchNorm = nn.BatchNorm2d  # type: ignore[misc, assignment]
    found = compare(reference, 16) + compare(reference, 8)
    print(table(["", "relative error"], [[name, f"{error:.1e}"] for name, error in found if "stride" in name]))
    worst = max(error for _, error in found)
    print(json.dumps({"max_error": worst, "compared": len(found)}))
    if not worst <= LIMIT:
        raise RunStopped(1, f"error: max_error is {worst:.1e}, expected at most {LIMIT:.0e}")


if __name__ == "__main__":
    run_main(main)
