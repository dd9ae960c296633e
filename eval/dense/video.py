"""Label propagation in videos with frozen patch features (DINO, arXiv 2104.14294, section 4.2.2; DAVIS 2017).

A patch takes its labels from the ``k`` most similar patches of the first frame and of the ``previous`` frames, among
those within ``radius`` rows and columns. Their weights are exp(cosine / T), normalised. These soft labels propagate
further. To draw a frame, the map of each label is enlarged to the frame and scaled to the range from 0 to 1; the
largest wins.

The ranks share the videos.

h, w: grid of patches, D: features, C: context frames, L: labels (background and objects), t: targets of a tile.
"""

from __future__ import annotations

import hashlib
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from dino_xcit.cli import parse
from dino_xcit.data import decode
from dino_xcit.data.decode import UndecodableImage, decode_mask, read_header
from dino_xcit.data.source import evenly_spaced, hash_lines
from dino_xcit.errors import InputError, one_line
from dino_xcit.runtime import distributed
from dino_xcit.runtime import logging as log
from dino_xcit.runtime.logging import counted, progress_bar
from dino_xcit.transform import to_tensor
from dino_xcit.weights import LoadedBackbone
from eval.dense.config import VideoConfig
from eval.dense.davis import score_frame
from eval.dense.patches import patch_features, write_result
from eval.palette import colours, overlay, to_palette
from eval.pooling import patch_size_of
from eval.results import SAMPLED, Metric
from eval.setup import demand_writable, open_weights
from eval.table import table

Labels = NDArray[np.uint8]
"""Object numbers [height, width]; 0: background."""
Scores = dict[int, tuple[float, float]]
"""J and F in percent of each object of a video."""

MULTIPLE = 64
"""The longer side of a resized frame is a multiple of this."""
MAX_OBJECTS = 64
TILE = 16
"""Side of the tiles of patches that are compared with their neighbourhood at once. The similarities of all pairs of
patches would take gigabytes."""
FRAME_MS, SHOWN_SIDE = 80, 480
"""Milliseconds per frame of an animation, and its longer side in pixels."""
_FRAMES = (".jpg", ".jpeg", ".png")


def main() -> None:
    """Parse the command line, propagate, and report."""
    began = time.perf_counter()
    config = parse(VideoConfig, sys.argv[1:], "python -m eval.dense video")
    loaded, device = open_weights(config)
    videos = open_videos(config)
    demand_writable({"out": config.out and str(Path(config.out, f"{videos[0].name}.webp"))})
    frames, measured = (sum(map(len, lists)) for lists in ([v.frames for v in videos], [v.measured for v in videos]))
    if not measured and (config.json or not config.out):
        raise InputError("no masks of later frames to measure with: give --out DIR, and no --json, to propagate only")
    white_level = config.white_level or loaded.transform.white_level
    loaded = replace(
        loaded, transform=replace(loaded.transform, resize=config.size, crop=config.size, white_level=white_level)
    )
    log.info(f"{counted(len(videos), 'video')} of {counted(frames, 'frame')}, {measured:,} measured")

    # ---- each rank takes every n-th video
    scores: dict[str, Scores] = {}
    own = videos[distributed.rank() :: distributed.world_size()]
    with progress_bar(sum(len(one.frames) for one in own), "video", distributed.is_main(), unit="frame") as bar:
        for video in own:
            scores[video.name] = evaluate_video(video, loaded, config, device, bar.update)
    for part in distributed.gather_objects(scores):
        scores |= part
    if not distributed.is_main():
        return

    # ---- report
    seconds = time.perf_counter() - began
    log.info(
        f"{seconds:.1f} s, {seconds / frames:.2f} s per frame" + (f"; written: {config.out}" if config.out else "")
    )
    if measured:
        report(config, loaded, device, videos, scores, seconds)


# ---- videos


