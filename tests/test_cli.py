"""The command line of run_pretrain.py: spellings, refusals, help; and what the package may import."""

from __future__ import annotations

import ast
import dataclasses
from pathlib import Path
from typing import Any

import pytest
from pretrain_command import DATA, last_line, parsed, refused

import dino_xcit
from dino_xcit.cli import parse_pretrain
from dino_xcit.config import RESUME_SAFE_FIELDS, PretrainConfig, differences
from dino_xcit.errors import run_main

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
        (["--use-fp16", "--precision", "fp16"], "fp16"),
        (["--use_fp16", "false"], "fp32"),
        (["--use_fp16", "false", "--precision", "bf16"], "bf16"),
        ([], "auto"),
    ],
)
def test_dinos_use_fp16_means_a_precision(argv: list[str], precision: str) -> None:
    assert parsed(*DATA, *argv).precision == precision


@pytest.mark.parametrize(
    "argv",
    [
        ["--use_fp16", "true", "--precision", "bf16"],
        ["--precision", "auto", "--use_fp16"],
        ["--use_fp16", "false", "--precision", "fp16"],
    ],
)
def test_two_words_on_the_precision_that_contradict_each_other_are_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, argv: list[str]
) -> None:
    assert "expected one of the two; leave --use_fp16 out" in refused(capsys, *DATA, *argv)
    file = tmp_path / "run.yaml"
    precision = argv[argv.index("--precision") + 1]
    file.write_text(f"precision: {precision}\nuse_fp16: {precision != 'fp16'}\n")
    assert f"in the config file {file}: " in refused(capsys, *DATA, "--config", str(file))


def test_all_of_dinos_flags_are_known() -> None:
    typed = (
        "--arch xcit_small_12_p16 --out_dim 65536 --norm_last_layer true --momentum_teacher 0.996 "
        "--use_bn_in_head false --warmup_teacher_temp 0.04 --teacher_temp 0.04 --warmup_teacher_temp_epochs 0 "
        "--use_fp16 true --weight_decay 0.04 --weight_decay_end 0.4 --clip_grad 3.0 --batch_size_per_gpu 64 "
        "--epochs 100 --freeze_last_layer 1 --lr 0.0005 --warmup_epochs 10 --min_lr 1e-6 --optimizer adamw "
        "--drop_path_rate 0.1 --global_crops_scale 0.4 1. --local_crops_number 8 --local_crops_scale 0.05 0.4 "
        "--data_path photos --output_dir out --saveckp_freq 20 --seed 0 --num_workers 10"
    )
    assert parsed(*typed.split()) == dataclasses.replace(
        PretrainConfig(), recipe="dino", data_path="photos", output_dir="out", precision="fp16", num_workers=10
    )


def test_what_torchrun_takes_over_is_ignored_with_a_word(capsys: pytest.CaptureFixture[str]) -> None:
    config = parsed(*DATA, "--dist_url", "tcp://localhost:1", "--local-rank", "0", "--local_rank=3", "--seed", "4")
    assert config.seed == 4
    assert "torchrun" in capsys.readouterr().err


def test_negative_numbers_are_values() -> None:
    assert parsed(*DATA, "--num_workers", "-1").num_workers == -1


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
        (["--epochs", "0"], "epochs"),
        (["--lr", "-1"], "lr"),
        (["--lr", "nan"], "lr"),
        (["--global_crops_scale", "1", "0.4"], "global_crops_scale"),
        (["--global_crops_size", "0"], "global_crops_size"),
        (["--local_crops_number", "-2"], "local_crops_number"),
        (["--out_dim", "1"], "out_dim"),
        (["--drop_path_rate", "1"], "drop_path_rate"),
        (["--momentum_teacher", "1.5"], "momentum_teacher"),
        (["--teacher_temp", "0"], "teacher_temp"),
        (["--optimizer", "adam"], "optimizer"),
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
        assert bool(found) is (field.name not in RESUME_SAFE_FIELDS), field.name
        if found:
            assert found[0].startswith(f"{field.name} something else -> ")
    assert RESUME_SAFE_FIELDS.isdisjoint(
        {"lr", "arch", "data_path", "seed", "epochs", "out_dim", "local_crops_size", "mean"}
    )
    assert {"max_steps", "output_dir", "num_workers"} <= RESUME_SAFE_FIELDS


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
    forbidden = {"eval", *(path.stem for path in Path(dino_xcit.__file__).parent.parent.glob("run_*.py"))}
    assert len(forbidden) > 6
    offenders = {
        str(file): name for file in files for name in imported_modules(file) if name.split(".")[0] in forbidden
    }
    assert offenders == {}
