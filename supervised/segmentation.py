"""Segmentation: heads, the network and its loss, augmentation, and evaluation.

B: batch size, K: classes, D: features of a map, (h, w): size of a map or an image.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import FeaturePyramidNetwork
from torchvision.transforms import v2

from dino_xcit import safe_load
from dino_xcit.bounds import marked
from dino_xcit.config import StateField
from dino_xcit.data.decode import read_image, read_picture
from dino_xcit.data.masks import IGNORE, MaskSource
from dino_xcit.data.source import Source, evenly_spaced
from dino_xcit.data.workers import choose_workers, each_image
from dino_xcit.errors import InputError, one_line
from dino_xcit.methods import Method
from dino_xcit.methods.method import Stats
from dino_xcit.models import feature_pyramid
from dino_xcit.models.pyramid import STRIDES
from dino_xcit.optim import Rates
from dino_xcit.runtime import distributed, watchdog
from dino_xcit.runtime.logging import progress_bar
from dino_xcit.transform import Channels, EvalTransform, normalise, size_of, to_tensor
from dino_xcit.weights.locate import is_safetensors
from eval.miou import confusion, mean_iou, pixel_accuracy
from eval.palette import Segmented, colours, segmentation_sheet, to_palette
from eval.pooling import autocast, patch_size_of
from supervised.method import InitialWeights, Supervised, SupervisedBatch, SupervisedDataset, run_folder
from supervised.segment_config import SegmentConfig

AUXILIARY = 2
"""Level of the feature pyramid that the auxiliary head reads: stride 16."""
AUXILIARY_WEIGHT = 0.4
"""Weight of the loss of the auxiliary head."""
DROPOUT = 0.1
"""Dropout rate of channels before the last layer of the heads on a pyramid."""
POOLS = (1, 2, 3, 6)
"""Sides of the grids of UperNet's pyramid pooling."""
MAX_ASPECT = 4
"""Longer side of a resized image at most, in short sides: 2048 for 512."""
SHOWN = 6
"""Validation images whose predictions are kept for a picture."""
_CLASSES_AT_ONCE = 8
"""Classes whose scores are enlarged at once: bounds the memory for a large image."""


# ---- heads


