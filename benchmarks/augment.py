"""What an image costs one core from the file to normalised views, beside others' pipelines; how equal views are.

    OMP_NUM_THREADS=1 python benchmarks/augment.py --photos DIR [--reference DIR] [--rounds 7] [--workers 2] \
        [--device cuda] [--against DIR]

DIR holds JPEGs of usual size in any folders. ``--reference`` names a folder with a checkout of facebookresearch/dino as
``dino/``. torchvision v2 is written as its documentation suggests, and so is kornia, which is measured where it is
installed. Each round measures all of them once, one after another on one thread; a ratio is the median of the rounds'
ratios, and its range is the least and the greatest. With ``--device cuda`` the views are finished there too, their bits
compared, and the device's share is timed. The last line is one JSON object. ``--against`` instead runs this script and
that of an earlier commit's checkout in turn, with the same arguments (against.py).
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import dino_xcit  # noqa: E402, F401  # isort: skip
import numpy as np  # noqa: E402
import torch  # noqa: E402
import torchvision.io  # noqa: E402
from against import Figures, add_arguments, compare_commits  # noqa: E402
from numpy.typing import NDArray  # noqa: E402
from PIL import Image, ImageFilter, ImageOps  # noqa: E402
from torchvision.transforms import functional as TF  # noqa: E402
from torchvision.transforms import v2  # noqa: E402

from dino_xcit.augment import MultiCropAugmentation, ViewMaker, ViewParameters  # noqa: E402
from dino_xcit.augment import parameters as column  # noqa: E402
from dino_xcit.augment.on_device import finish_views  # noqa: E402
from dino_xcit.augment.photometric import finish_view, scratch_size  # noqa: E402
from dino_xcit.data import Source, open_source  # noqa: E402
from dino_xcit.data.decode import decode, decode_pixels  # noqa: E402
from dino_xcit.data.loader import Batch, MultiCropDataset, StepSampler, build_loader  # noqa: E402
from dino_xcit.errors import InputError, run_main  # noqa: E402
from dino_xcit.runtime.memory import keep_freed_memory  # noqa: E402
from dino_xcit.transform import IMAGENET_MEAN, IMAGENET_STD, normalise  # noqa: E402

BATCH = 16
AUGMENTATION = MultiCropAugmentation()
AGAINST: Figures = {
    "ours, ms": (("ms_ours",), "less"),
    "worker's share, ms": (("ms_ours_workers_share",), "less"),
    "device's share, ms": (("ms_device_share",), "less"),
    "loader, images/s": (("loader_images_per_s",), "more"),
    "torchvision v2, ms": (("ms_torchvision_v2",), "less"),
}
"""What --against looks at. torchvision's tells how much the machine varies."""


# ---- the pipelines: each takes all files once


def reference(folder: Path) -> Callable[[list[bytes]], None]:
    """facebookresearch/dino's own code."""
    main_file = folder / "dino" / "main_dino.py"
    if not main_file.is_file():
        raise InputError(f"no {main_file}: --reference is a folder that holds a checkout of facebookresearch/dino")
    shim: Any = types.ModuleType("torch._six")  # which PyTorch no longer has
    shim.inf = float("inf")
    sys.modules["torch._six"] = shim
    torch.hub.list = lambda *_, **__: []  # noqa: TID251  # which would ask the network
    sys.path.insert(0, str(main_file.parent))
    spec = importlib.util.spec_from_file_location("main_dino", main_file)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.path.remove(str(main_file.parent))
    augment = module.DataAugmentationDINO((0.4, 1.0), (0.05, 0.4), 8)

    def run(files: list[bytes]) -> None:
        for data in files:
            augment(Image.open(io.BytesIO(data)).convert("RGB"))

    return run


