"""Command lines: spellings, invalid settings, config files, paths, help, resume differences, and exit codes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from pretrain_command import DATA, parsed

from dino_xcit.bounds import annotations_of, check_bounds, marked
from dino_xcit.cli import parse, parse_known
from dino_xcit.config import PretrainConfig, ResumeSafe, differences
from dino_xcit.data.pack import PackConfig
from dino_xcit.errors import InputError, run_main
from dino_xcit.recipes import parse_pretrain
from eval.config import KnnConfig, LinearConfig
from eval.retrieval_config import ExtractConfig, RetrievalConfig
from eval.viz import VizConfig
from run_slurm import LaunchConfig

# ---- spellings

RESUME_SAFE = frozenset(marked(PretrainConfig, ResumeSafe))


@pytest.mark.parametrize("typed", [
    "--global_crops_scale 0.3 1 --local_crops_number 6 --teacher_temp 0.05",
    "--global_crops-scale 0.3 1.0 --local-crops-number=6 --teacher-temp=0.05",
    "--teacher_temp=5e-2 --local-crops-number 6 --global-crops-scale=0.3 1.",
])  # fmt: skip
def test_flags_accept_dashes_underscores_spaces_and_equals_signs(typed: str) -> None:
    config = parsed(*DATA, *typed.split())
    assert (config.global_crops_scale, config.local_crops_number, config.teacher_temp) == ((0.3, 1.0), 6, 0.05)


@pytest.mark.parametrize("words", ["true True TRUE 1 yes on", "false False 0 no off"])
def test_boolean_flags_accept_every_spelling(words: str) -> None:
    for word in words.split():
        assert parsed(*DATA, "--use_bn_in_head", word).use_bn_in_head is words.startswith("true")
        assert parsed(*DATA, f"--norm-last-layer={word}").norm_last_layer is words.startswith("true")
    config = parsed(*DATA, "--use_bn_in_head", "--no_norm-last-layer", "--deterministic")
    assert (config.use_bn_in_head, config.norm_last_layer, config.deterministic) == (True, False, True)


PRECISIONS = {
    "--use_fp16 True": "fp16", "--use-fp16": "fp16", "--use-fp16 --precision fp16": "fp16", "--use_fp16 false": "fp32",
    "--use_fp16 false --precision bf16": "bf16", "": "auto",
}  # fmt: skip


@pytest.mark.parametrize(
    ("arch", "patch", "name"), [("xcit_small_12", 8, "xcit_small_12_p8"), ("deit_tiny", 16, "vit_tiny_12_p16")]
)
def test_dino_flag_patch_size_becomes_part_of_arch(arch: str, patch: int, name: str) -> None:
    assert parsed(*DATA, "--patch_size", str(patch), "--arch", arch).arch == name
    words = ["--weights", "w.pth", "--patch_size", str(patch), "--arch", arch]
    assert parse(KnnConfig, words, "run_knn.py").arch == name


@pytest.mark.parametrize("typed", PRECISIONS)
def test_dino_flag_use_fp16_sets_precision(typed: str) -> None:
    assert parsed(*DATA, *typed.split()).precision == PRECISIONS[typed]


@pytest.mark.parametrize(("typed", "level"), [("auto", 0), ("4095", 4095)])
def test_auto_means_zero_only_for_marked_settings(typed: str, level: int) -> None:
    assert parsed(*DATA, "--white-level", typed).white_level == level
    with pytest.raises(InputError, match="epochs is auto"):
        parsed(*DATA, "--epochs", "auto")


def test_all_dino_flags_are_accepted() -> None:
    typed = (
        "--arch xcit_small_12_p16 --out_dim 65536 --norm_last_layer true --momentum_teacher 0.996 "
        "--use_bn_in_head false --warmup_teacher_temp 0.04 --teacher_temp 0.04 --warmup_teacher_temp_epochs 0 "
        "--use_fp16 true --weight_decay 0.04 --weight_decay_end 0.4 --clip_grad 3.0 --batch_size_per_gpu 64 "
        "--epochs 100 --freeze_last_layer 1 --lr 0.0005 --warmup_epochs 10 --min_lr 1e-6 --optimizer adamw "
        "--drop_path_rate 0.1 --global_crops_scale 0.4 1. --local_crops_number 8 --local_crops_scale 0.05 0.4 "
        "--data_path photos --output_dir out --saveckp_freq 20 --seed 0 --num_workers 10"
    )
    assert parsed(*typed.split()) == dataclasses.replace(
        PretrainConfig(), recipe="auto", data_path="photos", output_dir="out", precision="fp16", num_workers=10
    )


def test_flags_set_by_torchrun_are_ignored_with_a_message(capsys: pytest.CaptureFixture[str]) -> None:
    typed = "--dist_url tcp://localhost:1 --local-rank 0 --local_rank=3 --num_workers -1 --seed 4"
    assert parsed(*DATA, *typed.split()).seed == 4
    assert "torchrun" in capsys.readouterr().err


# ---- refusals

MISTAKES = {
    "--global_crop_scale 0.4 1": "did you mean --global_crops_scale",
    "--recipe sampel": "did you mean sample",
    "--recipe dino": "needs --data-path",
    "photos --seed 1": "'photos'",
    "--config absent.yaml": "absent.yaml",
    "--clip-grad -1": "clip_grad is -1",
    "--lr 1 2": "'2' after --lr",
    "--use_bn_in_head=perhaps": "use_bn_in_head is perhaps, expected true or false",
    "--use_fp16 true --precision bf16": "use_fp16",
    "--arch xcit_small_12 --patch_size": "give both in --arch",
    "--patch_size 8": "give both in --arch", "--patch_size 8 --arch xcit_small_12_p16": "give both in --arch",
    "--use_fp16 false --precision fp16": "use_fp16",
    "--no-deterministic=false": "--no_deterministic",
    "--lr": "lr is empty, expected a number, such as 0.0005",
    "--global_crops_scale 0.4 1 2": "'2' after --global_crops_scale",
    "--epochs 1.5": "epochs is 1.5, expected a whole number, such as 100",
    "--std 1 1 one": "std is 1 1 one, expected numbers",
    "--precision fp8": "precision is fp8, expected one of auto, fp32",
    "--epochs 0": "epochs is 0",
    "--lr nan": "lr is nan",
    "--global_crops_scale 1 0.4": "global_crops_scale is 1.0 0.4",
}  # fmt: skip


@pytest.mark.parametrize("typed", MISTAKES)
def test_invalid_command_line_is_refused_in_one_line(typed: str) -> None:
    with pytest.raises(InputError, match=MISTAKES[typed]) as refused:
        parsed(*typed.split())
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("config", [PretrainConfig(), LaunchConfig(), KnnConfig(), ExtractConfig(), RetrievalConfig()])
def test_value_beyond_bound_is_refused(config: Any) -> None:
    beyond = {"ge": -1, "gt": 0, "le": 1, "lt": 0}
    found = 0
    for name, (_, notes) in annotations_of(type(config)).items():
        for word, limit in ((word, getattr(note, word)) for note in notes for word in beyond if hasattr(note, word)):
            value = limit + beyond[word]
            with pytest.raises(InputError, match=f"{name} is "):
                check_bounds(dataclasses.replace(config, **{name: value}))
            found += 1
    assert found > 4


def test_config_built_in_python_is_checked() -> None:
    with pytest.raises(InputError, match="optimizer is adam"):
        PretrainConfig(optimizer="adam")  # type: ignore[arg-type]


FILES = {
    "epochz: 3\n": "settings.yaml: .*did you mean --epochs",
    "lr: fast\n": "lr is fast",
    "precision: bf16\nuse_fp16: true\n": "use_fp16",
    "deterministic: []\n": "deterministic is empty, expected true or false",
    "allow_missing: ['--lr', '3']\n": "allow_missing in .* has the flag --lr",
    "lr: {a: 1}\n": "lr in ",
    "global_crops_scale: [0.1, 0.4, 1]\n": "'1' after --global_crops_scale",
    "no_norm_last_layer: true\n": "--no_norm_last_layer",
    "config: other.yaml\n": "config",
    "- epochs\n": "name: value",
    "": "name: value",
    "epochs: [3\n": "YAML",
    "\udcff\udcfe\x00PNG": "YAML",
}


@pytest.mark.parametrize("text", FILES)
def test_invalid_config_file_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text(text, errors="surrogateescape")
    with pytest.raises(InputError, match=FILES[text]):
        parsed("--config", str(file))


def test_precision_flag_overrides_config_file_under_either_name(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("precision: bf16\n")
    assert parsed("--config", str(file), "--use_fp16").precision == "fp16"
    file.write_text("use_fp16: true\n")
    assert parsed("--config", str(file)).precision == "fp16"
    assert parsed("--config", str(file), "--precision", "bf16").precision == "bf16"


# ---- paths


def test_tilde_is_expanded_in_paths_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run.yaml").write_text("output_dir: ~/runs\nallow_missing: [~a*]\n")
    config = parsed(*DATA, "--config=~/run.yaml", "--init-weights=~/w.pth")
    assert (config.output_dir, config.init_weights) == (f"{tmp_path}/runs", f"{tmp_path}/w.pth")
    assert config.allow_missing == ("~a*",), "allow_missing is a pattern, not a path"
    assert parse(LaunchConfig, ["--job-dir=~/jobs"], "x").job_dir == f"{tmp_path}/jobs"
    found = parse(ExtractConfig, ["--query", "~/a.jpg", "--query=b.jpg", "--index=~/v", "--json", "~/r.json"], "x")
    assert found.query == (f"{tmp_path}/a.jpg", "b.jpg")
    assert (found.index, found.json) == (f"{tmp_path}/v", f"{tmp_path}/r.json")
    assert parse(PackConfig, ["~/in", "~/out"], "x").destination == f"{tmp_path}/out"


# ---- positional words, flags of DINO's evaluators, flags of two commands


def test_positional_words_are_accepted_anywhere() -> None:
    typed = "pca a.jpg --images b.jpg --size 64 c.jpg --no-cache d.jpg --images=e.jpg"
    assert parse(VizConfig, typed.split(), "x").images == ("a.jpg", "b.jpg", "c.jpg", "d.jpg", "e.jpg")
    found = parse(RetrievalConfig, ["--threshold", "-1", "duplicates", "--first", "photos"], "x")
    assert (found.protocol, found.threshold, found.first) == ("duplicates", -1, "photos")


@pytest.mark.parametrize(
    ("config", "typed", "words"),
    [
        (KnnConfig, "--ks 10 abc", "ks is 10 abc, expected whole numbers, such as 10 20"),
        (LinearConfig, "--n_last_blocks 4", "unknown flag --n_last_blocks: give --features last4"),
        (LinearConfig, "--avgpool_patchtokens=true", "--avgpool_patchtokens: give --features cls[+]mean"),
        (KnnConfig, "--use_cuda 1", "--use_cuda: give --device cuda"),
        (KnnConfig, "--no-cache --cache-dir d", "cache_dir is d, which has no effect with --no-cache"),
        (PackConfig, "a b --use_fp16", "unknown flag --use_fp16"),
        (RetrievalConfig, "oxford paris --data-path d", "'paris'"),
        (RetrievalConfig, "oxfrod --data-path d", "protocol is oxfrod, expected one of oxford, paris"),
        (VizConfig, "atention a.jpg", "what is atention, expected one of attention, pca"),
        (PackConfig, "a b c", "'c'"),
    ],
)
def test_other_commands_refuse_invalid_command_lines(config: type, typed: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        parse(config, typed.split(), "x")


def test_parse_known_separates_flags_of_two_commands() -> None:
    others = {"arch", "lr", "global_crops_scale"}
    typed = "--nodes=4 --arch x --slurm-additional qos=high mem=2G --lr 1 --gpus_per_node 8 --slurm_additional alone"
    launch, rest = parse_known(LaunchConfig, [*typed.split(), "--use_fp16"], "x", others)
    assert rest == ["--arch", "x", "--lr", "1", "--use_fp16"]
    assert (launch.nodes, launch.gpus_per_node) == (4, 8)
    assert launch.slurm_additional == ("qos=high", "mem=2G", "alone")
    with pytest.raises(InputError, match="--nodes"):
        parse_known(LaunchConfig, ["--node", "2"], "x", others)


# ---- help


def test_help_lists_every_flag_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_pretrain(["--help"])
    assert caught.value.code == 0
    printed = capsys.readouterr().out
    words = " ".join(printed.replace("│", " ").split())
    assert all(f"--{field.name.replace('_', '-')} " in words for field in dataclasses.fields(PretrainConfig))
    shown = [field for field in dataclasses.fields(PretrainConfig) if field.default not in ("", ())]
    assert words.count("(default:") == len(shown)
    assert all(f"(default: {default})" in words for default in ("65536", "0.4 1.0", "True"))


# ---- differences between a checkpoint and a resumed run


def test_differences_list_only_settings_that_change_the_result() -> None:
    config = parsed(*DATA)
    stored: dict[str, Any] = {
        name: list(value) if isinstance(value, tuple) else value for name, value in dataclasses.asdict(config).items()
    }
    assert differences(stored, config) == []
    for field in dataclasses.fields(PretrainConfig):
        other = {**stored, field.name: "something else"}
        found = differences(other, config)
        assert bool(found) is (field.name not in RESUME_SAFE), field.name
        if found:
            assert found[0].startswith(f"{field.name} something else -> ")
    assert RESUME_SAFE.isdisjoint({"lr", "arch", "data_path", "seed", "epochs", "out_dim", "mean"})
    assert {"max_steps", "output_dir", "num_workers"} <= RESUME_SAFE


# ---- error messages and exit codes


def test_run_main_reports_user_errors_and_raises_internal_errors(capsys: pytest.CaptureFixture[str]) -> None:
    def end(error: BaseException) -> object:
        with pytest.raises(SystemExit) as caught:
            run_main(lambda: (_ for _ in ()).throw(error))
        return caught.value.code

    assert end(OSError(28, "No space left on device", "runs/x")) == 2
    assert "no space left" in capsys.readouterr().err
    assert end(InputError("a mistake")) == 2
    assert end(KeyboardInterrupt()) == 130
    with pytest.raises(RuntimeError, match="ours"):
        end(RuntimeError("a fault of ours"))
    run_main(lambda: None)


# ---- repeated flags and settings


@pytest.mark.parametrize(
    ("config", "typed", "name", "value"),
    [
        (KnnConfig, "--weights a --pretrained_weights b", "weights", "b"),
        (KnnConfig, "--ks 10 --nb_knn 20 30", "ks", (20, 30)),
        (KnnConfig, "--cache --no-cache", "cache", False),
        (ExtractConfig, "--query a --index i --query b", "query", ("a", "b")),
    ],
)
def test_repeated_flag_takes_last_value_unless_repeatable(config: type, typed: str, name: str, value: object) -> None:
    assert getattr(parse(config, typed.split(), "x"), name) == value


def test_repeated_setting_in_config_file_takes_last_value(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("lr: 1\nout_dim: 9\nout-dim: 8\nlr: 2\nallow_missing: []\n")
    config = parsed(*DATA, "--config", str(file))
    assert (config.lr, config.out_dim, config.allow_missing) == (2, 8, ())
