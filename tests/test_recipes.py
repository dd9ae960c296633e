"""Settings of run_pretrain.py: flags override the file, the file overrides the recipe, the recipe the defaults."""

from __future__ import annotations

from pathlib import Path

import pytest
from pretrain_command import DATA, parsed

from dino_xcit.config import PretrainConfig
from dino_xcit.recipes import RECIPES, parse_pretrain, recipe_settings


def test_defaults_equal_dinos_hard_coded_values() -> None:
    """tests/test_cli.py covers the values for which DINO has a flag."""
    config = PretrainConfig()
    expected = {
        "clip_mode": "per-parameter", "lr_reference_batch": 256, "global_crops_size": 224, "local_crops_size": 96,
        "student_temp": 0.1, "center_momentum": 0.9, "jitter": 0.8, "brightness": 0.4, "contrast": 0.4,
        "saturation": 0.2, "hue": 0.1, "gray": 0.2, "global_blur": (1.0, 0.1), "local_blur": 0.5,
        "blur_radius": (0.1, 2.0), "solarize": 0.2, "flip": 0.5,
    }  # fmt: skip
    assert {name: getattr(config, name) for name in expected} == expected


def test_parse_pretrain_reports_recipe_and_reason() -> None:
    config, line, given = parse_pretrain([])
    assert given == frozenset()
    assert "no --data-path" in line
    assert (config.recipe, config.data_path) == ("sample", "sample:fashion-mnist")
    config, line, given = parse_pretrain([*DATA, "--lr", "1e-3"])
    assert "--data-path is given" in line
    assert config.recipe == "auto"
    assert given == {"data_path", "lr"}


def test_published_recipe_has_published_values() -> None:
    config = parsed(*DATA, "--recipe", "xcit-dino-300ep")
    expected = {
        "epochs": 300, "lr": 1e-3, "lr_reference_batch": 0, "min_lr": 4e-5, "warmup_start_lr": 4e-5,
        "warmup_epochs": 10, "weight_decay": 0.04, "weight_decay_end": 0.4, "drop_path_rate": 0.05,
        "global_crops_scale": (0.3, 1.0), "local_crops_scale": (0.05, 0.3), "local_crops_number": 8,
        "warmup_teacher_temp": 0.04, "teacher_temp": 0.07, "warmup_teacher_temp_epochs": 30, "norm_last_layer": False,
        "saturation": 0.4, "clip_grad": 0.0,
    }  # fmt: skip
    assert {name: getattr(config, name) for name in expected} == expected


@pytest.mark.parametrize(
    "arch", ["xcit_pico_4_p4", "xcit_small_12_p16", "xcit_small_12_p8", "timm:vit_tiny_patch16_224"]
)
def test_sample_recipe_crops_fit_every_patch_size(arch: str) -> None:
    config = parsed("--arch", arch)
    patch = 4 if arch.endswith("p4") else 8 if arch.endswith("p8") else 16
    assert config.local_crops_size > patch  # at least two tokens per side, so that tokens can interact
    assert config.global_crops_size > config.local_crops_size
    if arch.startswith("timm:"):  # timm's ViTs refuse sizes that are no multiple of the patch
        assert config.local_crops_size % patch == config.global_crops_size % patch == 0
    assert config.global_crops_size <= 64  # far below 224, so that the first command finishes on a CPU


def test_settings_precedence_is_flag_file_recipe_default(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "recipe: xcit-dino-300ep\ndata_path: photos\nepochs: 50\nlocal-crops-scale: [0.1, 0.2]\nlr: 1e-4\n"
        "norm_last_layer: yes\nuse_bn_in_head: true\n"
    )
    config = parsed("--config", str(file), "--lr", "0.3", "--no-use-bn-in-head")
    assert config.lr == 0.3  # flag
    assert config.use_bn_in_head is False
    assert config.epochs == 50  # file
    assert config.local_crops_scale == (0.1, 0.2)
    assert config.norm_last_layer is True
    assert config.teacher_temp == 0.07  # recipe
    assert config.batch_size_per_gpu == 64  # default
    assert parsed(f"--config={file}").lr == 1e-4


def test_output_dir_default_names_recipe_and_architecture() -> None:
    assert parsed("--arch", "xcit_nano_12_p16").output_dir == "runs/sample-xcit_nano_12_p16"
    assert parsed(*DATA, "--arch", "timm:vit_tiny_patch16_224").output_dir == "runs/auto-timm-vit_tiny_patch16_224"
    assert parsed(*DATA, "--output-dir", "x/y").output_dir == "x/y"


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_a_valid_configuration(name: str) -> None:
    PretrainConfig(**recipe_settings(name, None))  # type: ignore[arg-type]
