"""Time and memory of one training step of Mask R-CNN by image size: XCiT-S12/8, timm's XCiT-S12/8, ViT-S/8.

    python benchmarks/downstream.py [--device cpu|cuda] [--sizes 512 1024 1536] [--batch 1] [--memory 20] [--quick]

A step is the forward pass with all losses, the backward pass and AdamW, in float32 or bfloat16, on random square images
with ten objects. All three networks go through the feature pyramid and the detector of run_detect.py. Each row runs in
a separate process; on a CPU its address space has a limit of ``--memory`` GB. Memory is the peak of the process
(resident on a CPU, allocated on a GPU). Times are medians after a first step; a first step above a minute is the only
one. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from against import peak_memory  # noqa: E402
from resolution import device_name, found_apart, seconds  # noqa: E402
from torch import Tensor  # noqa: E402

from dino_xcit.errors import InputError, is_out_of_memory, run_main  # noqa: E402
from dino_xcit.models import build_backbone  # noqa: E402
from dino_xcit.transform import EvalTransform  # noqa: E402
from eval.table import table  # noqa: E402
from supervised.detect_config import DetectConfig  # noqa: E402
from supervised.detection import build_detector  # noqa: E402

Row = dict[str, Any]

NETWORKS = {
    "XCiT-S12/8": "xcit_small_12_p8",
    "timm XCiT-S12/8": "timm:xcit_small_12_p8_224",
    "ViT-S/8": "vit_small_12_p8",
}
QUICK = {"XCiT": "xcit_pico_4_p8", "timm XCiT": "timm:xcit_nano_12_p8_224", "ViT": "vit_tiny_2_p8"}
SMALL: Row = {"fpn_width": 32, "box_head_width": 64, "rois": 64, "proposals": 100}
"""Settings of the detector with ``--quick``."""
CLASSES, OBJECTS = 80, 10
OUT_OF_MEMORY = "out of memory"


def example(side: int, device: str) -> tuple[Tensor, dict[str, Tensor]]:
    """Return a random image [3, side, side] uint8 and objects whose masks are their boxes."""
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(256, (3, side, side), dtype=torch.uint8, generator=generator)
    corners = (torch.rand(OBJECTS, 2, generator=generator) * side * 0.7).round()
    boxes = torch.cat([corners, corners + side // 4], dim=1)
    masks = torch.zeros(OBJECTS, side, side, dtype=torch.uint8)
    for mask, (left, top, right, bottom) in zip(masks, boxes.int().tolist(), strict=True):
        mask[top:bottom, left:right] = 1
    target = {"boxes": boxes, "labels": torch.randint(1, CLASSES + 1, (OBJECTS,), generator=generator), "masks": masks}
    return image.to(device), {name: value.to(device) for name, value in target.items()}


def measure_step(one: Row) -> Row:
    """Return seconds and peak memory of a step."""
    cpu = one["device"] == "cpu"
    torch.set_num_threads(one["threads"])
    if cpu:
        limit = int(one["memory"] * 1e9)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    try:
        torch.manual_seed(0)
        settings = DetectConfig(weights="x", **SMALL if one["quick"] else {})
        detector = build_detector(settings, build_backbone(one["network"]), CLASSES, EvalTransform())
        detector.to(one["device"]).train()
        optimizer = torch.optim.AdamW([p for p in detector.parameters() if p.requires_grad], lr=1e-6)

        def step(side: int) -> None:
            images, targets = zip(*[example(side, one["device"])] * one["batch"], strict=True)
            with torch.autocast(one["device"], torch.bfloat16, enabled=one["precision"] == "bf16"):
                losses = detector(list(images), list(targets))
            torch.stack(list(losses.values())).sum().backward()
            optimizer.step()
            optimizer.zero_grad()

        step(64)  # loads the libraries
        first = seconds(lambda: step(one["side"]), one["device"])
        times = [seconds(lambda: step(one["side"]), one["device"]) for _ in range(one["rounds"] if first < 60 else 0)]
    except (RuntimeError, MemoryError) as error:
        # oneDNN says "could not create a primitive" (or a memory object) when it gets no memory.
        if not is_out_of_memory(error) and "could not create a" not in str(error):
            raise
        return {"error": OUT_OF_MEMORY}
    peak = peak_memory() if cpu else torch.cuda.max_memory_allocated()
    return {"seconds": round(median(times or [first]), 3), "peak_GB": round(peak / 1e9, 2)}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--sizes", type=int, nargs="+", default=[512, 1024, 1536], help="sides of the images")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--memory", type=float, default=20, help="GB of address space of a process on a CPU")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="threads of PyTorch on a CPU")
    parser.add_argument("--quick", action="store_true", help="tiny networks and detectors, sizes 64 and 128")
    given = parser.parse_args()
    if min(*given.sizes, given.batch, given.memory, given.rounds, given.threads) <= 0:
        raise InputError("sizes, batch, memory, rounds and threads must be more than 0")
    networks, sizes = (QUICK, [64, 128]) if given.quick else (NETWORKS, given.sizes)
    names = ("device", "batch", "precision", "memory", "rounds", "threads", "quick")
    common: Row = {name: getattr(given, name) for name in names}
    result = common | found_apart(device_name, common) | {"torch": torch.__version__, "rows": []}
    cells: list[list[str]] = []
    for side in sizes:
        for name, network in networks.items():
            row = {"name": name, "network": network, "side": side}
            row |= found_apart(measure_step, common | row)
            result["rows"].append(row)
            shown = [row["error"], "-"] if "error" in row else [f"{row['seconds']:.3g}", f"{row['peak_GB']:.2f}"]
            cells.append([name, str(side), *shown])
            print(f"{name}, {side} pixels: {shown[0]}", file=sys.stderr, flush=True)
    print(f"{result['device_name']}, batch {given.batch}, {given.precision}")
    print(table(["network", "side", "s / step", "peak GB"], cells))
    print(json.dumps(result))


if __name__ == "__main__":
    run_main(main)
