"""Features of a frozen backbone over a data set, extracted once and kept. B batch, D features of an image's vector."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from dino_xcit.data import Source, UndecodableImage, decode
from dino_xcit.data.source import hash_lines
from dino_xcit.data.workers import choose_workers, worker_init
from dino_xcit.errors import InputError, printable
from dino_xcit.runtime import distributed, watchdog
from dino_xcit.runtime.logging import progress_bar
from dino_xcit.transform import EvalTransform, normalise
from eval.kept_rows import SKIPPED, Chunk, keep, kept_in, key_of, rows_in
from eval.kept_rows import write_rows as write_rows
from eval.pooling import CLASS_TOKEN, Descriptor

CACHE_VERSION = "1"

_TOO_FEW_FOR_WORKERS = 256
"""So few images are read in this process: starting another takes longer."""

_NAMES_IN_CARD, _NAMES_SHOWN = 100, 5
"""Of images that could not be read."""

Unreadable = Literal["refuse", "skip"]
"""What becomes of an image that cannot be read: an error that names it, or it is left out and counted."""


@dataclass
class Features:
    """Rows in the order of the source, of the images that could be read."""

    features: NDArray[np.float32]
    """[images, D], not normalised; memory-mapped where they come from the cache."""
    labels: NDArray[np.int64] | None
    """[images], or None for a source without labels."""
    fingerprint: str = ""
    """Of the source, where it was asked for (:func:`cached`)."""
    unreadable: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    """Numbers of the source's images that could not be read and are left out, ascending."""


class TransformedImages(Dataset[Tensor | InputError]):
    """Source items as uint8 tensors [3, crop, crop]; an image that cannot be read is handed over as its error."""

    def __init__(self, source: Source, transform: EvalTransform) -> None:
        self.source, self.transform = source, transform

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Tensor | InputError:
        try:
            return self.transform(decode(self.source.read(index)[0], self.source.name(index)))
        except UndecodableImage as error:
            # Handed over rather than raised: a loader process would bury the sentence in a traceback.
            return error
        except InputError as error:
            return UndecodableImage(str(error))


def _stack(images: list[Tensor | InputError]) -> tuple[Tensor, list[int], InputError | None]:
    """The images that could be read, their places among all, and the first error."""
    places = [place for place, image in enumerate(images) if not isinstance(image, InputError)]
    errors = [image for image in images if isinstance(image, InputError)]
    good = [image for image in images if isinstance(image, Tensor)]
    return torch.stack(good) if good else torch.empty(0), places, errors[0] if errors else None


def image_batches(
    source: Source,
    transform: EvalTransform,
    indices: Iterable[list[int]],
    total: int,
    num_workers: int,
    device: torch.device,
) -> Iterator[tuple[Tensor, list[int], InputError | None]]:
    """For each list of indices: its readable images [B, 3, crop, crop] uint8, their places in the list, an error.

    Args:
        indices: asked for some batches ahead of what is yielded.
        total: about how many images this process will read: few are not worth the start of loader processes.
        num_workers: loader processes; -1: chosen.
    """
    workers = choose_workers(num_workers, distributed.processes_here())
    if num_workers < 0 and total < _TOO_FEW_FOR_WORKERS:
        workers = 0
    loader: DataLoader[Tensor | InputError] = DataLoader(
        TransformedImages(source, transform),
        batch_sampler=indices,  # type: ignore[arg-type]  # anything that can be iterated over once will do
        num_workers=workers,
        collate_fn=_stack,
        worker_init_fn=worker_init() if workers else None,
        pin_memory=device.type == "cuda",
    )
    yield from loader