def torchvision_v2() -> Callable[[list[bytes]], None]:
    """The same recipe on uint8 tensors, as torchvision's documentation advises for speed."""

    def views(size: int, scale: tuple[float, float], blur: float, solarize: float) -> Callable[[Any], Any]:
        return v2.Compose(
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

    first, second = views(224, (0.4, 1.0), 1.0, 0.0), views(224, (0.4, 1.0), 0.1, 0.2)
    local = views(96, (0.05, 0.4), 0.5, 0.0)

    def run(files: list[bytes]) -> None:
        for data in files:
            encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            image = torchvision.io.decode_image(encoded, torchvision.io.ImageReadMode.RGB)
            first(image), second(image)
            for _ in range(8):
                local(image)

    return run


def kornia() -> Callable[[list[bytes]], None] | None:
    """The same recipe in kornia, image by image, as their sizes differ; None where it is not installed."""
    try:
        import kornia.augmentation as K
    except ImportError:
        return None

    def views(size: int, scale: tuple[float, float], blur: float, solarize: float) -> Any:
        return K.AugmentationSequential(
            K.RandomResizedCrop((size, size), scale, resample="bicubic", cropping_mode="resample"),
            K.RandomHorizontalFlip(p=0.5),
            K.ColorJitter(0.4, 0.4, 0.2, 0.1, p=0.8),
            K.RandomGrayscale(p=0.2),
            K.RandomGaussianBlur((13, 13), (0.1, 2.0), p=blur),
            K.RandomSolarize(0.0, 0.0, p=solarize),
            K.Normalize(torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)),
            data_keys=["input"],
        )

    first, second = views(224, (0.4, 1.0), 1.0, 0.0), views(224, (0.4, 1.0), 0.1, 0.2)
    local = views(96, (0.05, 0.4), 0.5, 0.0)

    def run(files: list[bytes]) -> None:
        for data in files:
            encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            image = torchvision.io.decode_image(encoded, torchvision.io.ImageReadMode.RGB)[None].float() / 255
            first(image), second(image)
            for _ in range(8):
                local(image)

    return run


class InMemory:
    """A source whose files are read already: reading is not what is measured."""

    url = "memory"
    classes: tuple[str, ...] | None = None
    labels: NDArray[np.int64] | None = None

    def __init__(self, files: list[bytes]) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def read(self, index: int) -> tuple[bytes, None]:
        return self.files[index], None

    def name(self, index: int) -> str:
        return str(index)

    def fingerprint(self) -> str:
        return "memory"


def ours(files: list[bytes], *, finish_on_device: bool) -> Callable[[list[bytes]], None]:
    """The loader's own batches; up to normalised views, or what is left to a loader process beside a GPU."""
    source: Source = InMemory(files)
    dataset = MultiCropDataset(source, AUGMENTATION, seed=0)
    dataset.finish_on_device.fill_(finish_on_device)
    epoch = [0]

    def run(files: list[bytes]) -> None:
        epoch[0] += 1
        for start in range(0, len(files), BATCH):
            keys = [(epoch[0], index) for index in range(start, min(start + BATCH, len(files)))]
            batch = dataset.__getitems__(keys)
            assert isinstance(batch, Batch)
            if not finish_on_device:
                for crops in batch.crops:
                    normalise(crops, IMAGENET_MEAN, IMAGENET_STD)

    return run


# ---- figures


def milliseconds(run: Callable[[], object], images: int) -> float:
    """Milliseconds an image."""
    began = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - began) / images


def stages(files: list[bytes], rounds: int) -> dict[str, float]:
    """Milliseconds an image, one stage after another; the median of the rounds."""
    maker = ViewMaker()
    pictures = [decode_pixels(data, "") for data in files]
    rows = [
        AUGMENTATION.draw_rows(picture.shape[1], picture.shape[0], 0, 0, index)
        for index, picture in enumerate(pictures)
    ]
    outs = [np.empty((3, kind.size, kind.size), dtype=np.uint8) for kind in AUGMENTATION.views]
    scratch = np.empty(scratch_size(224, 2.0), dtype=np.uint8)
    batches = [torch.zeros(2, 3, 224, 224, dtype=torch.uint8), torch.zeros(8, 3, 96, 96, dtype=torch.uint8)]
    no_jitter = np.array([-1.0, 1.0] * 4)

    def geometry() -> None:
        for picture, drawn in zip(pictures, rows, strict=True):
            maker.load(picture)
            for row, out in zip(drawn, outs, strict=True):
                maker.make(row, out, photometric=False)

    def finish(jitter: bool, gray_and_solarize: bool, blur: bool) -> None:
        for drawn in rows:
            for row, out in zip(drawn, outs, strict=True):
                finish_view(
                    out,
                    scratch,
                    np.ascontiguousarray(row[column.JITTER]) if jitter else no_jitter,
                    bool(row[column.GRAY]) and gray_and_solarize,
                    float(row[column.SIGMA]) if blur else -1.0,
                    bool(row[column.SOLARIZE]) and gray_and_solarize,
                )

    work: dict[str, Callable[[], object]] = {
        "decode": lambda: [decode_pixels(data, "") for data in files],
        "draw": lambda: [AUGMENTATION.draw_rows(500, 375, 0, 1, index) for index in range(len(files))],
        "geometry": geometry,
        "jitter": lambda: finish(True, False, False),
        "gray, solarise": lambda: finish(False, True, False),
        "blur": lambda: finish(False, False, True),
        "normalise": lambda: [normalise(crops, IMAGENET_MEAN, IMAGENET_STD) for _ in files for crops in batches],
    }
    times: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(rounds + 1):
        for name, run in work.items():
            times[name].append(milliseconds(run, len(files)))
    return {name: median(found[1:]) for name, found in times.items()}  # the first round warms up


