"""The command line of run_pretrain.py: spellings, precedence, refusals; and what the package may import."""

from __future__ import annotations

import ast
import dataclasses
from pathlib import Path
from typing import Any

import pytest

import dino_xcit
from dino_xcit.cli import parse_pretrain
from dino_xcit.config import FREE_TO_CHANGE, PretrainConfig, differences
from dino_xcit.errors import InputError, run_main
from dino_xcit.recipes import RECIPES, recipe_settings

DATA = ["--data-path", "photos"]


def parsed(*argv: str) -> PretrainConfig:
    return parse_pretrain(argv)[0]


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """What a command line that cannot be used prints; exit code 2 is demanded."""
    with pytest.raises(SystemExit) as caught:
        run_main(lambda: parse_pretrain(argv) and None)
    assert caught.value.code == 2
    return capsys.readouterr().err


def last_line(text: str) -> str:
    return text.strip().splitlines()[-1]


# ---- spellings


@pytest.mark.parametrize(
    "argv",
    [
        ["--global_crops_scale", "0.3", "1", "--local_crops_number", "6", "--teacher_temp", "0.05"],
        ["--global-crops-scale", "0.3", "1", "--local-crops-number", "6", "--teacher-temp", "0.05"],
        ["--global_crops-scale", "0.3", "1.0", "--local_crops_number=6", "--teacher-temp=0.05"],
        ["--teacher_temp=5e-2", "--local-crops-number", "6", "--global-crops-scale=0.3", "1."],
    ],
)
def test_flags_have_dashes_or_underscores_and_spaces_or_equals(argv: list[str]) -> None:
    config = parsed(*DATA, *argv)
    assert config.global_crops_scale == (0.3, 1.0)
    assert config.local_crops_number == 6
    assert config.teacher_temp == 0.05


@pytest.mark.parametrize("word", ["true", "True", "TRUE", "1", "yes", "on"])
def test_every_spelling_of_true(word: str) -> None:
    assert parsed(*DATA, "--use_bn_in_head", word).use_bn_in_head is True
    assert parsed(*DATA, f"--use-bn-in-head={word}").use_bn_in_head is True


@pytest.mark.parametrize("word", ["false", "False", "0", "no", "off"])
def test_every_spelling_of_false(word: str) -> None:
    assert parsed(*DATA, "--norm_last_layer", word).norm_last_layer is False


def test_a_switch_alone_is_true_and_no_makes_it_false() -> None:
    assert parsed(*DATA, "--deterministic").deterministic is True
    assert parsed(*DATA, "--use_bn_in_head", "--seed", "3").use_bn_in_head is True
    assert parsed(*DATA, "--no-norm-last-layer").norm_last_layer is False
    assert parsed(*DATA, "--no_norm_last_layer", "--seed", "3").seed == 3


@pytest.mark.parametrize(
    ("argv", "precision"),
    [
        (["--use_fp16", "true"], "fp16"),
        (["--use_fp16", "True"], "fp16"),
        (["--use-fp16"], "fp16"),
        (["--use_fp16", "false"], "fp32"),
        (["--use_fp16", "false", "--precision", "bf16"], "bf16"),
        ([], "auto"),
    ],
)
def test_dinos_use_fp16_means_a_precision(argv: list[str], precision: str) -> None:
    assert parsed(*DATA, *argv).precision == precision


def test_all_of_dinos_flags_are_known() -> None:
    config = parsed(
        *[
            "--arch",
            "xcit_small_12_p16",
            "--out_dim",
            "65536",
            "--norm_last_layer",
            "true",
            "--momentum_teacher",
            "0.996",
        ],
        *[
            "--use_bn_in_head",
            "false",
            "--warmup_teacher_temp",
            "0.04",
            "--teacher_temp",
            "0.04",
            "--warmup_teacher_temp_epochs",
            "0",
        ],
        *[
            "--use_fp16",
            "true",
            "--weight_decay",
            "0.04",
            "--weight_decay_end",
            "0.4",
            "--clip_grad",
            "3.0",
            "--batch_size_per_gpu",
            "64",
        ],
        *[
            "--epochs",
            "100",
            "--freeze_last_layer",
            "1",
            "--lr",
            "0.0005",
            "--warmup_epochs",
            "10",
            "--min_lr",
            "1e-6",
            "--optimizer",
            "adamw",
        ],
        *[
            "--drop_path_rate",
            "0.1",
            "--global_crops_scale",
            "0.4",
            "1.",
            "--local_crops_number",
            "8",
            "--local_crops_scale",
            "0.05",
            "0.4",
        ],
        *["--data_path", "photos", "--output_dir", "out", "--saveckp_freq", "20", "--seed", "0", "--num_workers", "10"],
    )
    assert config == dataclasses.replace(
        PretrainConfig(), recipe="dino", data_path="photos", output_dir="out", precision="fp16", num_workers=10
    )