def feature_rows(
    backbone: nn.Module,
    source: Source,
    transform: EvalTransform,
    device: torch.device,
    batch_size: int = 128,
    num_workers: int = -1,
    progress: bool = True,
    unreadable: Unreadable = "refuse",
    descriptor: Descriptor = CLASS_TOKEN,
    finite: bool = True,
) -> Iterator[Chunk]:
    """Features in the order of the source, some at a time, so that nobody need hold them all; and which could be read.

    The backbone is in eval mode meanwhile; its mode is restored. Under torchrun the processes share the work and all
    get every row.

    Args:
        backbone: on ``device``, with the output of :class:`dino_xcit.models.BackboneOutput`.
        unreadable: an error, or a row of NaN.
        descriptor: how an image's vector is made.
        finite: refuse features that are not finite.

    Yields:
        Rows [some, D] float32, and whether each image could be read, [some].

    Raises:
        UndecodableImage: an image cannot be read; it is named.
        InputError: an image's features are not finite.
    """
    world, rank, total = distributed.world_size(), distributed.rank(), len(source)
    rounds = [range(start, min(start + batch_size * world, total)) for start in range(0, total, batch_size * world)]
    mine = [list(chunk[rank * batch_size : (rank + 1) * batch_size]) for chunk in rounds]
    width = descriptor.width(width_of(backbone))
    own_lists = [chunk for chunk in mine if chunk]
    images = image_batches(source, transform, own_lists, sum(map(len, mine)), num_workers, device)
    was_training = backbone.training
    backbone.eval()
    try:
        with progress_bar(total, f"features of {source.url}", shown=progress and rank == 0) as bar:
            for chunk, own in zip(rounds, mine, strict=True):
                with torch.inference_mode():
                    rows = torch.full((len(own), width), torch.nan, device=device)
                    read = torch.zeros(len(own), dtype=torch.uint8, device=device)
                    if own:
                        readable, places, error = next(images)
                        if error and unreadable == "refuse":
                            raise error
                        if places:
                            batch = normalise(readable.to(device, non_blocking=True), transform.mean, transform.std)
                            rows[places] = descriptor(backbone, batch)
                            if finite:
                                refuse_not_finite(rows[places], source, [own[place] for place in places])
                            read[places] = 1
                    gathered = distributed.gather_rows(rows).cpu().numpy()
                    # A row of NaN would not tell: a network that diverged has such for every image.
                    all_read = distributed.gather_rows(read).cpu().numpy() > 0 if unreadable == "skip" else None
                yield gathered, np.ones(len(gathered), dtype=np.bool_) if all_read is None else all_read
                bar.update(len(chunk))
    finally:
        backbone.train(was_training)


def refuse_not_finite(rows: Tensor, source: Source, indices: Sequence[int]) -> None:
    """Check features where they are made, as nothing behind them can tell what is wrong.

    Args:
        rows: [some, D].
        indices: [some], which images of ``source`` these are.

    Raises:
        InputError: NaN or an infinite number; the image is named.
    """
    wrong = (~torch.isfinite(rows).all(dim=1)).nonzero()
    if len(wrong):
        name = source.name(indices[int(wrong[0])])
        raise InputError(
            f"the features of {name} are not finite: the weights are damaged, or their training diverged; measure "
            "another checkpoint"
        )


def extract(
    backbone: nn.Module,
    source: Source,
    transform: EvalTransform,
    device: torch.device,
    batch_size: int = 128,
    num_workers: int = -1,
    progress: bool = True,
    unreadable: Unreadable = "refuse",
    descriptor: Descriptor = CLASS_TOKEN,
    finite: bool = True,
) -> Features:
    """All of :func:`feature_rows` in one array, on every process, without the images that could not be read.

    Args:
        unreadable, descriptor, finite: as there.
    """
    rows = np.empty((len(source), descriptor.width(width_of(backbone))), dtype=np.float32)
    readable = np.empty(len(source), dtype=np.bool_)
    start = 0
    for chunk, read in feature_rows(
        backbone, source, transform, device, batch_size, num_workers, progress, unreadable, descriptor, finite
    ):
        rows[start : start + len(chunk)], readable[start : start + len(chunk)] = chunk, read
        start += len(chunk)
        watchdog.progress()
    return _features(rows if readable.all() else rows[readable], source, np.flatnonzero(~readable))


