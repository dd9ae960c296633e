"""Classification: augmentation by timm, the network, its loss and its accuracy. B: batch size, C: classes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms import v2

from dino_xcit import safe_load
from dino_xcit.data import Source, Subset
from dino_xcit.errors import InputError, one_line
from dino_xcit.methods import Method
from dino_xcit.methods.method import Stats
from dino_xcit.optim import Rates
from dino_xcit.runtime import distributed
from dino_xcit.transform import EvalTransform, to_tensor
from dino_xcit.weights.locate import is_safetensors
from eval.features import extract
from eval.stats import correct
from supervised.finetune_config import FinetuneConfig
from supervised.method import Supervised, SupervisedBatch, SupervisedDataset

HEAD_STD = 2e-5
"""Std of the classifier's initial weights (MAE, arXiv 2111.06377): the first steps then hardly change the backbone."""


class Classifier(nn.Module):
    """A backbone and a linear layer on its class token."""

    def __init__(self, backbone: nn.Module, classes: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.classifier = nn.Linear(int(backbone.embed_dim), classes)  # type: ignore[arg-type]
        nn.init.trunc_normal_(self.classifier.weight, std=HEAD_STD)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Map images [B, channels, height, width] to logits [B, C]."""
        return self.classifier(self.backbone(images).cls_token)

    def load_classifier(self, weights: str, classes: Sequence[str]) -> bool:
        """Load the classifier of a checkpoint of run_finetune.py; return whether it has one of these classes."""
        path = Path(weights)
        if not path.is_file() or is_safetensors(path):
            return False
        content = safe_load.read(path)
        if content.get("class_names") != list(classes):
            return False
        stored = content.get("ema", content["network"])
        names = self.classifier.state_dict()
        if not {f"classifier.{name}" for name in names} <= stored.keys():  # a segmentation of the same classes
            return False
        self.classifier.load_state_dict({name: stored[f"classifier.{name}"] for name in names})
        return True


class Classification(Supervised):
    """Cross-entropy with label smoothing, mixup and cutmix."""

    trained: Classifier
    evaluated: Classifier

    def __init__(
        self, config: FinetuneConfig, device: torch.device, network: Classifier, classes: Sequence[str]
    ) -> None:
        super().__init__(config, device, network, network.backbone, classes)
        self.settings = config
        self._mix: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
        self._passes = (-1, 0)
        """Step, and number of its forward passes so far."""
        if config.mixup or config.cutmix:
            from timm.data.mixup import Mixup  # takes a second to import

            self._mix = Mixup(
                mixup_alpha=config.mixup, cutmix_alpha=config.cutmix, label_smoothing=config.label_smoothing,
                num_classes=self.trained.classifier.out_features,
            )  # fmt: skip

    def loss(self, batch: SupervisedBatch, rates: Rates) -> tuple[Tensor, Stats]:
        images, targets, smoothing = batch.images, batch.targets, self.settings.label_smoothing
        if self._mix:
            # timm draws from numpy's global generator: seed each pass, so that resumed runs draw the same.
            number = self._passes[1] + 1 if self._passes[0] == rates.step else 0
            self._passes = (rates.step, number)
            words = np.random.SeedSequence([self.settings.seed, rates.step, distributed.rank(), number])
            np.random.seed(words.generate_state(1)[0])
            images, targets = self._mix(images, targets)
            smoothing = 0.0  # timm has smoothed the targets
        logits = self.ddp_student(images).float()
        loss = F.cross_entropy(logits, targets, label_smoothing=smoothing)
        return loss, {"images": torch.tensor(float(len(images)), device=loss.device)}


class ClassificationDataset(SupervisedDataset):
    """timm's training transform for RGB: random resized crop, flip, augmentation policy, erasing.

    Images of other channels get the same crop, flip and erasing, without policy and colour jitter.
    """

    def __init__(self, source: Source, config: FinetuneConfig, transform: EvalTransform) -> None:
        super().__init__(source, config.seed, transform.pixel_format)
        self.sides = [math.ceil(transform.crop * math.sqrt(4 * transform.channels / 3))]  # float32
        self._transform = (_rgb_transform if transform.channels == 3 else _array_transform)(config, transform)

    def augmented(self, index: int, pixels: NDArray[Any], label: int | None) -> tuple[Tensor, Tensor]:
        image = Image.fromarray(pixels) if self.format.channels == 3 else to_tensor(pixels)
        return self._transform(image), torch.tensor(label)


def _rgb_transform(config: FinetuneConfig, transform: EvalTransform) -> Any:
    from timm.data.transforms_factory import create_transform  # takes a second to import

    try:
        made = create_transform(
            input_size=transform.crop, is_training=True, scale=config.crop_scale, ratio=config.crop_ratio,
            hflip=config.flip, auto_augment=config.auto_augment or None, color_jitter=config.color_jitter,
            interpolation=transform.interpolation, mean=transform.mean, std=transform.std, re_prob=config.erasing,
            re_mode="pixel",
        )  # fmt: skip
    except (AssertionError, KeyError, ValueError) as error:  # timm's parsers of policies
        raise InputError(
            f"auto_augment is {config.auto_augment!r}, which timm cannot read ({one_line(error)}); expected such "
            "as rand-m9-mstd0.5-inc1, or an empty word for none"
        ) from error
    _keep_one_bit(made)
    return made


def _array_transform(config: FinetuneConfig, transform: EvalTransform) -> Any:
    return v2.Compose(
        [
            v2.RandomResizedCrop(transform.crop, config.crop_scale, config.crop_ratio),
            v2.RandomHorizontalFlip(config.flip),
            v2.Normalize(list(transform.mean), list(transform.std)),
            v2.RandomErasing(config.erasing),
        ]
    )


def _keep_one_bit(transform: Any) -> None:
    """Limit timm's Posterize to at least one bit: it asks for 0 bits at times, which Pillow 13 refuses."""
    for policy in transform.transforms:
        groups = [*getattr(policy, "policy", ()), getattr(policy, "ops", ())]
        for operation in (one for group in groups for one in group):
            if operation.name.startswith("Posterize"):
                bits = operation.level_fn
                operation.level_fn = lambda level, settings, bits=bits: (max(1, *bits(level, settings)),)


@dataclass
class AccuracyEvaluator:
    """Evaluator of a classifier: top-1 and top-5 in percent on all images of a source."""

    source: Source
    transform: EvalTransform
    device: torch.device
    num_workers: int
    predictions: NDArray[np.int64] | None = None
    """[images, up to 5] of the last measurement: classes, best first; on every rank."""

    def __call__(self, method: Method) -> dict[str, float]:
        """Measure ``method.evaluated``."""
        assert isinstance(method, Classification)
        network = method.evaluated
        found = extract(
            network.backbone, self.source, self.transform, self.device, self.num_workers, progress=False, finite=False
        )
        with torch.inference_mode():
            logits = network.classifier(torch.from_numpy(found.features).to(self.device)).cpu()
        self.predictions = logits.topk(min(5, logits.shape[1])).indices.numpy()
        tops = (1, 5) if logits.shape[1] > 5 else (1,)
        return {f"top{k}": 100 * float(correct(self.predictions, self.source.labels, k).mean()) for k in tops}


def stratified_subset(source: Source, share: float, seed: int) -> Source:
    """Return a share of the images of each class, at least one, chosen by ``seed``."""
    if share == 1:
        return source
    labels, generator = np.asarray(source.labels), np.random.default_rng([seed, 2])
    order = generator.permutation(len(labels))
    chosen = [order[labels[order] == label] for label in np.unique(labels)]
    return Subset(source, np.sort(np.concatenate([one[: max(1, round(share * len(one)))] for one in chosen])))