def test_what_torchrun_takes_over_is_ignored_with_a_word(capsys: pytest.CaptureFixture[str]) -> None:
    config = parsed(*DATA, "--dist_url", "tcp://localhost:1", "--local-rank", "0", "--local_rank=3", "--seed", "4")
    assert config.seed == 4
    assert "torchrun" in capsys.readouterr().err


def test_negative_numbers_are_values() -> None:
    assert parsed(*DATA, "--num_workers", "-1").num_workers == -1


def test_the_last_of_two_equal_flags_wins() -> None:
    assert parsed(*DATA, "--seed", "1", "--seed", "2").seed == 2


# ---- recipes, files, precedence


def test_without_flags_and_data_the_defaults_are_the_reference_s() -> None:
    config = PretrainConfig()
    expected = {
        "out_dim": 65536, "norm_last_layer": True, "momentum_teacher": 0.996, "use_bn_in_head": False,
        "warmup_teacher_temp": 0.04, "teacher_temp": 0.04, "warmup_teacher_temp_epochs": 0, "weight_decay": 0.04,
        "weight_decay_end": 0.4, "clip_grad": 3.0, "clip_mode": "per-parameter", "batch_size_per_gpu": 64,
        "epochs": 100, "freeze_last_layer": 1, "lr": 5e-4, "lr_reference_batch": 256, "warmup_epochs": 10,
        "min_lr": 1e-6, "optimizer": "adamw", "drop_path_rate": 0.1, "global_crops_scale": (0.4, 1.0),
        "local_crops_number": 8, "local_crops_scale": (0.05, 0.4), "saveckp_freq": 20, "seed": 0,
        "global_crops_size": 224, "local_crops_size": 96, "student_temp": 0.1, "center_momentum": 0.9, "jitter": 0.8,
        "brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1, "gray": 0.2, "global_blur": (1.0, 0.1),
        "local_blur": 0.5, "blur_radius": (0.1, 2.0), "solarize": 0.2, "flip": 0.5,
    }  # fmt: skip
    assert {name: getattr(config, name) for name in expected} == expected


def test_the_first_line_names_the_recipe_and_why() -> None:
    config, line = parse_pretrain([])
    assert "sample" in line
    assert "no --data-path" in line
    assert config.recipe == "sample"
    assert config.data_path == "sample:fashion-mnist"
    config, line = parse_pretrain(DATA)
    assert "dino" in line
    assert "photos" in line
    assert config.recipe == "dino"
    _, line = parse_pretrain([*DATA, "--recipe", "xcit-dino-300ep"])
    assert "xcit-dino-300ep" in line


def test_the_published_recipe_has_the_published_values() -> None:
    config = parsed(*DATA, "--recipe", "xcit-dino-300ep")
    expected = {
        "epochs": 300, "lr": 1e-3, "lr_reference_batch": 0, "min_lr": 4e-5, "warmup_start_lr": 4e-5,
        "warmup_epochs": 10, "weight_decay": 0.04, "weight_decay_end": 0.4, "drop_path_rate": 0.05,
        "global_crops_scale": (0.3, 1.0), "local_crops_scale": (0.05, 0.3), "local_crops_number": 8,
        "warmup_teacher_temp": 0.04, "teacher_temp": 0.07, "warmup_teacher_temp_epochs": 30, "norm_last_layer": False,
        "saturation": 0.4, "clip_grad": 0.0,
    }  # fmt: skip
    assert {name: getattr(config, name) for name in expected} == expected


def test_explicit_flags_win_over_the_sample_recipe() -> None:
    config = parsed("--arch", "xcit_small_12_p16", "--batch_size_per_gpu", "5", "--local-crops-size", "20")
    assert (config.arch, config.batch_size_per_gpu, config.local_crops_size) == ("xcit_small_12_p16", 5, 20)
    assert config.recipe == "sample"