def cached(
    backbone: nn.Module,
    weights_hash: str,
    source: Source,
    transform: EvalTransform,
    device: torch.device,
    cache_dir: Path | None,
    batch_size: int = 128,
    num_workers: int = -1,
    descriptor: Descriptor = CLASS_TOKEN,
    unreadable: Unreadable = "refuse",
    half: bool = False,
) -> Features:
    """As :func:`extract`, but kept below ``cache_dir`` under a key of weights, data, preprocessing and descriptor.

    A folder is complete or absent: it is written aside and renamed. With several processes, ``cache_dir`` is one that
    all of them see. Rows without some of the images have a key of their own, which is not looked for where such images
    are refused.

    Args:
        weights_hash: identifies the backbone's weights (:func:`dino_xcit.weights.hash_state`).
        cache_dir: None: extract anew and keep nothing.
        half: keep float16, and return it.

    Raises:
        UndecodableImage: an image cannot be read, and such are refused.
        InputError: no image can be read.
    """
    fingerprint = distributed.on_main(source.fingerprint)
    if cache_dir is None:
        found = extract(
            backbone, source, transform, device, batch_size, num_workers, unreadable=unreadable, descriptor=descriptor
        )
        if len(found.unreadable) and not len(found.features):
            raise none_readable(source)
        return dataclasses.replace(found, fingerprint=fingerprint)
    shape = (len(source), descriptor.width(width_of(backbone)))
    card = cache_card(weights_hash, fingerprint, shape, transform, descriptor) | ({"type": "float16"} if half else {})
    names = [key_of(card), key_of(card | SKIPPED)][: 2 if unreadable == "skip" else 1]
    # One process looks, and all do as it says: they must not disagree about whether there is work to share.
    looking = distributed.is_main()
    there = [name for name in names if kept_in(cache_dir / name, shape, name == names[0], half)] if looking else []
    name = distributed.broadcast_from_main(there[0] if there else None)
    if name is None:
        rows = _unless_none(
            feature_rows(
                backbone, source, transform, device, batch_size, num_workers, unreadable=unreadable,
                descriptor=descriptor,
            ),
            source,
        )  # fmt: skip
        if looking:
            name = keep(cache_dir, rows, shape, card, source.url, half)
        else:
            for _ in rows:
                pass
        name = distributed.broadcast_from_main(name)
    assert name is not None
    kept = kept_in(cache_dir / name, shape, name == names[0], half)
    if kept is None:
        raise InputError(
            f"the features that were just kept in {cache_dir / name} are gone: name a --cache-dir that all can see"
        )
    return dataclasses.replace(_features(kept[0], source, kept[1]), fingerprint=fingerprint)


def _features(rows: NDArray[np.float32], source: Source, unreadable: NDArray[np.int64]) -> Features:
    labels = source.labels if source.labels is None or not len(unreadable) else np.delete(source.labels, unreadable)
    return Features(rows, labels, unreadable=unreadable)


def none_readable(source: Source) -> InputError:
    """The sentence for it."""
    return InputError(f"none of the {len(source):,} images of {source.url} can be read: check --data-path")


def fingerprint_without(fingerprint: str, unreadable: NDArray[np.int64]) -> str:
    """Of a source without some of its images: another than that of all of them, or than without others."""
    if not len(unreadable):
        return fingerprint
    return hash_lines([fingerprint, *(f"without {number}" for number in unreadable.tolist())])


def unreadable_card(names: Sequence[str]) -> dict[str, object]:
    """What a card says of the images that were left out: how many, and the names of the first."""
    return {"count": len(names), "first": list(names[:_NAMES_IN_CARD])}


def unreadable_notice(name: str, source: Source, numbers: NDArray[np.int64]) -> str:
    """How many images of a part (``training``, ``validation``) could not be read, and the first of them by name."""
    names = ", ".join(printable(source.name(int(number))) for number in numbers[:_NAMES_SHOWN])
    more = " ..." if len(numbers) > _NAMES_SHOWN else ""
    return f"{len(numbers):,} of {len(source):,} {name} images could not be read and are left out: {names}{more}"


def find_kept(
    weights_hash: str,
    fingerprint: str,
    shape: tuple[int, int],
    transform: EvalTransform,
    cache_dir: Path | None,
    descriptor: Descriptor = CLASS_TOKEN,
) -> NDArray[np.float32] | None:
    """The features [images, D] = ``shape`` that :func:`cached` kept earlier, memory-mapped, or None.

    Never those that lack images.
    """
    if cache_dir is None:
        return None
    return rows_in(cache_dir / key_of(cache_card(weights_hash, fingerprint, shape, transform, descriptor)), shape)


def cache_card(
    weights_hash: str,
    fingerprint: str,
    shape: tuple[int, int],
    transform: EvalTransform,
    descriptor: Descriptor = CLASS_TOKEN,
) -> dict[str, object]:
    """All that decides what features are: two cards are equal where the features are."""
    # The class token is not named, so that what was kept before there was a choice is found.
    other = {} if descriptor == CLASS_TOKEN else {"descriptor": descriptor.to_dict()}
    return other | {
        "version": CACHE_VERSION,
        "weights": weights_hash,
        "data": fingerprint,
        "images": shape[0],
        "dimension": shape[1],
        "transform": transform.to_dict(),
    }


def width_of(backbone: nn.Module) -> int:
    """D of the class token, the width of a backbone's features."""
    return int(backbone.embed_dim)  # type: ignore[arg-type]


def _unless_none(chunks: Iterator[Chunk], source: Source) -> Iterator[Chunk]:
    """The same; an error at their end, on every process, where no image could be read."""
    nothing = len(source) > 0
    for rows, read in chunks:
        nothing &= not read.any()
        yield rows, read
    if nothing:
        raise none_readable(source)
