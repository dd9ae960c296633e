"""How one linear probe is told from another: all that decides its classifiers, as plain values.

linear.pth and logreg.pth are kept with it (:mod:`eval.linear.probe_file`), and taken again where it is the same.
"""

from __future__ import annotations

from dino_xcit.data import Source
from dino_xcit.runtime import distributed
from dino_xcit.weights import LoadedBackbone
from eval.config import LinearConfig
from eval.linear.logistic import GAP
from eval.linear.probe_file import Settings


def identity_of(
    config: LinearConfig, loaded: LoadedBackbone, parts: tuple[Source, Source], global_batch: int
) -> Settings:
    """All that decides what the classifiers learn by SGD, and are measured on.

    Args:
        config: with nothing left open (:func:`eval.linear.setup.for_image_size`).
        parts: training and validation images.
        global_batch: images of a step, over all processes.
    """
    # Only one process looks at every file.
    train, val = (distributed.on_main(part.fingerprint) for part in parts)
    transform = {name: list(v) if isinstance(v, tuple) else v for name, v in loaded.transform.to_dict().items()}
    identity = {
        "weights": loaded.hash,
        "train": train,
        "val": val,
        "transform": transform,
        "epochs": config.epochs,
        "batch": global_batch,
        "lr": config.lr,
        "lrs": sorted(config.lrs),
        "holdout": config.holdout,
        "crop_scale": list(config.crop_scale),
        "seed": config.seed,
    }
    # Not named where they are as they were before there was a choice: what was measured then stays comparable.
    if config.features != ("cls",):
        identity["features"] = list(config.features)
    if config.cached:
        identity["cached"] = f"{min(config.cached_epochs, config.epochs)} epochs, {config.cached_precision}"
    return identity


def identity_of_logreg(config: LinearConfig, identity: Settings) -> Settings:
    """All that decides a logistic regression: neither augmentation nor validation images.

    Args:
        identity: of the probe (:func:`identity_of`).
    """
    shared = {name: identity[name] for name in ("weights", "train", "transform", "holdout", "seed")}
    cs, features = sorted(config.logreg_cs), list(config.features)
    # Those from before there was a bound on the gap called some converged that were not: they are told from these.
    return shared | {"features": features, "cs": cs, "iterations": config.logreg_iterations, "gap": GAP}