@pytest.mark.parametrize(
    "arch", ["xcit_pico_4_p4", "xcit_small_12_p16", "xcit_small_12_p8", "timm:vit_tiny_patch16_224"]
)
def test_the_sample_s_crops_give_every_patch_size_a_grid(arch: str) -> None:
    config = parsed("--arch", arch)
    patch = 4 if arch.endswith("p4") else 8 if arch.endswith("p8") else 16
    assert config.local_crops_size > patch  # two tokens a side or more, so that they can interact
    assert config.global_crops_size > config.local_crops_size
    if arch.startswith("timm:"):  # whose transformers refuse sizes that the patch does not divide
        assert config.local_crops_size % patch == config.global_crops_size % patch == 0
    assert config.global_crops_size <= 64  # not 224: the first command must finish on a CPU


def test_flags_beat_the_file_which_beats_the_recipe_which_beats_the_defaults(tmp_path: Path) -> None:
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


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("epochz: 3\n", "epochs"),
        ("- epochs\n", "name: value"),
        ("epochs: [3\n", "YAML"),
        ("", "name: value"),
        ("epochs: three\n", "epochs"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, named: str
) -> None:
    (tmp_path / "run.yaml").write_text(text)
    assert named in refused(capsys, "--config", str(tmp_path / "run.yaml"))


def test_files_that_are_missing_or_binary_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "absent.yaml" in refused(capsys, "--config", str(tmp_path / "absent.yaml"))
    (tmp_path / "image.yaml").write_bytes(b"\xff\xfe\x00\x89PNG")
    assert "image.yaml" in refused(capsys, "--config", str(tmp_path / "image.yaml"))


def test_a_yaml_value_left_empty_is_not_the_word_none(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("data_path:\nseed: 3\n")
    try:
        config = parsed("--config", str(tmp_path / "run.yaml"))
    except InputError:
        return
    assert config.data_path != "None"


def test_the_output_directory_is_named_after_recipe_and_architecture() -> None:
    assert parsed("--arch", "xcit_nano_12_p16").output_dir == "runs/sample-xcit_nano_12_p16"
    assert parsed(*DATA, "--arch", "timm:vit_tiny_patch16_224").output_dir == "runs/dino-timm-vit_tiny_patch16_224"
    assert parsed(*DATA, "--output-dir", "x/y").output_dir == "x/y"


def test_every_recipe_is_a_valid_configuration_with_purpose_command_and_result() -> None:
    assert {"dino", "xcit-dino-300ep", "sample", "sample-long"} <= set(RECIPES)
    for name, recipe in RECIPES.items():
        PretrainConfig(**recipe_settings(name, None))  # type: ignore[arg-type]
        assert recipe.purpose
        assert "run_pretrain.py" in recipe.command
        assert recipe.result


# ---- refusals


def test_an_unknown_flag_is_refused_with_near_matches(capsys: pytest.CaptureFixture[str]) -> None:
    error = refused(capsys, *DATA, "--global_crop_scale", "0.4", "1")
    assert "--global_crop_scale" in error
    assert "mean global_crops_scale" in error.replace("--global_crops_scale", "global_crops_scale")
    assert last_line(error).startswith("error: ")
    assert "epochs" in refused(capsys, *DATA, "--epoch", "3")
    assert "unknown flag" in refused(capsys, *DATA, "--no-seed")


def test_an_unknown_recipe_is_refused_with_near_matches(capsys: pytest.CaptureFixture[str]) -> None:
    assert "sample" in last_line(refused(capsys, "--recipe", "sampel"))
    assert "--data-path" in last_line(refused(capsys, "--recipe", "dino"))


def test_a_word_without_a_flag_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert "photos" in refused(capsys, "photos", "--seed", "1")


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--epochs", "ten"], "epochs"),
        (["--epochs", "2.5"], "epochs"),
        (["--epochs", "0"], "epochs"),
        (["--arch"], "arch"),
        (["--lr", "-1"], "lr"),
        (["--lr", "nan"], "lr"),
        (["--global_crops_scale", "0.4"], "global_crops_scale"),
        (["--global_crops_scale", "1", "0.4"], "global_crops_scale"),
        (["--global_crops_scale", "0.4", "1", "2"], "2"),
        (["--global_crops_size", "0"], "global_crops_size"),
        (["--local_crops_number", "-2"], "local_crops_number"),
        (["--out_dim", "1"], "out_dim"),
        (["--drop_path_rate", "1"], "drop_path_rate"),
        (["--momentum_teacher", "1.5"], "momentum_teacher"),
        (["--teacher_temp", "0"], "teacher_temp"),
        (["--optimizer", "adam"], "optimizer"),
        (["--precision", "fp8"], "precision"),
        (["--resume", "yes"], "resume"),
        (["--use_bn_in_head", "perhaps"], "use_bn_in_head"),
        (["--use_fp16", "perhaps"], "use_fp16"),
        (["--norm_last_layer", "true", "false"], "norm_last_layer"),
        (["--blur_radius", "2", "1"], "blur_radius"),
        (["--brightness", "-1"], "brightness"),
        (["--clip_grad", "nan"], "clip_grad"),
        (["--warmup_epochs", "inf"], "warmup_epochs"),
        (["--std", "0", "1", "1"], "std"),
        (["--seed", "-1"], "seed"),
    ],
)
def test_values_that_cannot_be_are_refused_by_name_in_one_sentence(
    capsys: pytest.CaptureFixture[str], argv: list[str], named: str
) -> None:
    error = refused(capsys, *DATA, *argv)
    assert "Traceback" not in error
    assert last_line(error).startswith("error: ")
    assert named in last_line(error)


