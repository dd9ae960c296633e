"""Flags that are given twice, with a word too many or too few, or with a word that is none of theirs."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from dino_xcit.cli import parse_flags, parse_pretrain, replace_flags
from dino_xcit.config import PretrainConfig
from dino_xcit.data.command_line import CommandLine
from dino_xcit.errors import InputError
from dino_xcit.launch_config import split
from eval.command_line import settings
from eval.config import KnnConfig
from eval.look_config import PcaConfig
from eval.retrieval_config import RetrievalConfig

MISTAKES = {
    "--lr 1 --lr 2": "--lr is given twice: give it once",
    "--global-crops-size 9 --global_crops_size=9": "--global_crops_size is given twice: give it once",
    "--deterministic --no-deterministic": "--deterministic is given twice: give it once",
    "--allow-missing a --allow-missing b": "--allow_missing is given twice: give it once, with all its values",
    "--config a.yaml --config b.yaml": "--config is given twice: give it once",
    "--lr 1 2": "--lr is '1 2', expected one value, as in --lr 0.0005",
    "--arch xcit_small_12_p16 photos": "--arch is 'xcit_small_12_p16 photos', expected one value",
    "--data-path my photos": "--data_path is 'my photos', expected one value, as in --data_path ... (in quotes where",
    "--lr": "--lr has no value, expected one value, as in --lr 0.0005",
    "--global_crops_scale 0.4": "--global_crops_scale is '0.4', expected 2 values, as in --global_crops_scale 0.4 1.0",
    "--global_crops_scale 0.4 1 2": "--global_crops_scale is '0.4 1 2', expected 2 values",
    "--epochs 1.5": "--epochs is '1.5', expected a whole number",
    "--lr fast": "--lr is 'fast', expected a number",
    "--std 1 1 one": "--std is 'one', expected a number",
    "--seed 9223372036854775808": "seed is 9223372036854775808, expected less than 2^63",
    "--precision fp8": "--precision is 'fp8', expected auto, fp32, bf16 or fp16",
}


@pytest.mark.parametrize("typed", MISTAKES)
def test_a_mistake_is_our_sentence_that_names_the_flag(typed: str) -> None:
    with pytest.raises(InputError) as refused:
        parse_pretrain(typed.split(" "))
    assert str(refused.value).startswith(MISTAKES[typed])
    assert "\n" not in str(refused.value)


def test_evaluators_refuse_a_flag_under_two_names() -> None:
    for typed in ("--weights a --pretrained_weights b", "--ks 1 --ks 2", "--ks 10 --nb_knn 20"):
        with pytest.raises(InputError, match="is given twice"):
            settings(KnnConfig, typed.split(" "), "run_knn.py")


def test_a_stray_word_after_an_evaluator_s_flag_is_our_sentence() -> None:
    with pytest.raises(InputError, match="--weights is 'a b', expected one value"):
        settings(KnnConfig, ["--weights", "a", "b"], "run_knn.py")
    with pytest.raises(InputError, match="unknown flag --use_fp16"):
        settings(KnnConfig, ["--weights", "a", "--use_fp16"], "run_knn.py")


def test_images_may_be_named_in_several_places() -> None:
    typed = "a.jpg --images b.jpg --size 64 --images=c.jpg"
    assert sorted(settings(PcaConfig, typed.split(" "), "pca", "images").images) == ["a.jpg", "b.jpg", "c.jpg"]


def test_a_word_after_a_number_below_zero_is_told_from_it() -> None:
    typed = ["--threshold", "-1", "duplicates", "--first", "photos"]
    config = settings(RetrievalConfig, typed, "run_retrieval.py", "protocol")
    assert (config.protocol, config.threshold, config.first) == ("duplicates", -1, "photos")


def test_the_data_commands_refuse_a_flag_that_is_given_twice() -> None:
    line = CommandLine("usage", "what it does")
    line.add_argument("--max-side", type=int)
    assert line.read(["--max_side", "3"]).max_side == 3
    with pytest.raises(InputError, match="--max-side is given twice"):
        line.read(["--max_side", "3", "--max-side=4"])


def test_a_launch_refuses_its_own_flags_twice_but_for_sbatch_s() -> None:
    assert split(["--slurm_additional", "a=1", "--slurm_additional", "b=2"], ())[0] == {
        "slurm_additional": ["a=1", "b=2"]
    }
    with pytest.raises(InputError, match="--nodes is given twice"):
        split(["--nodes", "1", "--nodes=2"], ())


FILES = {
    "lr: 1\nlr: 2\n": "lr is given twice in FILE",
    "out_dim: 9\nout-dim: 9\n": "out_dim is given twice in FILE",
    "lr: {a: 1}\n": "lr has settings of its own in FILE",
    "std: [[1, 2], 3, 4]\n": "std has settings of its own in FILE",
    "lr: fast\n": "in the config file FILE: --lr is 'fast', expected a number",
    "global_crops_scale: 0.4\n": "in the config file FILE: --global_crops_scale is '0.4', expected 2 values",
    "deterministic: perhaps\n": "in the config file FILE: --deterministic is 'perhaps', expected true or false",
    "config: other.yaml\n": "unknown setting 'config' in FILE",
}


@pytest.mark.parametrize("text", FILES)
def test_the_same_holds_in_a_file_of_settings(tmp_path: Path, text: str) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text(text)
    with pytest.raises(InputError) as refused:
        parse_pretrain(["--config", str(file)])
    assert str(refused.value).startswith(FILES[text].replace("FILE", str(file)))


def test_a_flag_wins_over_the_file_under_either_name_of_the_precision(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("precision: bf16\n")
    assert parse_pretrain(["--config", str(file), "--use_fp16"])[0].precision == "fp16"
    file.write_text("use_fp16: true\n")
    assert parse_pretrain(["--config", str(file)])[0].precision == "fp16"
    assert parse_pretrain(["--config", str(file), "--precision", "bf16"])[0].precision == "bf16"


def test_flags_of_a_command_line_can_be_replaced_whatever_their_spelling() -> None:
    typed = ["--lr", "1", "--global-crops-scale", "0.4", "1", "--deterministic", "--seed=3", "--out_dim", "9"]
    by = ["--global_crops_scale", "0.3", "1", "--no-deterministic", "--seed", "4"]
    found = replace_flags(typed, by)
    assert " ".join(found) == "--lr 1 --out_dim 9 --global_crops_scale 0.3 1 --no-deterministic --seed 4"
    assert parse_flags(PretrainConfig, found)["seed"] == ["4"]
    assert replace_flags([sys.executable, "a.py", "--seed", "1"], ["--seed", "2"])[:2] == [sys.executable, "a.py"]