def by_pillow(image: Image.Image, size: int, v: ViewParameters) -> NDArray[np.int64]:
    """A view at given parameters by torchvision's functions on Pillow images, as the reference makes it."""
    view = TF.resized_crop(image, v.top, v.left, v.height, v.width, [size, size], TF.InterpolationMode.BICUBIC)
    if v.flip:
        view = TF.hflip(view)
    for name, factor in v.jitter:
        view = getattr(TF, f"adjust_{name}")(view, factor)
    if v.gray:
        view = TF.rgb_to_grayscale(view, num_output_channels=3)
    if v.blur_radius is not None:
        view = view.filter(ImageFilter.GaussianBlur(radius=v.blur_radius))
    if v.solarize:
        view = ImageOps.solarize(view)
    return np.asarray(view).transpose(2, 0, 1).astype(np.int64)


def errors(files: list[bytes], device: torch.device) -> dict[str, float]:
    """Mean and greatest difference, in levels of 255, between our views and Pillow's at the same parameters."""
    total, pixels, greatest, on_device = 0, 0, 0, 0
    for index, data in enumerate(files):
        image = decode(data, "")
        views = AUGMENTATION(image, 0, 0, index)
        drawn = AUGMENTATION.draw(image.width, image.height, 0, 0, index)
        maker = ViewMaker()
        maker.load(decode_pixels(data, ""))
        for kind, parameters, view, row in zip(
            AUGMENTATION.views,
            drawn,
            views,
            AUGMENTATION.draw_rows(image.width, image.height, 0, 0, index),
            strict=True,
        ):
            difference = np.abs(view.numpy().astype(np.int64) - by_pillow(image, kind.size, parameters))
            total, pixels = total + int(difference.sum()), pixels + difference.size
            greatest = max(greatest, int(difference.max()))
            unfinished = np.empty((3, kind.size, kind.size), dtype=np.uint8)
            maker.make(row, unfinished, photometric=False)
            finished = finish_views(torch.from_numpy(unfinished)[None].to(device), torch.from_numpy(row)[None])[0]
            on_device = max(on_device, int((finished.cpu().int() - view.int()).abs().max()))
    return {"mean_error_255": total / pixels, "max_error_255": greatest, "max_error_device_path_255": on_device}


def device_share(files: list[bytes], device: torch.device, rounds: int, images: int = 64) -> float:
    """Milliseconds an image that a GPU spends on finishing and normalising the views of a batch."""
    dataset = MultiCropDataset(InMemory(files), AUGMENTATION, seed=0)
    dataset.finish_on_device.fill_(True)
    batch = dataset.__getitems__([(0, index % len(files)) for index in range(images)])
    assert isinstance(batch, Batch)
    pinned, times = batch.pin_memory(), []
    for _ in range(rounds + 2):
        torch.cuda.synchronize(device)
        began = time.perf_counter()
        for crops in pinned.to(device).crops:
            normalise(crops, IMAGENET_MEAN, IMAGENET_STD)
        torch.cuda.synchronize(device)
        times.append(1e3 * (time.perf_counter() - began) / images)
    return median(times[2:])