@dataclass(frozen=True)
class Video:
    """Frames of a video, and masks of some of them."""

    name: str
    frames: tuple[Path, ...]
    masks: Mapping[Path, Path]
    """By frame."""
    annotations: Path
    """Folder of the masks."""

    @property
    def measured(self) -> list[Path]:
        """Frames with masks, without the first and the last frame, as in DAVIS."""
        return [frame for frame in self.frames[1:-1] if frame in self.masks]

    def check(self, out: Path | None) -> None:
        """Check frames and masks before the first video is used, by their headers.

        Raises:
            InputError: there are fewer than two frames, a file has another size than the first frame, the first frame
                has no mask, its mask has no object, or the output would overwrite frames or masks.
        """
        if len(self.frames) < 2:
            found = counted(len(self.frames), "frame")
            raise InputError(f"{self.name} has {found}, expected at least 2 files, .jpg or .png")
        first = self.frames[0]
        if first not in self.masks:
            raise InputError(
                f"{self.name} has no mask of its first frame, {first.name}: add {self.annotations / first.stem}.png"
                + ("" if self.annotations.parent.name == "480p" else ", or give --first-mask FILE")
            )
        files = (*self.frames, *self.masks.values())
        (width, height), *others = map(_size, files)
        for path, found_size in zip(files[1:], others, strict=True):
            if found_size != (width, height):
                found = " x ".join(map(str, found_size))
                raise InputError(f"{path} has {found} pixels, expected {width} x {height} as in {first.name}")
        objects = set(np.unique(read_labels(self.masks[first])).tolist()) - {0}
        if not 1 <= len(objects) <= MAX_OBJECTS:
            found = counted(len(objects), "object")
            raise InputError(
                f"{self.masks[first]} has {found}, expected 1 to {MAX_OBJECTS}: a number for each object, "
                "0 for the background"
            )
        if out and (out / self.name).resolve() in {path.resolve().parent for path in files}:
            raise InputError(f"out is {out}, which would overwrite files of {self.name}: give another --out")


def open_videos(config: VideoConfig) -> list[Video]:
    """Open and check the videos of DAVIS, or a folder with the frames of one video.

    Raises:
        InputError: the folder or a video is missing, or see :meth:`Video.check`.
    """
    root = Path(config.data_path)
    if not root.is_dir():
        raise InputError(f"data_path is {root}, which is no folder: give DAVIS 2017 or a folder of frames")
    if (root / "JPEGImages").is_dir():
        videos = _davis(config, root)
    else:
        videos = [_video(root.resolve().name, root, root / "masks", config.first_mask)]
    for video in videos:
        video.check(Path(config.out) if config.out else None)
    return videos


def _davis(config: VideoConfig, root: Path) -> list[Video]:
    """Return the videos of ImageSets/2017/val.txt, or all videos if there is no such file."""
    if config.first_mask:
        raise InputError("first_mask has no effect with DAVIS, whose masks are in Annotations: leave it out")
    images, masks, listing = root / "JPEGImages/480p", root / "Annotations/480p", root / "ImageSets/2017/val.txt"
    if listing.is_file():
        names = listing.read_text().split()
    else:
        names = sorted(path.name for path in images.glob("*") if path.is_dir())
        log.warning(f"{listing} is missing: all {counted(len(names), 'video')} of {images} are evaluated")
    missing = [images / name for name in names if not (images / name).is_dir()]
    if missing or not names:
        raise InputError(f"there is no folder {[*missing, images / '*'][0]}: unpack DAVIS 2017 (480p) again")
    return [_video(name, images / name, masks / name) for name in names]


def _video(name: str, images: Path, annotations: Path, first_mask: str = "") -> Video:
    frames, masks = _files(images, *_FRAMES), {path.stem: path for path in _files(annotations, ".png")}
    if first_mask and frames:
        masks[frames[0].stem] = Path(first_mask)
    by_frame = {frame: masks[frame.stem] for frame in frames if frame.stem in masks}
    return Video(name, frames, by_frame, annotations)


def _files(folder: Path, *suffixes: str) -> tuple[Path, ...]:
    """Return the files of a folder with these suffixes, in the order of their names."""
    return tuple(sorted(path for path in folder.glob("[!.]*") if path.suffix.lower() in suffixes))


def _size(path: Path) -> tuple[int, int]:
    """Return width and height of an upright image."""
    try:
        return read_header(path.read_bytes(), str(path)).size
    except (OSError, UndecodableImage) as error:
        cause = error.cause if isinstance(error, UndecodableImage) else one_line(error)
        raise InputError(f"{path} cannot be read: {cause}; replace it") from None


