"""Recipes: named settings with their purpose, command and result."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

from dino_xcit.cli import build, read_flags, show_help, with_file
from dino_xcit.config import PretrainConfig, TrainConfig
from dino_xcit.errors import InputError, near_matches

Config = TypeVar("Config", bound=TrainConfig)


@dataclass(frozen=True)
class Recipe:
    """Settings that differ from the defaults of a command."""

    name: str
    purpose: str
    command: str
    result: str
    """Figures with hardware, or "not measured"."""
    settings: dict[str, object] = field(default_factory=dict)


DINO = Recipe(
    name="dino",
    purpose="the defaults of facebookresearch/dino: ViT-S or XCiT on ImageNet-1k, 100 epochs",
    command="torchrun --nproc-per-node 8 run_pretrain.py --data-path /imagenet/train --arch xcit_small_12_p16",
    result="not measured",
)

AUTO = Recipe(
    name="auto",
    purpose="your own images: DINO's settings, adapted to the number and the size of the images (dino_xcit/auto.py)",
    command="python run_pretrain.py --data-path photos/",
    result="see benchmarks/results.md, settings that fit the data",
)

XCIT_300 = Recipe(
    name="xcit-dino-300ep",
    purpose="closest to the published DINO XCiT-S12/16: 300 epochs at batch 1024 (VISSL's settings)",
    command="torchrun --nnodes 2 --nproc-per-node 8 run_pretrain.py --recipe xcit-dino-300ep "
    "--data-path /imagenet/train --arch xcit_small_12_p16",
    result="not measured (published: 76.0 k-NN, 77.8 linear)",
    settings={
        "epochs": 300,
        "lr": 1e-3,
        "lr_reference_batch": 0,
        "min_lr": 4e-5,
        "warmup_start_lr": 4e-5,
        "warmup_epochs": 10.0,
        "drop_path_rate": 0.05,
        "global_crops_scale": (0.3, 1.0),
        "local_crops_scale": (0.05, 0.3),
        "teacher_temp": 0.07,
        "warmup_teacher_temp_epochs": 30,
        "norm_last_layer": False,
        "saturation": 0.4,
        "clip_grad": 0.0,
    },
)

# Greyscale images of 28 pixels. Coats and shirts differ by outline, so crops keep the aspect ratio and most of the
# image. All shoes point the same way, so there are no flips. Two local crops are as good as four.
# Chosen on held-out training images; docs/log.md has the figures.
_SMALL_GREY: dict[str, object] = {
    "global_crops_size": 28,
    "local_crops_size": 16,
    "local_crops_number": 2,
    "global_crops_scale": (0.5, 1.0),
    "local_crops_scale": (0.2, 0.6),
    "crop_ratio": (1.0, 1.0),
    "flip": 0.0,
    "saturation": 0.0,
    "hue": 0.0,
    "gray": 0.0,
    "solarize": 0.0,
    "global_blur": (0.5, 0.5),
    "local_blur": 0.5,
    "blur_radius": (0.1, 0.8),
    "eval_crop": 28,
    "eval_resize": 28,
    "mean": (0.286, 0.286, 0.286),
    "std": (0.353, 0.353, 0.353),
    "data_path": "sample:fashion-mnist",
    "out_dim": 4096,
    "head_hidden_dim": 256,
    "head_bottleneck_dim": 64,
    "centering": "sinkhorn_knopp",  # in a run this short, the moving center leaves most prototypes unused
    "koleo_weight": 0.1,
    "momentum_teacher": 0.98,
    "batch_size_per_gpu": 64,
    "drop_path_rate": 0.0,
    "lr": 3e-3,
    "warmup_epochs": 0.3,
    "save_every": 20,
    "knn_every": 2,
    "knn_holdout": 2000,  # keeps the test images out of the training curve
}

SAMPLE = Recipe(
    name="sample",
    purpose="minutes on a CPU: the embedded sample, 12,000 images of Fashion-MNIST",
    command="python run_pretrain.py",
    result="81.9 k-NN (k = 10), 81.9 linear after 255 s on 2 CPU cores; untrained 75.9, raw pixels 82.3",
    settings=_SMALL_GREY | {"arch": "xcit_micro_4_p16", "epochs": 4},
)

SAMPLE_LONG = Recipe(
    name="sample-long",
    purpose="25 minutes on a CPU core: all 60,000 training images of Fashion-MNIST",
    command="python run_pretrain.py --recipe sample-long",
    result="86.3 k-NN (k = 10) after 25 minutes on one CPU core; untrained 79.4, raw pixels 85.6",
    settings=_SMALL_GREY
    | {
        "arch": "xcit_micro_4_p16",
        "knn_every": 1,
        "epochs": 6,
        "momentum_teacher": 0.99,
        "data_path": "sample:fashion-mnist-full",
    },
)

# Crops of 64 pixels show objects at half to full size. Hue and grey are strong, because random colours are no property
# of a class.
SCENES = Recipe(
    name="scenes",
    purpose="minutes on a CPU: 4,000 scenes of Fashion-MNIST objects, for make demo-dense",
    command="python run_pretrain.py --recipe scenes",
    result="see benchmarks/results.md, make demo-dense",
    settings=_SMALL_GREY
    | {
        "arch": "xcit_pico_4_p8",
        "data_path": "sample:scenes",
        "epochs": 6,
        "batch_size_per_gpu": 32,
        "lr": 2e-2,
        "out_dim": 1024,
        "global_crops_size": 64,
        "local_crops_size": 32,
        "global_crops_scale": (0.3, 0.9),
        "local_crops_scale": (0.08, 0.3),
        "crop_ratio": (0.75, 4 / 3),
        "saturation": 0.4,
        "hue": 0.5,
        "gray": 0.5,
        "blur_radius": (0.1, 1.0),
        "mean": (0.32, 0.32, 0.32),
        "std": (0.21, 0.21, 0.21),
        "eval_crop": 128,
        "eval_resize": 128,
        "save_every": 0,
        "knn_every": 0,
        "knn_holdout": 0,
    },
)

RECIPES = {recipe.name: recipe for recipe in (AUTO, DINO, XCIT_300, SAMPLE, SAMPLE_LONG, SCENES)}


def register(recipe: Recipe) -> None:
    """Make ``--recipe recipe.name`` apply its settings.

    Raises:
        ValueError: the name is taken, or a setting does not exist.
    """
    if recipe.name in RECIPES:
        raise ValueError(f"recipe {recipe.name!r} is taken: choose another name")
    known = {field.name for field in dataclasses.fields(PretrainConfig)}
    if unknown := recipe.settings.keys() - known:
        raise ValueError(f"recipe {recipe.name!r} has unknown settings: {', '.join(sorted(unknown))}")
    RECIPES[recipe.name] = recipe


# Larger architectures train one epoch on the sample. Local crops of 20 pixels give 2 x 2 tokens at patch size 16.
_SMALL_ARCHS = ("xcit_pico_4", "xcit_micro_4")
_LARGE_ARCH: dict[str, object] = {"epochs": 1, "lr": 5e-4, "warmup_epochs": 0.1, "local_crops_size": 20}
# timm's transformers need sizes divisible by the patch size; XCiT takes any size.
_TIMM_CROPS: dict[str, object] = {"global_crops_size": 64, "local_crops_size": 32, "eval_crop": 64, "eval_resize": 64}


def recipe_settings(name: str, arch: str | None) -> dict[str, object]:
    """Return the settings of a recipe; sample recipes are adapted to ``arch`` (None: the recipe's own).

    Raises:
        InputError: the recipe is unknown.
    """
    if name not in RECIPES:
        raise InputError(f"unknown recipe {name!r}{near_matches(name, RECIPES)} (known: {', '.join(RECIPES)})")
    settings = dict(RECIPES[name].settings)
    if RECIPES[name] in (SAMPLE, SAMPLE_LONG) and arch:
        if not arch.startswith(_SMALL_ARCHS):
            settings |= _LARGE_ARCH
        if arch.startswith("timm:"):
            settings |= _TIMM_CROPS
    return settings


def parse_run(
    kind: type[Config], argv: Sequence[str], prog: str, recipes: Mapping[str, Recipe], default: str
) -> tuple[Config, str]:
    """Parse the settings of a run with named recipes; also return a sentence on the choice of the recipe.

    Precedence: flags, ``--config``, the recipe, defaults of ``kind``.

    Raises:
        InputError: as :func:`dino_xcit.cli.parse`; the recipe is unknown.
    """
    show_help(kind, argv, prog)
    flags = with_file(kind, read_flags(kind, argv))
    name = " ".join(flags.get("recipe", [])) or default
    if name not in recipes:
        raise InputError(f"unknown recipe {name!r}{near_matches(name, recipes)} (known: {', '.join(recipes)})")
    config = build(kind, flags | {"recipe": [name]}, kind(**recipes[name].settings))  # type: ignore[arg-type]
    return config, f"recipe {name}{'' if 'recipe' in flags else ' (the default)'}, explicit flags take precedence"


class PretrainSettings(NamedTuple):
    """What :func:`parse_pretrain` returns."""

    config: PretrainConfig
    explanation: str
    """A sentence on the choice of the recipe."""
    given: frozenset[str]
    """Settings from flags or ``--config``, which recipe ``auto`` leaves alone."""


def parse_pretrain(argv: Sequence[str]) -> PretrainSettings:
    """Parse the settings of run_pretrain.py.

    Precedence: flags, ``--config``, the recipe, defaults. The default recipe is ``sample`` without data, else ``auto``.

    Raises:
        InputError: as :func:`dino_xcit.cli.parse`; the recipe is unknown or needs data.
    """
    show_help(PretrainConfig, argv, "run_pretrain.py")
    flags = with_file(PretrainConfig, read_flags(PretrainConfig, argv))
    data, arch, named = (" ".join(flags.get(name, [])) for name in ("data_path", "arch", "recipe"))
    recipe = named or ("auto" if data else "sample")
    why = "" if "recipe" in flags else (" (--data-path is given)" if data else " (no --data-path)")
    settings = recipe_settings(recipe, arch or None)
    if flags.get("channels", ["3"]) != ["3"]:  # the recipe's are those of its own images
        settings = {name: value for name, value in settings.items() if name not in ("mean", "std")}
    if not data and "data_path" not in settings:
        raise InputError(f"recipe {recipe} needs --data-path: a folder of images, such as /data/imagenet/train")
    defaults = PretrainConfig(**{"recipe": recipe, **settings})  # type: ignore[arg-type]
    config = build(PretrainConfig, flags | {"recipe": [recipe]}, defaults)
    if not config.output_dir:
        name = f"{recipe}-{config.arch.replace('timm:', 'timm-').replace('/', '-')}"
        config = dataclasses.replace(config, output_dir=f"runs/{name}")
    embedded = not data and config.data_path == "sample:fashion-mnist"
    source = f"the embedded images ({config.data_path})" if embedded else f"data {config.data_path}"
    explanation = f"recipe {recipe}{why}: {config.arch} on {source}, explicit flags take precedence"
    return PretrainSettings(config, explanation, frozenset(flags))
