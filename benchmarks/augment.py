"""Time per image on one core from a file to normalised views, compared with other pipelines.

    OMP_NUM_THREADS=1 python benchmarks/augment.py --photos DIR [--reference DIR] [--rounds 7] [--device cuda]
        [--against DIR]

DIR contains JPEGs of typical size; ours reads them from the page cache, the others have them in memory. ``--reference``
is a folder with a checkout of facebookresearch/dino as ``dino/``. torchvision v2 and kornia (if installed) follow their
documentation. All pipelines take turns on one thread; ratios are medians over the rounds. ``--device cuda`` also times
the GPU part of ours and compares its output with the CPU's. ``--against`` alternates with the script of an earlier
commit's checkout.

The last line is one JSON object: ``ratio_reference`` is our speed divided by the reference's, ``ratio_worker`` that of
a loader worker that leaves colours, blur and solarisation to the GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import itertools
import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import dino_xcit  # noqa: E402, F401  # isort: skip  (before torch: configures idle OpenMP threads)
import torch  # noqa: E402
from against import add_arguments, compare_commits, import_peer, spread, timed  # noqa: E402
from PIL import Image  # noqa: E402
from torch import Tensor  # noqa: E402
from torchvision.io import ImageReadMode, decode_image  # noqa: E402
from torchvision.transforms import v2  # noqa: E402

from dino_xcit.augment import MultiCropAugmentation  # noqa: E402
from dino_xcit.data import Source, open_source  # noqa: E402
from dino_xcit.data.loader import MultiCropDataset  # noqa: E402
from dino_xcit.errors import InputError, run_main  # noqa: E402
from dino_xcit.runtime.memory import keep_freed_memory  # noqa: E402
from dino_xcit.transform import IMAGENET_MEAN, IMAGENET_STD, normalise  # noqa: E402
from eval.table import table  # noqa: E402

BATCH = 16
RECIPE = [(224, (0.4, 1.0), 1.0, 0.0), (224, (0.4, 1.0), 0.1, 0.2), *[(96, (0.05, 0.4), 0.5, 0.0)] * 8]
"""Side in pixels, share of the area, probability of blur and of solarisation of each view: DINO's, our defaults."""
AGAINST = {"ms_ours": "less", "ms_ours_workers_share": "less", "ms_device_share": "less", "ms_torchvision_v2": "less"}
"""torchvision's figure shows the variation of the machine."""

Pipeline = Callable[[int], None]
"""Processes the first N images."""


def ours(source: Source, on_device: bool) -> Pipeline:
    """This project's pipeline to normalised views, or with ``on_device`` only the loader worker's part of it."""
    dataset = dataset_of(source, on_device)
    epochs = itertools.count()

    def run(count: int) -> None:
        epoch = next(epochs)
        for start in range(0, count, BATCH):
            batch = batch_of(dataset, epoch, range(start, min(start + BATCH, count)))
            if not on_device:
                for crops in batch.crops:
                    normalise(crops, IMAGENET_MEAN, IMAGENET_STD)

    return run


def dataset_of(source: Source, on_device: bool) -> MultiCropDataset:
    """Return the dataset of the loader workers; ``on_device`` leaves the photometric part to the device."""
    return MultiCropDataset(source, MultiCropAugmentation(), seed=0, finish_on_device=on_device)


def batch_of(dataset: MultiCropDataset, epoch: int, images: range) -> Any:
    """Return a batch of views."""
    return dataset.__getitems__([(epoch, image) for image in images])


def image_by_image(
    files: Sequence[bytes], decode: Callable[[bytes], Any], views: Sequence[Callable[[Any], object]]
) -> Pipeline:
    """A pipeline that computes each view of each image separately."""

    def run(count: int) -> None:
        for data in files[:count]:
            image = decode(data)
            for view in views:
                view(image)

    return run


def reference(files: Sequence[bytes], folder: Path) -> Pipeline:
    """The code of facebookresearch/dino."""
    augment = import_peer(folder, "dino/main_dino.py").DataAugmentationDINO((0.4, 1.0), (0.05, 0.4), 8)
    return image_by_image(files, lambda data: Image.open(io.BytesIO(data)).convert("RGB"), [augment])


def to_tensor(data: bytes) -> Tensor:
    """Decode a file to [3, H, W] uint8 with torchvision."""
    return decode_image(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB)