def read_labels(path: Path) -> Labels:
    """Read a mask.

    Raises:
        InputError: the file is unreadable, or no PNG of object numbers.
    """
    try:
        return decode_mask(path.read_bytes(), str(path))
    except UndecodableImage as error:
        raise InputError(f"the mask {path} cannot be read: {error.cause}; replace it") from None


# ---- propagation


def evaluate_video(
    video: Video, loaded: LoadedBackbone, config: VideoConfig, device: torch.device, on_frame: Callable[[], object]
) -> Scores:
    """Propagate the objects of a video's first frame, write the requested files, and return the scores.

    Args:
        on_frame: called after each frame.
    """
    first = read_labels(video.masks[video.frames[0]])
    objects, measured = np.unique(first[first > 0]).tolist(), set(video.measured)
    folder = Path(config.out) / video.name if config.out else None
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
    found, shown = [], []
    for path, image, labels in propagated(video, first, [0, *objects], loaded, config, device):
        if path in measured:
            found.append(score_frame(labels, read_labels(video.masks[path]), objects))
        if folder:
            shown.append(write_frame(folder, path.stem, image, labels))
        on_frame()
    if folder:
        animation = folder.with_name(f"{folder.name}.webp")
        shown[0].save(animation, save_all=True, append_images=shown[1:], duration=FRAME_MS, loop=0)
    if not found:
        return {}
    means = np.mean(found, axis=0).tolist()
    return {number: (region, contour) for number, (region, contour) in zip(objects, means, strict=True)}


def propagated(
    video: Video, first: Labels, numbers: list[int], loaded: LoadedBackbone, config: VideoConfig, device: torch.device
) -> Iterator[tuple[Path, Image.Image, Labels]]:
    """Yield each frame with its labels; those of the first frame are given, with ``numbers`` in it."""
    objects, patch = np.array(numbers, dtype=np.uint8), patch_size_of(loaded.backbone)
    context: deque[tuple[Tensor, Tensor]] = deque(maxlen=config.previous)
    start: list[tuple[Tensor, Tensor]] = []
    for path in video.frames:
        image = decode(path.read_bytes(), str(path), loaded.transform.white_level)
        pixels = to_tensor(image.resize(resized(image.size, config.size, patch), Image.Resampling.BILINEAR))
        features = patch_features(loaded.backbone, pixels[None].to(device), loaded.transform, config.precision)[0]
        if not start:
            grid = (features.shape[1], features.shape[0])
            small = np.asarray(Image.fromarray(first).resize(grid, Image.Resampling.NEAREST))
            if lost := set(numbers[1:]) - set(np.unique(small).tolist()):
                numbers_lost = ", ".join(map(str, sorted(lost)))
                log.warning(f"{video.name}: objects smaller than a patch are lost ({numbers_lost}): raise --size")
            start = [(features, torch.from_numpy(small[..., None] == objects).float().to(device))]
            yield path, image, first
            continue
        sources, labels = (torch.stack(part) for part in zip(*start, *context, strict=True))
        soft = propagate(features, sources, labels, config.radius, config.k, config.temperature)
        context.append((features, soft))
        yield path, image, objects[to_label_map(soft, image.height, image.width).cpu().numpy()]