def through_the_loader(files: list[bytes], workers: int) -> float:
    """Images a second that ``workers`` loader processes hand to this one, finished."""
    sampler = StepSampler(len(files), BATCH, start_step=0, stop_step=6 * (len(files) // BATCH))
    source: Source = InMemory(files)
    loader = build_loader(source, AUGMENTATION, sampler, 0, workers, torch.device("cpu"))
    for _ in range(2 * workers):
        next(loader)
    began, count = time.perf_counter(), 0
    for batch in loader:
        count += len(batch.indices)
    return count / (time.perf_counter() - began)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--reference", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--workers", type=int, default=0, help="also measure the loader with so many processes")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    add_arguments(parser)
    arguments = parser.parse_args()
    if arguments.against:
        compare_commits("augment.py", AGAINST, arguments)
        return
    torch.set_num_threads(1)
    keep_freed_memory()  # as the loader's processes do; for all of them alike
    source = open_source(str(arguments.photos))
    files = [data for data in (source.read(index)[0] for index in range(len(source))) if isinstance(data, bytes)]

    pipelines: dict[str, Callable[[list[bytes]], None] | None] = {
        "ours": ours(files, finish_on_device=False),
        "ours, worker's share": ours(files, finish_on_device=True),
        "torchvision v2": torchvision_v2(),
        "kornia": kornia(),
    }
    if arguments.reference:
        pipelines["reference"] = reference(arguments.reference)
    there = {name: run for name, run in pipelines.items() if run is not None}
    times: dict[str, list[float]] = {name: [] for name in there}
    for run in there.values():
        run(files[:BATCH])  # compiles, and warms up
    for number in range(arguments.rounds):
        for name, run in there.items():
            # kornia takes several times as long as all the others: a part of the files, every other round.
            part = files[: len(files) // 4] if name == "kornia" else files
            if name != "kornia" or number % 2 == 0:
                times[name].append(milliseconds(lambda run=run, part=part: run(part), len(part)))  # type: ignore[misc]

    print(f"{len(files)} JPEGs, one thread; milliseconds an image: median (least to greatest) of the rounds")
    result: dict[str, Any] = {"images": len(files), "rounds": arguments.rounds}
    for name, found in times.items():
        print(
            f"  {name:22s} {median(found):7.2f} ({min(found):.2f} to {max(found):.2f})"
            f"   {1e3 / median(found):6.0f} images/s a core"
        )
        result[f"ms_{name.replace(', ', '_').replace(' ', '_').replace(chr(39), '')}"] = round(median(found), 3)
    missing = [name for name in ("reference", "kornia") if name not in there]
    if missing:
        print(f"  not measured: {', '.join(missing)}")
    if "reference" in times:
        for key, name in (("ratio_reference", "ours"), ("ratio_worker", "ours, worker's share")):
            ratios = [theirs / own for theirs, own in zip(times["reference"], times[name], strict=True)]
            print(f"  reference / {name}: {median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
            result[key] = round(median(ratios), 2)
    for name in ("torchvision v2", "kornia"):
        if name in times:
            result[f"ratio_{name.replace(' ', '_')}"] = round(median(times[name]) / median(times["ours"]), 2)
            print(f"  {name} / ours: {result[f'ratio_{name.replace(chr(32), chr(95))}']}")
    by_stage = stages(files, arguments.rounds)
    print("ours by stage, ms an image: " + ", ".join(f"{name} {value:.2f}" for name, value in by_stage.items()))
    result["ms_stages"] = {name: round(value, 3) for name, value in by_stage.items()}
    difference = errors(files, arguments.device)
    print(
        "against Pillow at the same parameters, levels of 255: " + ", ".join(f"{k} {v}" for k, v in difference.items())
    )
    result |= difference
    if arguments.device.type == "cuda":
        result["ms_device_share"] = round(device_share(files, arguments.device, arguments.rounds), 4)
        result["device"] = torch.cuda.get_device_name(arguments.device)
        print(f"the device's share, {result['device']}: {result['ms_device_share']:.3f} ms an image")
    if arguments.workers:
        speed = through_the_loader(files, arguments.workers)
        print(f"through the loader, {arguments.workers} processes: {speed:.0f} images/s")
        result["loader_images_per_s"] = round(speed, 1)
    print(json.dumps(result))


if __name__ == "__main__":
    run_main(main)
