"""Label-free metrics of a representation, measured at epoch ends on a fixed subset. N images, V views, D features.

They compare checkpoints of one run, and show what a falling loss hides. None of them replaces labels.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from dino_xcit.config import PretrainConfig
from dino_xcit.data import Source, Subset
from dino_xcit.data.loader import Loader, MultiCropDataset
from dino_xcit.data.source import evenly_spaced
from dino_xcit.data.workers import choose_workers
from dino_xcit.methods import Method
from dino_xcit.methods.student_teacher import GLOBAL_VIEWS, choose_precision
from dino_xcit.observers import Evaluator
from dino_xcit.runtime import distributed
from dino_xcit.transform import normalise

SHARE = 0.005
"""Share of an epoch's computation that the measurement may take, within the limits of the number of images."""
MIN_IMAGES, MAX_IMAGES = 512, 5000
BATCH = 64
METRICS = ("rankme", "rankme_centred", "stable_rank", "self_clustering", "lidar")
_EPS = 1e-7


def build_evaluator(config: PretrainConfig, source: Source, device: torch.device) -> Evaluator:
    """Build the evaluator of :func:`measures` over two global views of each image; the same views at every epoch."""
    images = Subset(source, np.array(evenly_spaced(len(source), count_images(config, len(source)))))
    augmentation = dataclasses.replace(config, local_crops_number=0).augmentation()
    dataset = MultiCropDataset(images, augmentation, config.seed, config.pixel_format, config.augment_device == "cuda")
    own = list(range(distributed.rank(), len(images), distributed.world_size()))
    shard = Shard([own[start : start + BATCH] for start in range(0, len(own), BATCH)])
    workers = choose_workers(config.num_workers, distributed.processes_here(), on_gpu=device.type == "cuda")
    dtype = choose_precision(config.precision, device)

    @torch.no_grad()
    def measure(method: Method) -> dict[str, float]:
        backbone, found = method.eval_backbone, []
        training = backbone.training
        backbone.eval()
        try:
            for one in Loader(dataset, shard, workers, device):  # type: ignore[arg-type]
                crops = normalise(one.crops[0], config.mean, config.std)
                with torch.autocast(device.type, dtype, enabled=dtype is not torch.float32):
                    features = backbone(crops).cls_token
                found.append(features.float().unflatten(0, (GLOBAL_VIEWS, -1)).transpose(0, 1))
        finally:
            backbone.train(training)
        features = distributed.gather_rows(torch.cat(found).contiguous())
        return measures(features.double().cpu()) if distributed.is_main() else {}

    return Evaluator("representation", epochs_between(config, len(source)), measure)


@dataclasses.dataclass(frozen=True)
class Shard:
    """Sampler of the images of one rank for :class:`dino_xcit.data.loader.Loader`; drops none."""

    batches: list[list[int]]
    start_step: int = 0
    batch_size: int = BATCH

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return ([(0, image) for image in batch] for batch in self.batches)


def count_images(config: PretrainConfig, images: int) -> int:
    """Return N, so that the forward passes take :data:`SHARE` of an epoch of ``images`` images.

    A training step passes the global crops through the teacher, and all crops forward and backward (as long as two
    forward passes) through the student.
    """
    return min(images, max(MIN_IMAGES, min(MAX_IMAGES, int(SHARE * _affordable(config, images)))))


def epochs_between(config: PretrainConfig, images: int) -> int:
    """Return the number of epochs between measurements: more than one where :func:`count_images` exceeds the share."""
    return math.ceil(count_images(config, images) / (SHARE * _affordable(config, images)))


def _affordable(config: PretrainConfig, images: int) -> float:
    """Return how many images could be measured in the time of an epoch."""
    local = config.local_crops_number * (config.local_crops_size / config.global_crops_size) ** 2
    return images * (GLOBAL_VIEWS + 3 * (GLOBAL_VIEWS + local)) / GLOBAL_VIEWS


def measures(features: Tensor) -> dict[str, float]:
    """Return :data:`METRICS` of features [N, V, D]; none if a feature is not finite.

    ``rankme``: RankMe (arXiv 2210.02885, equation 1), exp of the entropy of the normalised singular values.
    ``stable_rank``: squared Frobenius norm over squared spectral norm.
    """
    if not bool(torch.isfinite(features).all()):
        return {}
    rows = features[:, 0]
    values, centred = torch.linalg.svdvals(rows), torch.linalg.svdvals(rows - rows.mean(dim=0))
    stable_rank = float(values.square().sum() / values[0].square().clamp_min(_EPS))
    found = _effective_rank(values), _effective_rank(centred), stable_rank, self_clustering(rows), lidar(features)
    return dict(zip(METRICS, found, strict=True))


def self_clustering(features: Tensor) -> float:
    """Sum of the squared cosines of all pairs (arXiv 2305.16562), 0 for directions that are uniform, 1 for one
    direction."""
    count, dim = features.shape
    unit = nn.functional.normalize(features, dim=1)
    uniform = count + count * (count - 1) / dim
    return float(((unit.T @ unit).square().sum() - uniform) / (count**2 - uniform))


def lidar(features: Tensor, delta: float = 1e-4) -> float:
    """LiDAR (arXiv 2312.04000, section 4): effective rank of S_w^-1/2 S_b S_w^-1/2 over the views of each image.

    S_b is the covariance of the means of the images, S_w the covariance of the views around them plus delta times the
    identity.

    Args:
        features: [N, V, D], V >= 2.
    """
    means = features.mean(dim=1)
    between = (means - means.mean(dim=0)).T @ (means - means.mean(dim=0)) / (len(means) - 1)
    residuals = (features - means[:, None]).flatten(0, 1)
    within = residuals.T @ residuals / (len(means) * (features.shape[1] - 1))
    values, vectors = torch.linalg.eigh(within + delta * torch.eye(len(within), dtype=within.dtype))
    whitening = vectors / values.sqrt()
    return _effective_rank(torch.linalg.eigvalsh(whitening.T @ between @ whitening).clamp_min(0))


def _effective_rank(values: Tensor) -> float:
    """Return exp of the entropy of non-negative values, normalised to a sum of 1."""
    shares = values / values.sum().clamp_min(_EPS) + _EPS
    return float(torch.special.entr(shares).sum().exp())