def resized(size: tuple[int, int], short: int, patch: int) -> tuple[int, int]:
    """Return width and height with the given shorter side, the longer one rounded down to a multiple of
    :data:`MULTIPLE`, and both to whole patches."""
    width, height = (max(short, side * short // min(size) // MULTIPLE * MULTIPLE) // patch * patch for side in size)
    return max(width, patch), max(height, patch)


def propagate(target: Tensor, sources: Tensor, labels: Tensor, radius: int, k: int, temperature: float) -> Tensor:
    """Return the soft labels [h, w, L] of a frame.

    Args:
        target: unit features of the frame, [h, w, D].
        sources, labels: unit features and soft labels of the context frames, [C, h, w, D] and [C, h, w, L].
        radius: maximum distance of a source from its target in rows and in columns.
        k: number of most similar sources that count.
    """
    height, width = target.shape[:2]
    row, column = (torch.arange(side, device=target.device) for side in (height, width))
    out = labels.new_empty(height, width, labels.shape[3])
    for top in range(0, height, TILE):
        for left in range(0, width, TILE):
            tile = slice(top, top + TILE), slice(left, left + TILE)
            near = slice(max(0, top - radius), top + TILE + radius), slice(max(0, left - radius), left + TILE + radius)
            far_rows = (row[tile[0]][:, None] - row[near[0]]).abs() > radius
            far_columns = (column[tile[1]][:, None] - column[near[1]]).abs() > radius
            far = far_rows[:, None, :, None] | far_columns[None, :, None, :]  # [target row, column, source row, column]
            queries, keys = target[tile].flatten(0, 1), sources[:, *near].flatten(0, 2)
            cosine = (queries @ keys.T).unflatten(1, (len(sources), -1))  # [t, C, sources of a frame]
            cosine.masked_fill_(far.flatten(2).flatten(0, 1)[:, None], -torch.inf)
            best, place = cosine.flatten(1).topk(min(k, cosine[0].numel()), dim=1)
            weights = (best / temperature).softmax(dim=1)  # exp(cosine / T), normalised over the k sources
            mixed = (weights[..., None] * labels[:, *near].flatten(0, 2)[place]).sum(dim=1)
            out[tile] = mixed.view(*out[tile].shape)
    return out


def to_label_map(soft: Tensor, height: int, width: int) -> Tensor:
    """Enlarge soft labels [h, w, L] to [height, width], scale each label's map to 0 ... 1, and return the index of the
    largest."""
    maps = F.interpolate(soft.permute(2, 0, 1)[None], (height, width), mode="bilinear", align_corners=False)[0]
    low, high = maps.amin(dim=(1, 2), keepdim=True), maps.amax(dim=(1, 2), keepdim=True)
    return ((maps - low) / (high - low).clamp(min=1e-12)).argmax(dim=0)


# ---- output


def write_frame(folder: Path, name: str, image: Image.Image, labels: Labels) -> Image.Image:
    """Write labels as a palette PNG and their overlay as a JPEG; return the overlay in the size of an animation."""
    palette = np.concatenate([np.zeros((1, 3), np.uint8), colours(255)])
    to_palette(labels, palette).save(folder / f"{name}.png")
    drawn_over = overlay(image, labels, palette, ignore=0)
    drawn_over.save(folder / f"{name}.jpg", quality=90)
    drawn_over.thumbnail((SHOWN_SIDE, SHOWN_SIDE))
    return drawn_over


def report(
    config: VideoConfig, loaded: LoadedBackbone, device: torch.device, videos: list[Video], scores: dict[str, Scores],
    seconds: float,
) -> None:  # fmt: skip
    """Print J&F, J and F of each video and over all objects, and write the result file."""
    pairs = {video.name: list(scores[video.name].values()) for video in videos if scores[video.name]}
    overall = "mean over objects"
    pairs[overall] = [pair for of_video in pairs.values() for pair in of_video]
    rows = {}
    for name, of_video in pairs.items():
        region, contour = np.mean(of_video, axis=0).tolist()
        rows[name] = {"J&F": (region + contour) / 2, "J": region, "F": contour}
    cells = [[name, str(len(pairs[name])), *(f"{value:.1f}" for value in row.values())] for name, row in rows.items()]
    log.info(table(["video", "objects", "J&F %", "J %", "F %"], cells))
    metrics = [Metric(name, {"measure": name}, value, None) for name, value in rows[overall].items()]
    settings = ("size", "previous", "radius", "k", "temperature", "precision")
    protocol = {name: getattr(config, name) for name in settings} | {"name": "DAVIS 2017, labels propagated as in DINO"}
    frames = [frame for video in videos for frame in video.frames]
    masks = [path for video in videos for _, path in sorted(video.masks.items())]
    data = {
        "val": {
            "url": config.data_path,
            "images": len(frames),
            "names": hash_lines(f"{frame.parent.name}/{frame.name}" for frame in frames),
            "contents": hash_lines(_digest(frames[index]) for index in evenly_spaced(len(frames), SAMPLED)),
            "labels": hash_lines(map(_digest, masks)),
        }
    }
    mean = rows.pop(overall)
    results = mean | {"videos": rows, "objects": {name: scores[name] for name in rows}}
    write_result(config, "dense video", protocol, results, metrics, loaded, data, device, seconds)


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def command() -> None:
    """Run :func:`main` with the exit codes of docs/reliability.md."""
    distributed.run_command(main, "give a smaller --size, or fewer --previous frames")


if __name__ == "__main__":
    command()