def torchvision_v2(files: Sequence[bytes]) -> Pipeline:
    """The same recipe on uint8 tensors, as recommended by torchvision's documentation for speed."""
    views = [
        v2.Compose(
            [
                v2.RandomResizedCrop(size, scale, interpolation=v2.InterpolationMode.BICUBIC, antialias=True),
                v2.RandomHorizontalFlip(0.5),
                v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2, 0.1)], 0.8),
                v2.RandomGrayscale(0.2),
                v2.RandomApply([v2.GaussianBlur(13, (0.1, 2.0))], blur),
                v2.RandomSolarize(128, solarize),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(list(IMAGENET_MEAN), list(IMAGENET_STD)),
            ]
        )
        for size, scale, blur, solarize in RECIPE
    ]
    return image_by_image(files, to_tensor, views)


def kornia(files: Sequence[bytes]) -> Pipeline:
    """The same recipe in kornia, image by image because sizes differ."""
    import kornia.augmentation as K

    views = [
        K.AugmentationSequential(
            K.RandomResizedCrop((size, size), scale, resample="bicubic", cropping_mode="resample"),
            K.RandomHorizontalFlip(p=0.5),
            K.ColorJitter(0.4, 0.4, 0.2, 0.1, p=0.8),
            K.RandomGrayscale(p=0.2),
            K.RandomGaussianBlur((13, 13), (0.1, 2.0), p=blur),
            K.RandomSolarize(0.0, 0.0, p=solarize),
            K.Normalize(torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)),
            data_keys=["input"],
        )
        for size, scale, blur, solarize in RECIPE
    ]
    return image_by_image(files, lambda data: to_tensor(data)[None].float() / 255, views)


def on_device(source: Source, device: torch.device, rounds: int, images: int = 64) -> dict[str, float]:
    """Return the GPU time per image in ms, and the maximum difference from the CPU's views in levels of 255."""
    chosen = range(min(images, len(source)))
    unfinished = batch_of(dataset_of(source, True), 0, chosen).pin_memory()

    def finish() -> None:
        for crops in unfinished.to(device).crops:
            normalise(crops, IMAGENET_MEAN, IMAGENET_STD)
        torch.cuda.synchronize(device)

    pairs = zip(unfinished.to(device).crops, batch_of(dataset_of(source, False), 0, chosen).crops, strict=True)
    error = max(float((found.cpu().int() - expected.int()).abs().max()) for found, expected in pairs)
    times = [timed(finish)[1] for _ in range(rounds + 2)]
    return {"ms_device_share": 1e3 * median(times[2:]) / len(chosen), "max_error_device_path_255": error}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", required=True)
    parser.add_argument("--reference", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    add_arguments(parser)
    given = parser.parse_args()
    if given.against:
        return compare_commits(["augment.py"], AGAINST, given)
    torch.set_num_threads(1)
    keep_freed_memory()  # as in the loader workers; here for all pipelines
    source = open_source(given.photos)
    files = [data for data in (source.read(index)[0] for index in range(len(source))) if isinstance(data, bytes)]
    if len(files) < len(source):
        raise InputError(f"--photos {given.photos} has decoded images, expected files such as JPEGs")
    pipelines = {"ours": ours(source, False), "ours_workers_share": ours(source, True)}
    pipelines["torchvision_v2"] = torchvision_v2(files)
    if given.reference:
        pipelines["reference"] = reference(files, given.reference)
    if importlib.util.find_spec("kornia"):
        pipelines["kornia"] = kornia(files)
    times: dict[str, list[float]] = {name: [] for name in pipelines}
    for _ in range(given.rounds + 1):
        for name, run in pipelines.items():
            # kornia takes several times as long as the others, so use a quarter of the images.
            count = max(1, len(files) // 4) if name == "kornia" else len(files)
            times[name].append(1e3 * timed(partial(run, count))[1] / count)
    result: dict[str, Any] = {"images": len(files), "rounds": given.rounds}
    rows = []
    for name, (_, *found) in times.items():  # drop the first round, which compiles and warms up
        ratios = [theirs / own for theirs, own in zip(found, times["ours"][1:], strict=True)]
        rows.append([name, spread(found), f"{1e3 / median(found):.0f}", spread(ratios)])
        result |= {f"ms_{name}": median(found), f"ratio_{name}": median(ratios)}
    print(f"{len(files)} images, one thread\n")
    print(table(["", "ms per image", "images/s per core", "x the time of ours"], rows))
    if given.reference:
        pairs = zip(times["reference"][1:], times["ours_workers_share"][1:], strict=True)
        result["ratio_worker"] = median(theirs / own for theirs, own in pairs)
    if given.device.type == "cuda":
        result |= on_device(source, given.device, given.rounds) | {"device": torch.cuda.get_device_name(given.device)}
        print(f"GPU part: {result['ms_device_share']:.3f} ms per image")
    print(json.dumps(result))
    return None


if __name__ == "__main__":
    run_main(main)