def resized(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Resize maps [B, D, h, w] bilinearly."""
    return F.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=False)


def _block(before: int, width: int, kernel: int) -> nn.Sequential:
    """Convolution, BatchNorm and ReLU."""
    convolution = nn.Conv2d(before, width, kernel, padding=kernel // 2, bias=False)
    nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(convolution, nn.BatchNorm2d(width), nn.ReLU())


def _classifier(width: int, classes: int, dropout: float = DROPOUT) -> nn.Sequential:
    last = nn.Conv2d(width, classes, 1)
    nn.init.normal_(last.weight, std=0.01)
    nn.init.zeros_(last.bias)  # type: ignore[arg-type]
    return nn.Sequential(nn.Dropout2d(dropout), last)


class SemanticFPN(nn.Module):
    """Semantic head of Panoptic FPN (arXiv 1901.02446), on an FPN; maps a feature pyramid to scores of stride 4."""

    def __init__(self, widths: Sequence[int], config: SegmentConfig) -> None:
        super().__init__()
        width, fpn_width = config.head_width or 128, config.fpn_width or widths[0]
        self.fpn = FeaturePyramidNetwork(list(widths), fpn_width)
        self.levels = nn.ModuleList()
        for doublings in range(len(widths)):  # from its stride to stride 4
            layers: list[nn.Module] = []
            for number in range(max(1, doublings)):
                layers.append(_block(width if number else fpn_width, width, 3))
                layers += [nn.Upsample(scale_factor=2, mode="bilinear")] * min(1, doublings)
            self.levels.append(nn.Sequential(*layers))
        self.classifier = _classifier(width, config.classes)

    def forward(self, maps: dict[str, Tensor]) -> list[Tensor]:
        outputs = [level(one) for level, one in zip(self.levels, self.fpn(maps).values(), strict=True)]
        # The side of a map may be odd, and half of it is rounded.
        return [self.classifier(sum(resized(one, outputs[0].shape[2:]) for one in outputs))]


class UperNet(nn.Module):
    """UperNet (arXiv 1807.10221); maps a feature pyramid to scores of stride 4, in training also to those of an
    auxiliary head of stride 16."""

    def __init__(self, widths: Sequence[int], config: SegmentConfig) -> None:
        super().__init__()
        width = config.head_width or 512
        pools = [nn.Sequential(nn.AdaptiveAvgPool2d(side), _block(widths[-1], width, 1)) for side in POOLS]
        self.pools = nn.ModuleList(pools)
        self.bottleneck = _block(widths[-1] + len(POOLS) * width, width, 3)
        self.lateral = nn.ModuleList(_block(one, width, 1) for one in widths[:-1])
        self.output = nn.ModuleList(_block(width, width, 3) for _ in widths[:-1])
        self.fusion = _block(len(widths) * width, width, 3)
        self.classifier = _classifier(width, config.classes)
        half = max(1, width // 2)
        self.auxiliary = nn.Sequential(_block(widths[AUXILIARY], half, 3), _classifier(half, config.classes))

    def forward(self, maps: dict[str, Tensor]) -> list[Tensor]:
        *lower, top = maps.values()
        pooled = [resized(pool(top), top.shape[2:]) for pool in self.pools]
        levels = [self.bottleneck(torch.cat([top, *pooled], dim=1))]
        for lateral, one in zip(reversed(self.lateral), reversed(lower), strict=True):
            levels.insert(0, lateral(one) + resized(levels[0], one.shape[2:]))
        levels[:-1] = [output(one) for output, one in zip(self.output, levels[:-1], strict=True)]
        fused = self.fusion(torch.cat([resized(one, levels[0].shape[2:]) for one in levels], dim=1))
        return [self.classifier(fused), *([self.auxiliary(lower[AUXILIARY])] if self.training else [])]


class LinearHead(nn.Module):
    """BatchNorm and a linear layer on one map (DINOv2, arXiv 2304.07193)."""

    def __init__(self, widths: Sequence[int], config: SegmentConfig) -> None:
        super().__init__()
        self.norm, self.classifier = nn.BatchNorm2d(widths[0]), _classifier(widths[0], config.classes, 0.0)

    def forward(self, maps: dict[str, Tensor]) -> list[Tensor]:
        return [self.classifier(self.norm(one)) for one in maps.values()]


HEADS = {"semantic-fpn": SemanticFPN, "upernet": UperNet, "linear": LinearHead}


# ---- the network


class Segmenter(nn.Module):
    """A backbone and the head of ``config``."""

    def __init__(self, backbone: nn.Module, config: SegmentConfig) -> None:
        super().__init__()
        self.frozen = config.frozen
        self.encoder = backbone.requires_grad_(False) if config.frozen else feature_pyramid(backbone)
        self.unit = patch_size_of(backbone) if config.frozen else STRIDES[-1]
        width = getattr(backbone, "map_dim", backbone.embed_dim)
        widths: Any = (width,) if config.frozen else self.encoder.widths
        self.head = HEADS[config.head](widths, config)

    def load(self, content: Mapping[str, Any], config: SegmentConfig) -> bool:
        """Load a checkpoint of run_segment.py; return whether its head is of the same kind.

        Raises:
            InputError: its head has another size.
        """
        args = content.get("args", {})
        if args.get("head") != config.head:
            return False
        for name in ("classes", "head_width", "fpn_width"):
            if args[name] != getattr(config, name):
                raise InputError(
                    f"the head in {config.weights} has {name} {args[name]}, but here it is {getattr(config, name)}: "
                    f"give the same setting, or --weights {run_folder(config.weights) / 'backbone.pth'} for a new head"
                )
        self.load_state_dict(content.get("ema", content["network"]))
        return True

    def train(self, mode: bool = True) -> Segmenter:
        """Set the mode; a frozen backbone stays in eval mode."""
        super().train(mode)
        if self.frozen:
            self.encoder.eval()
        return self

    def forward(self, images: Tensor) -> list[Tensor]:
        """Map normalised images [B, channels, h, w] to scores [B, K, h, w], in training also of the auxiliary head.

        Images are padded to whole patches with zeros, the mean colour, so that scores and pixels are aligned.
        """
        height, width = images.shape[2:]
        padded = F.pad(images, (0, -width % self.unit, 0, -height % self.unit))
        if self.frozen:
            with torch.no_grad():
                found = self.encoder(padded)
            maps = {"0": found.patch_tokens.transpose(1, 2).unflatten(2, found.grid)}
        else:
            maps = self.encoder(padded)
        return [resized(one.float(), padded.shape[2:])[..., :height, :width] for one in self.head(maps)]


class Segmentation(Supervised):
    """Cross-entropy of all pixels that are not ignored, divided by the number of pixels as in mmseg."""

    trained: Segmenter
    evaluated: Segmenter

    def __init__(
        self, config: SegmentConfig, device: torch.device, network: Segmenter, backbone: nn.Module,
        transform: EvalTransform, classes: Sequence[str],
    ) -> None:  # fmt: skip
        super().__init__(config, device, network, backbone, classes)
        self.transform = transform

    def loss(self, batch: SupervisedBatch, rates: Rates) -> tuple[Tensor, Stats]:
        outputs = self.ddp_student(normalise(batch.images, self.transform.mean, self.transform.std))
        targets = batch.targets.long()
        # A mean over the labelled pixels would not be finite for a batch without any.
        losses = [F.cross_entropy(one, targets, ignore_index=IGNORE, reduction="sum") for one in outputs]
        weights = (1.0, AUXILIARY_WEIGHT)[: len(losses)]
        weighted = [weight * one for weight, one in zip(weights, losses, strict=True)]
        loss = torch.stack(weighted).sum() / targets.numel()
        return loss, {"images": torch.tensor(float(len(targets)), device=loss.device)}


# ---- training images


def scaled_size(size: tuple[int, int], config: SegmentConfig, factor: float = 1.0) -> tuple[int, int]:
    """Return (h, w) of an image resized to ``factor`` times the short side, or less: see :data:`MAX_ASPECT`."""
    scale = factor * config.short_side * min(1 / min(size), MAX_ASPECT / max(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def resized_box(
    pixels: NDArray[Any], size: tuple[int, int], box: tuple[float, float, float, float] | None = None
) -> Tensor:
    """Resize a region of an image, bilinear with antialiasing.

    Args:
        pixels: [height, width, channels], uint8 for RGB, else float32.
        size: height and width of the result.
        box: left, top, right and bottom of the region in pixels; None: the whole image.

    Returns:
        [channels, height, width].
    """
    bands = [Image.fromarray(pixels)] if pixels.dtype == np.uint8 else map(Image.fromarray, pixels.transpose(2, 0, 1))
    return to_tensor(np.dstack([np.asarray(band.resize(size[::-1], Image.Resampling.BILINEAR, box)) for band in bands]))


class SegmentationDataset(SupervisedDataset):
    """mmseg's training transform: random scale, crop, flip and, for three channels, photometric distortion.

    Images of three channels are uint8.
    """

    source: MaskSource

    def __init__(self, source: MaskSource, config: SegmentConfig, transform: EvalTransform) -> None:
        super().__init__(source, config.seed, transform.pixel_format)
        self._config = config
        mean, is_rgb = sum(transform.mean) / transform.channels, transform.channels == 3
        self._fill = round(255 * mean) if is_rgb else mean
        # mmseg's ranges: 32 of 255, 0.5 to 1.5 twice, 18 of 180.
        ranges = {"brightness": 32 / 255, "contrast": 0.5, "saturation": 0.5, "hue": 0.1}
        jitters = [v2.ColorJitter(**{name: span}) for name, span in ranges.items() if is_rgb]
        self._distort = nn.Sequential(*(v2.RandomApply([jitter], config.photometric) for jitter in jitters))
        self.sides = [self.format.rgb_side(config.crop_size), config.crop_size]  # the mask takes less

    def augmented(self, index: int, pixels: NDArray[Any], label: int | None) -> tuple[Tensor, Tensor]:
        config, side = self._config, self._config.crop_size
        mask = self.source.mask(index, pixels.shape[:2])
        (height, width), scaled = mask.shape, scaled_size(mask.shape, config, random.uniform(*config.scale))
        crop = [min(side, one) for one in scaled]
        for _ in range(10):
            top, left = (random.randint(0, whole - part) for whole, part in zip(scaled, crop, strict=True))
            # The nearest pixels of the mask, as if it were resized first.
            rows = ((top + np.arange(crop[0]) + 0.5) * height / scaled[0]).astype(np.int64)
            columns = ((left + np.arange(crop[1]) + 0.5) * width / scaled[1]).astype(np.int64)
            target = mask[rows[:, None], columns]
            counts = np.bincount(target.ravel(), minlength=256)[:IGNORE]
            if 0 < counts.max() < config.max_class_share * counts.sum():
                break
        box = np.array([left, top, left + crop[1], top + crop[0]]) * np.tile([width / scaled[1], height / scaled[0]], 2)
        image = resized_box(pixels, (crop[0], crop[1]), tuple(box.tolist()))
        if random.random() < config.flip:
            image, target = image.flip(2), target[:, ::-1].copy()
        margins = (0, side - crop[1], 0, side - crop[0])
        padded = F.pad(self._distort(image), margins, value=self._fill)
        return padded, F.pad(torch.from_numpy(target), margins, value=IGNORE)


# ---- evaluation


@dataclass(frozen=True)
class Predictor:
    """Segments images with a network in eval mode."""

    config: SegmentConfig
    transform: EvalTransform
    device: torch.device

    def prepare(self, image: Image.Image | Channels) -> Tensor:
        """Resize an image to [channels, h, w], uint8 for three channels."""
        return resized_box(np.asarray(image), scaled_size(size_of(image), self.config))

    @torch.inference_mode()
    def labels(self, network: Segmenter, image: Tensor, size: Sequence[int]) -> NDArray[np.uint8]:
        """Return the classes [h, w] of a prepared image in another ``size``."""
        images = normalise(image[None].to(self.device), self.transform.mean, self.transform.std)
        with autocast(self.config.precision, self.device):
            scores = self._windows(network, images) if self.config.test == "slide" else network(images)[0]
        best = torch.full(tuple(size), -torch.inf, device=self.device)
        labels = torch.zeros(tuple(size), dtype=torch.uint8, device=self.device)
        for first, part in enumerate(scores.split(_CLASSES_AT_ONCE, dim=1)):
            value, place = resized(part, size)[0].max(0)
            labels = torch.where(value > best, (place + first * _CLASSES_AT_ONCE).to(torch.uint8), labels)
            best = torch.maximum(value, best)
        return labels.cpu().numpy()

    def _windows(self, network: Segmenter, images: Tensor) -> Tensor:
        """Return the mean scores of overlapping windows, the last ones at the borders."""
        side = self.config.crop_size
        stride = self.config.test_stride or max(1, 2 * side // 3)
        height, width = images.shape[2:]
        tops, lefts = ({*range(0, max(1, whole - side), stride), max(0, whole - side)} for whole in (height, width))
        scores, count = images.new_zeros(1, self.config.classes, height, width), images.new_zeros(height, width)
        for top in sorted(tops):
            for left in sorted(lefts):
                place = (..., slice(top, top + side), slice(left, left + side))
                scores[place] += network(images[place])[0]
                count[place] += 1
        return scores / count


def _load(predictor: Predictor, source: Source, index: int) -> tuple[Tensor, Tensor] | str:
    """Return a prepared image and its classes [h, w], or what is wrong with them."""
    assert isinstance(source, MaskSource)
    try:
        image = read_image(source, index, predictor.transform.pixel_format)
        return predictor.prepare(image), torch.from_numpy(source.mask(index, size_of(image)))
    except InputError as error:  # raised in a worker, it would arrive inside a traceback
        return str(error)


@dataclass
class MiouEvaluator:
    """Evaluator of a segmentation network: mIoU and pixel accuracy in percent on all images of a source."""

    source: MaskSource
    predictor: Predictor
    confusion: NDArray[np.int64] | None = None
    """[K, K] of the last measurement: :func:`eval.miou.confusion`, on every rank."""
    shown: dict[int, NDArray[np.uint8]] = field(default_factory=dict)
    """Predictions of some images, by index; on every rank."""

    def __call__(self, method: Method) -> dict[str, float]:
        """Measure ``method.evaluated``; the ranks share the images."""
        assert isinstance(method, Segmentation)
        config, network = self.predictor.config, method.evaluated
        own = range(distributed.rank(), len(self.source), distributed.world_size())
        on_gpu = method.device.type == "cuda"
        workers = choose_workers(config.num_workers, distributed.processes_here(), on_gpu=on_gpu)
        matrix, shown = np.zeros((config.classes,) * 2, dtype=np.int64), {}
        wanted = evenly_spaced(len(self.source), SHOWN)
        was_training = network.training
        network.eval()
        try:
            with (
                closing(each_image(self.source, own, partial(_load, self.predictor), workers)) as loaded,
                progress_bar(len(own), f"segmenting {self.source.url}", shown=distributed.is_main()) as bar,
            ):
                for index, found in zip(own, loaded, strict=True):
                    if isinstance(found, str):
                        raise InputError(found)
                    image, target = found
                    labels = self.predictor.labels(network, image, target.shape)
                    matrix += confusion(labels, target.numpy(), config.classes)
                    if index in wanted:
                        shown[index] = labels
                    if config.masks_out:
                        path = Path(config.masks_out, f"{self.source.names[index]}.png")
                        save(to_palette(labels + np.uint8(self.source.first), colours(256)), path)
                    watchdog.progress()
                    bar.update()
        finally:
            network.train(was_training)
        parts = distributed.gather_objects((matrix, shown))
        self.confusion = np.sum([part for part, _ in parts], axis=0)
        self.shown = {index: labels for _, part in parts for index, labels in part.items()}
        return {"miou": mean_iou(self.confusion), "pixel_accuracy": pixel_accuracy(self.confusion)}


# ---- pictures


def save(image: Image.Image, path: Path) -> None:
    """Save an image; create its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def draw_overlays(source: MaskSource, evaluator: MiouEvaluator) -> Image.Image:
    """Draw the images that ``evaluator`` has kept, with their predictions and ground truth."""
    images: list[Segmented] = []
    for index, predicted in sorted(evaluator.shown.items()):
        image = read_picture(source, index, evaluator.predictor.transform.pixel_format)
        truth = source.mask(index, predicted.shape)
        images.append((source.name(index), image, {"prediction": predicted, "ground truth": truth}))
    return segmentation_sheet(images, source.classes or ())


def read_run(weights: str) -> Mapping[str, Any]:
    """Read the checkpoint if it is one of run_segment.py; empty for other weights."""
    path = Path(weights)
    content = safe_load.read(path) if path.is_file() and not is_safetensors(path) else {}
    return content if "class_names" in content and "head" in content.get("args", {}) else {}


def open_segmenter(
    config: SegmentConfig, start: InitialWeights, stored: Mapping[str, Any], device: torch.device
) -> tuple[Predictor, Segmenter]:
    """Build the network of the checkpoint ``stored``, with its head, image sizes and test mode.

    Raises:
        InputError: there is no such network.
    """
    if not stored:
        raise InputError(f"{config.weights} has no head: --predict needs a checkpoint.pth written by run_segment.py")
    names = (*marked(SegmentConfig, StateField), "short_side", "crop_size", "test", "test_stride")
    try:
        settings = dataclasses.replace(config, **{name: stored["args"][name] for name in names})
        network = Segmenter(start.backbone, settings)
        network.load_state_dict(stored.get("ema", stored["network"]))
    except (KeyError, RuntimeError, TypeError) as error:
        raise InputError(
            f"{config.weights} has no complete head ({type(error).__name__}: {one_line(error)}): give a checkpoint.pth "
            "written by run_segment.py"
        ) from error
    return Predictor(settings, start.transform, device), network.to(device).eval()