# ---- help


def test_help_lists_every_flag_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    for flag in ("--help", "-h"):
        with pytest.raises(SystemExit) as caught:
            parse_pretrain([flag])
        assert caught.value.code == 0
        text = capsys.readouterr().out
        words = " ".join(text.replace("│", " ").split())
        for field in dataclasses.fields(PretrainConfig):
            assert f"--{field.name}" in text or f"--{field.name.replace('_', '-')}" in text, field.name
        assert words.count("(default:") >= len(dataclasses.fields(PretrainConfig))
        assert "(default: 65536)" in words
        assert "(default: 0.4 1.0)" in words
        assert "(default: True)" in words


# ---- what may differ when a run is carried on


def test_differences_name_what_changes_the_result_and_nothing_else() -> None:
    config = parsed(*DATA)
    stored: dict[str, Any] = {
        name: list(value) if isinstance(value, tuple) else value for name, value in dataclasses.asdict(config).items()
    }
    assert differences(stored, config) == []
    for field in dataclasses.fields(PretrainConfig):
        other = {**stored, field.name: "something else"}
        found = differences(other, config)
        assert bool(found) is (field.name not in FREE_TO_CHANGE), field.name
        if found:
            assert found[0].startswith(f"{field.name} something else -> ")
    assert FREE_TO_CHANGE.isdisjoint(
        {"lr", "arch", "data_path", "seed", "epochs", "out_dim", "local_crops_size", "mean"}
    )
    assert {"max_steps", "output_dir", "num_workers"} <= FREE_TO_CHANGE


# ---- the sentence and the exit code


def test_only_a_users_mistakes_become_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    def full() -> None:
        raise OSError(28, "No space left on device", "runs/x")

    def interrupted() -> None:
        raise KeyboardInterrupt

    def ours() -> None:
        raise RuntimeError("a fault of ours")

    with pytest.raises(SystemExit) as caught:
        run_main(full)
    assert caught.value.code == 2
    assert "no space left" in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        run_main(interrupted)
    assert caught.value.code == 130
    with pytest.raises(RuntimeError, match="a fault of ours"):
        run_main(ours)
    run_main(lambda: None)


# ---- rooms


def imported_modules(file: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
        elif (
            isinstance(node, ast.Call)
            and getattr(node.func, "attr", getattr(node.func, "id", "")) in ("import_module", "__import__")
            and node.args
            and isinstance(node.args[0], ast.Constant)
        ):
            names.add(str(node.args[0].value))
    return names


def test_the_package_never_imports_the_evaluators() -> None:
    files = sorted(Path(dino_xcit.__file__).parent.rglob("*.py"))
    assert len(files) > 20
    offenders = {
        str(file): name
        for file in files
        for name in imported_modules(file)
        if name.split(".")[0] in ("eval", "run_pretrain", "run_knn", "run_linear", "run_extract")
    }
    assert offenders == {}
