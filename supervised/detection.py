"""Object detection: torchvision's Faster and Mask R-CNN on a feature pyramid, their training images and scores.

The settings are those of XCiT's Mask R-CNN (arXiv 2106.09681; facebookresearch/xcit, detection, on mmdet 2.11). What
remains different from it:

- Box losses are smooth L1 with beta 1/9 instead of L1. Anchors are rounded to whole pixels. The best anchor of each
  object is positive at any overlap; mmdet's must overlap by 0.3.
- RoIAlign treats regions smaller than one cell as one cell (torchvision). Targets of the mask head are sampled without
  the half pixel of an aligned RoIAlign. Masks are pasted into boxes of whole pixels.
- The last layer of the mask head starts at std 0.001; mmdet's depends on the number of classes, and its first losses
  are above 20 for a few classes.
- Biases and norms have no weight decay; mmdet's biases have. Boxes of less than a pixel after a crop are dropped.
- Images are resized with antialiasing, and normalised as in pretraining.

B: batch size, n: objects or detections of an image.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torchvision import tv_tensors
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import paste_masks_in_image
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool
from torchvision.ops.poolers import LevelMapper
from torchvision.transforms import v2

from dino_xcit import safe_load
from dino_xcit.data import Source, Subset, UndecodableImage
from dino_xcit.data.decode import decode_pixels
from dino_xcit.data.workers import choose_workers, each_image
from dino_xcit.errors import InputError, one_line
from dino_xcit.methods import Method
from dino_xcit.methods.method import Stats
from dino_xcit.models import build_backbone, feature_pyramid
from dino_xcit.models.pyramid import STRIDES
from dino_xcit.optim import Rates
from dino_xcit.runtime import distributed, watchdog
from dino_xcit.transform import EvalTransform, PixelFormat, normalise, to_tensor
from eval.pooling import autocast
from supervised.coco import CocoSource, JsonObject, corners, decode_masks, mask_library
from supervised.detect_config import DetectConfig
from supervised.method import Supervised, SupervisedBatch, SupervisedDataset

ANCHOR_SCALE = 8
"""Side of an anchor in cells of its level."""
SIZE_DIVISOR = 32
"""Batches are padded to multiples of this side, the stride of the last level."""
_MIN_FOR_WORKERS = 64
"""Minimum number of images of a rank for which starting workers saves time."""


# ---- the network


class PyramidBackbone(nn.Module):
    """Backbone of a torchvision detector: a feature pyramid with equal widths, in float32 under autocast."""

    def __init__(self, backbone: nn.Module, width: int) -> None:
        super().__init__()
        self.pyramid = feature_pyramid(backbone)
        self.fpn = FeaturePyramidNetwork(list(self.pyramid.widths), width, LastLevelMaxPool())
        self.out_channels = width

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        """Map images [B, channels, height, width] to levels "0" ... "3" and "pool", [B, width, h, w].

        Their strides are 4 to 64.
        """
        # bfloat16 cannot hold the coordinates of anchors, which have the dtype of the maps.
        return OrderedDict((name, level.float()) for name, level in self.fpn(self.pyramid(images)).items())


class Anchors(AnchorGenerator):  # type: ignore[misc]
    """Anchors with the strides of the levels; torchvision divides sizes, which is wrong for odd maps."""

    def __init__(self) -> None:
        self.strides = (*STRIDES, 2 * STRIDES[-1])
        super().__init__(tuple((ANCHOR_SCALE * stride,) for stride in self.strides), ((0.5, 1.0, 2.0),) * 5)

    def grid_anchors(self, grid_sizes: list[list[int]], strides: object) -> list[Tensor]:
        """See torchvision."""
        return super().grid_anchors(grid_sizes, [[stride, stride] for stride in self.strides])


class AlignedRoIAlign(MultiScaleRoIAlign):  # type: ignore[misc]
    """RoIAlign with ``aligned=True``, as in mmdet, and with the strides of the levels.

    torchvision's pool has no such option. Moving boxes by half a cell of their level is the same.
    """

    def __init__(self, size: int) -> None:
        super().__init__(["0", "1", "2", "3"], size, sampling_ratio=0)
        self.scales = [1 / stride for stride in STRIDES]
        self.map_levels = LevelMapper(2, 5)  # strides 2^2 to 2^5

    def forward(self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]) -> Tensor:
        """Pool maps in boxes [n, 4] of each image to [sum of n, D, size, size]."""
        assert self.map_levels is not None
        half_cells = STRIDES[0] / 2 * 2.0 ** self.map_levels(boxes)
        moved = (torch.cat(boxes) - half_cells[:, None]).split([len(one) for one in boxes])
        return super().forward(x, list(moved), image_shapes)


class NormalizeAndPad(nn.Module):
    """Replaces torchvision's transform: normalises and pads, but does not resize."""

    def __init__(self, transform: EvalTransform) -> None:
        super().__init__()
        self.mean, self.std = transform.mean, transform.std

    def forward(self, images: list[Tensor], targets: Any) -> tuple[ImageList, Any]:
        """Batch images [channels, height, width]; targets are unchanged."""
        sizes = [(image.shape[1], image.shape[2]) for image in images]
        height, width = (-(-max(sides) // SIZE_DIVISOR) * SIZE_DIVISOR for sides in zip(*sizes, strict=True))
        batch = torch.zeros(len(images), len(self.mean), height, width, device=images[0].device)
        for padded, image in zip(batch, images, strict=True):
            padded[:, : image.shape[1], : image.shape[2]] = normalise(image[None], self.mean, self.std)[0]
        return ImageList(batch, sizes), targets

    def postprocess(self, found: list[dict[str, Tensor]], sizes: object, originals: object) -> list[dict[str, Tensor]]:
        """Return detections unchanged: boxes in pixels of the resized image, masks [n, 1, 28, 28] relative to their
        boxes."""
        return found


def build_detector(config: DetectConfig, backbone: nn.Module, classes: int, transform: EvalTransform) -> FasterRCNN:
    """Build a detector of images [channels, height, width].

    Args:
        classes: without the background.
        transform: has the normalisation.
    """
    width, hidden, background_too = config.fpn_width, config.box_head_width, classes + 1
    settings: dict[str, Any] = {
        "rpn_anchor_generator": Anchors(),
        "rpn_pre_nms_top_n_train": 2 * config.proposals,
        "rpn_pre_nms_top_n_test": config.proposals,
        "rpn_post_nms_top_n_train": config.proposals,
        "rpn_post_nms_top_n_test": config.proposals,
        "box_roi_pool": AlignedRoIAlign(7),
        "box_head": TwoMLPHead(width * 7**2, hidden),
        "box_predictor": FastRCNNPredictor(hidden, background_too),
        "box_batch_size_per_image": config.rois,
    }
    nn.init.normal_(settings["box_predictor"].cls_score.weight, std=0.01)  # as in mmdet
    nn.init.normal_(settings["box_predictor"].bbox_pred.weight, std=0.001)
    body = PyramidBackbone(backbone, width)
    if config.model == "mask-rcnn":
        head, predictor = MaskRCNNHeads(width, (width,) * 4, 1), MaskRCNNPredictor(width, width, background_too)
        nn.init.normal_(predictor.mask_fcn_logits.weight, std=0.001)
        detector = MaskRCNN(
            body, mask_roi_pool=AlignedRoIAlign(14), mask_head=head, mask_predictor=predictor, **settings
        )
        predictor.register_forward_hook(_in_float32)
    else:
        detector = FasterRCNN(body, **settings)
    for module in (detector.rpn.head, detector.roi_heads.box_predictor):
        module.register_forward_hook(_in_float32)  # boxes are decoded in the dtype of these outputs
    detector.transform = NormalizeAndPad(transform)
    return detector


def _in_float32(_: object, inputs: object, outputs: Any) -> Any:
    """Forward hook: convert outputs to float32."""
    if isinstance(outputs, Tensor):
        return outputs.float()
    return type(outputs)(_in_float32(_, inputs, one) for one in outputs)


# ---- training


class Detection(Supervised):
    """The losses of Faster or Mask R-CNN."""

    trained: FasterRCNN
    evaluated: FasterRCNN

    def __init__(self, config: DetectConfig, device: torch.device, network: FasterRCNN, source: CocoSource) -> None:
        """``source``: its categories become part of checkpoints."""
        super().__init__(config, device, network, network.backbone.pyramid.backbone)
        self.categories = source.categories

    def loss(self, batch: SupervisedBatch, rates: Rates) -> tuple[Tensor, Stats]:
        losses: dict[str, Tensor] = self.ddp_student(batch.images, batch.targets)
        images = len(batch.images)
        stats = {name: images * value.detach().float() for name, value in losses.items()}
        stats["images"] = torch.tensor(float(images), device=self.device)
        return torch.stack(list(losses.values())).sum(), stats

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"categories": self.categories}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state["categories"] != self.categories:
            raise ValueError("its classes differ from those of the annotations")
        super().load_state_dict(state)


class Resize(v2.RandomShortestSize):  # type: ignore[misc]
    """Resize the shorter side to one of several sizes; the longer side has a maximum."""

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draw the size."""
        height, width = super().make_params(flat_inputs)["size"]
        return {"size": (max(1, height), max(1, width))}  # torchvision gives 0 for images of one row


class RandomCrop(v2.Transform):  # type: ignore[misc]
    """Crop with height and width drawn from [least, most], at most the image's."""

    def __init__(self, least: int, most: int) -> None:
        super().__init__()
        self.least, self.most = least, most

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draw the crop."""
        whole = v2.query_size(flat_inputs)
        height, width = (int(torch.randint(min(self.least, side), min(self.most, side) + 1, ())) for side in whole)
        top, left = int(torch.randint(whole[0] - height + 1, ())), int(torch.randint(whole[1] - width + 1, ()))
        return {"top": top, "left": left, "height": height, "width": width}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Crop one of image, boxes and masks."""
        return self._call_kernel(v2.functional.crop, inpt, **params)


class DetectionDataset(SupervisedDataset):
    """Augmented images [channels, height, width] of different sizes, with boxes, labels and masks as in torchvision."""

    stacks = False

    def __init__(self, source: CocoSource, config: DetectConfig, format: PixelFormat) -> None:
        rows = np.arange(len(source)) if config.empty_images else source.with_objects
        super().__init__(Subset(source, rows), config.seed, format)
        self._coco, self._rows, self._masks = source, rows, config.model == "mask-rcnn"
        self._label_of = {category: label for label, category in enumerate(source.categories, start=1)}
        crop = [Resize(config.crop_short_sides, config.long_side), RandomCrop(*config.crop_sides)]
        steps = (
            v2.RandomHorizontalFlip(config.flip), v2.RandomApply(crop, config.crop_probability),
            Resize(config.short_sides, config.long_side), v2.ClampBoundingBoxes(), v2.SanitizeBoundingBoxes(),
        )  # fmt: skip
        self._transform = v2.Compose(steps)
        self.sides = [format.rgb_side(config.long_side)] * (2 if self._masks else 1)  # a rough bound of a few masks

    def check(self, index: int, pixels: NDArray[Any]) -> None:
        self._coco.check_size(int(self._rows[index]), pixels.shape[1], pixels.shape[0])

    def augmented(self, index: int, pixels: NDArray[Any], label: int | None) -> tuple[Tensor, dict[str, Tensor]]:
        height, width = pixels.shape[:2]
        found = self._coco.annotations(int(self._rows[index]), crowds=False)
        labels = [self._label_of[one["category_id"]] for one in found]
        boxes = torch.from_numpy(corners(found)).float()
        target: dict[str, Any] = {
            "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(height, width)),  # type: ignore[call-overload]
            "labels": torch.tensor(labels, dtype=torch.int64),
        }
        if self._masks:
            target["masks"] = tv_tensors.Mask(torch.from_numpy(decode_masks(found, width, height)))
        image, target = self._transform(tv_tensors.Image(to_tensor(pixels)), target)
        return image.as_subclass(Tensor), {name: value.as_subclass(Tensor) for name, value in target.items()}


# ---- test


@dataclass
class Detector:
    """A trained network with its test settings.

    It takes one image at a time, as in mmdet: the features of an XCiT depend on the padding of a batch.
    """

    network: FasterRCNN
    categories: Mapping[int, str]
    """Names by category id, in the order of the labels."""
    config: DetectConfig
    format: PixelFormat
    device: torch.device

    def __call__(self, source: Source) -> Iterator[tuple[int, list[JsonObject] | UndecodableImage]]:
        """Yield each image's index and its detections, best first, in COCO's format but without ``image_id``.

        Boxes and masks are in the pixels of the image. Each rank has its own share of the images.
        """
        indices = range(distributed.rank(), len(source), distributed.world_size())
        few = self.config.num_workers < 0 and len(indices) < _MIN_FOR_WORKERS
        on_gpu = self.device.type == "cuda"
        workers = 0 if few else choose_workers(self.config.num_workers, distributed.processes_here(), on_gpu=on_gpu)
        resize = Resize(self.config.test_side, self.config.long_side)  # of one size: not random
        was_training = self.network.training
        self.network.eval()
        images = each_image(source, indices, partial(_resized, resize=resize, format=self.format), workers)
        try:
            for index, found in zip(indices, images, strict=True):
                watchdog.progress()
                yield index, found if isinstance(found, UndecodableImage) else self._detect(*found)
        finally:
            images.close()
            self.network.train(was_training)

    @torch.inference_mode()
    def _detect(self, image: Tensor, size: tuple[int, int]) -> list[JsonObject]:
        with autocast(self.config.precision, self.device):
            (tensors,) = self.network([image.to(self.device)])
        tensors = {name: value.cpu() for name, value in tensors.items()}
        category_ids, (height, width) = list(self.categories), size
        boxes = tensors["boxes"] * torch.tensor([width / image.shape[2], height / image.shape[1]]).repeat(2)
        found: list[JsonObject] = []
        for row, (left, top, right, bottom) in enumerate(boxes.tolist()):
            one: JsonObject = {
                "category_id": category_ids[int(tensors["labels"][row]) - 1],
                "bbox": [round(value, 3) for value in (left, top, right - left, bottom - top)],
                "score": round(float(tensors["scores"][row]), 5),
            }
            if "masks" in tensors:  # one at a time: a hundred masks of a photograph take gigabytes
                mask = paste_masks_in_image(tensors["masks"][[row]], boxes[[row]], size)[0, 0]
                one["segmentation"] = _run_lengths(mask > 0.5)
            found.append(one)
        return found


def open_detector(config: DetectConfig, device: torch.device) -> Detector:
    """Load the detector of a checkpoint.

    Args:
        config: with the weights; model and image sizes are those of the checkpoint.

    Raises:
        InputError: there are no weights, or they are no detector.
    """
    if not config.weights:
        raise InputError("no weights given: add --weights FILE, a checkpoint.pth of run_detect.py")
    content = safe_load.read(Path(config.weights))
    try:
        categories = {int(number): str(name) for number, name in content["categories"].items()}
        transform = EvalTransform.from_dict(content["eval_transform"])
        own = {name: getattr(config, name) for name in ("num_workers", "precision")}
        stored = {name: tuple(value) if isinstance(value, list) else value for name, value in content["args"].items()}
        settings = DetectConfig(**stored | own)
        network = build_detector(
            settings, build_backbone(settings.arch, transform.channels), len(categories), transform
        )
        network.load_state_dict(content.get("ema", content["network"]))
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        why = f" ({one_line(error)})" if "categories" in content else ""
        raise InputError(
            f"{config.weights} is not a detector of run_detect.py{why}: train "
            f"one with --weights {config.weights} --data-path COCO_DIR, then give its checkpoint.pth"
        ) from error
    return Detector(network.to(device), categories, settings, transform.pixel_format, device)


def _resized(
    source: Source, index: int, resize: v2.Transform, format: PixelFormat
) -> tuple[Tensor, tuple[int, int]] | UndecodableImage:
    """Return a resized image [channels, height, width], and the original height and width."""
    try:
        item, _ = source.read(index)
        pixels = decode_pixels(item, source.name(index), format)
        height, width = pixels.shape[:2]
        if isinstance(source, CocoSource):
            source.check_size(index, width, height)
    except InputError as error:  # returned: a raised one would come out of a worker inside a traceback
        return error if isinstance(error, UndecodableImage) else UndecodableImage(str(error))
    return resize(to_tensor(pixels[..., : format.channels])).contiguous(), (height, width)


def _run_lengths(mask: Tensor) -> JsonObject:
    """Encode a mask [height, width] as text."""
    runs = mask_library().encode(np.asfortranarray(mask.numpy().astype(np.uint8)))
    return {"size": list(runs["size"]), "counts": runs["counts"].decode("ascii")}


@dataclass
class CocoEvaluator:
    """Evaluator of a detector: COCO's average precisions in percent."""

    source: CocoSource
    config: DetectConfig
    format: PixelFormat
    results: list[JsonObject] | None = None
    """Detections of the last measurement in COCO's format; on every rank, as the following."""
    scores: dict[str, float] = field(default_factory=dict)
    classes: list[JsonObject] = field(default_factory=list)
    """Average precisions of each class."""

    def __call__(self, method: Method) -> dict[str, float]:
        """Measure ``method.evaluated``.

        Raises:
            UndecodableImage: an image is unreadable or does not fit its annotations.
        """
        assert isinstance(method, Detection)
        detector = Detector(method.evaluated, self.source.categories, self.config, self.format, method.device)
        own: list[tuple[int, list[JsonObject]]] = []
        refusal = None
        for index, found in detector(self.source):
            if isinstance(found, UndecodableImage):
                refusal = found
                break
            own.append((index, [{"image_id": int(self.source.image_ids[index])} | one for one in found]))
        gathered = distributed.gather_objects((own, refusal))
        if refusals := [one for _, one in gathered if one]:
            raise refusals[0]
        ordered = sorted((pair for pairs, _ in gathered for pair in pairs), key=lambda pair: pair[0])
        self.results = [one for _, found in ordered for one in found]
        score = partial(average_precisions, self.source.ground_truth(), self.results)
        self.scores, self.classes = distributed.on_main(score)
        return self.scores


def average_precisions(truth: JsonObject, results: list[JsonObject]) -> tuple[dict[str, float], list[JsonObject]]:
    """Return COCO's average precisions in percent, and those of each class (None for a class without objects).

    An entry such as ``box_ap_large`` is missing if there is no object of this size.

    Args:
        truth: annotations in COCO's format; with segmentations, masks are scored too.
        results: in COCO's format.
    """
    from faster_coco_eval import COCO, COCOeval_faster

    with_masks = bool(truth["annotations"]) and "segmentation" in truth["annotations"][0]
    scores: dict[str, float] = {}
    classes: list[JsonObject] = [{"name": category["name"]} for category in truth["categories"]]
    for kind, name, dropped in (("bbox", "box", "segmentation"), ("segm", "mask", "bbox"))[: 1 + with_masks]:
        # Without "bbox", masks are small, medium or large by their own area.
        kept = [{key: value for key, value in one.items() if key != dropped} for one in results]
        ground = COCO({**truth, "annotations": [dict(one) for one in truth["annotations"]]})
        scorer = COCOeval_faster(ground, ground.loadRes(kept), kind, print_function=lambda _: None)
        scorer.run()
        names = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
        found = zip(names, scorer.stats[: len(names)], strict=True)
        scores |= {f"{name}_{which}": 100 * float(value) for which, value in found if value >= 0}
        precision = scorer.eval["precision"][..., 0, -1]  # [thresholds, recalls, classes]: all sizes, 100 detections
        for number, one in enumerate(classes):
            own = precision[:, :, number]
            one[f"{name}_ap"] = 100 * float(own[own > -1].mean()) if (own > -1).any() else None
    return scores, classes
