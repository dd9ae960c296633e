"""run_pretrain.py as a user runs it: a process, its output, its exit code and its files."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from pretrain_fixtures import SMALL, STEPS_AN_EPOCH, Ended, Pretrain, Stopped, files_of, learnt_in
from ranks import ENVIRONMENT, PRETRAIN, torchrun
from tiny_run import differing_bits, tensors_of, tiny_config

from dino_xcit import safe_load
from dino_xcit.checkpoint.folder import CheckpointFolder
from dino_xcit.checkpoint.resume import starts_anew
from dino_xcit.runtime.metrics import read_metrics

# ---- a run


def test_a_run_of_two_steps_ends_with_a_complete_checkpoint(stopped: Stopped, labelled_photos: Path) -> None:
    assert stopped.ended.code == 0, stopped.ended.err
    first = stopped.ended.out.splitlines()[0]
    assert "dino" in first
    assert str(labelled_photos) in first
    assert "16 images" in stopped.ended.out
    assert "warmup_epochs" in stopped.ended.out  # ten epochs of warm-up in a run of three: shortened, with a notice
    content = safe_load.read(stopped.folder / "checkpoint.pth")
    assert content["step"] == 2
    assert content["args"]["max_steps"] == 2
    assert content["args"]["data_path"] == str(labelled_photos)
    backbone = torch.load(stopped.folder / "backbone.pth", weights_only=True)
    teacher = {k.removeprefix("backbone."): v for k, v in content["teacher"].items() if k.startswith("backbone.")}
    assert differing_bits(tensors_of(backbone), tensors_of(teacher)) == []
    assert [path.name for path in stopped.folder.glob(".*")] == [".lock"]


def test_a_run_writes_metrics_tensorboard_and_curves(stopped: Stopped) -> None:
    records = read_metrics(stopped.folder / "metrics.jsonl")
    assert [(record["kind"], record["step"]) for record in records] == [("step", 1), ("step", 2), ("end", 2)]
    for name in ("loss", "teacher_entropy", "kl", "feature_std", "images_per_s", "data_wait", "lr", "skipped_steps"):
        assert name in records[0]
    assert {"loss", "teacher_entropy", "kl", "feature_std"} <= records[2].keys()
    assert list((stopped.folder / "tensorboard").iterdir())
    assert Image.open(stopped.folder / "curves.png").size[0] > 300


def test_progress_shows_the_time_left_and_each_epoch_has_a_line(stopped: Stopped) -> None:
    assert "ETA" in stopped.ended.err
    (line,) = [line for line in stopped.ended.out.splitlines() if line.startswith("epoch 1/3")]
    assert "loss" in line
    assert "teacher entropy" in line


def test_the_same_command_again_says_complete_and_touches_nothing(
    pretrain: Pretrain, stopped: Stopped, tmp_path: Path
) -> None:
    folder, flags = stopped.copy(tmp_path / "run")
    before = files_of(folder)
    again = pretrain("--max-steps", "2", *flags)
    assert again.code == 0
    assert "complete" in again.out
    assert files_of(folder) == before


def test_a_resumed_run_equals_an_uninterrupted_one_that_was_measured_on_the_way(
    pretrain: Pretrain, stopped: Stopped, tmp_path: Path
) -> None:
    folder, flags = stopped.copy(tmp_path / "resumed")
    resumed = pretrain(*flags)
    assert resumed.code == 0, resumed.err
    assert "after step 2" in resumed.out
    straight = tmp_path / "straight"
    whole = pretrain(*flags, "--output-dir", straight, "--knn-every", "1", "--saveckp-freq", "2", "--num-workers", "2")
    assert whole.code == 0, whole.err
    assert differing_bits(learnt_in(folder), learnt_in(straight)) == []
    assert int(learnt_in(folder)["/step"]) == 3 * STEPS_AN_EPOCH

    # The metrics of the interrupted run are those of the other: the truth has no gap and no step twice.
    def losses(run: Path) -> dict[int, float]:
        steps = [record for record in read_metrics(run / "metrics.jsonl") if record["kind"] == "step"]
        assert [record["step"] for record in steps] == list(range(1, 13))
        return {record["step"]: record["loss"] for record in steps}

    assert losses(folder) == losses(straight)
    epochs = [record for record in read_metrics(straight / "metrics.jsonl") if record["kind"] == "epoch"]
    assert [record["step"] for record in epochs] == [4, 8, 12]
    assert all(0 <= record["knn_top1"] <= 100 for record in epochs)
    assert "knn top1" in whole.out
    assert sorted(p.name for p in straight.glob("*.pth")) == ["backbone.pth", "best.pth", "checkpoint.pth"]
    manifests = {manifest.step: manifest for manifest in CheckpointFolder(straight).manifests()}
    assert {8, 12} <= manifests.keys() <= {4, 8, 12}  # 8 of --saveckp-freq, 12 as the newest, 4 if it is the best
    assert manifests[8].keep
    measured = {record["step"]: record["knn_top1"] for record in epochs}
    assert all(manifest.metric == measured[step] for step, manifest in manifests.items())
    best = safe_load.read(straight / "best.pth")["step"]
    assert measured[best] == max(measured.values())


def test_a_run_killed_between_checkpoints_continues_from_the_last(
    pretrain: Pretrain, stopped: Stopped, tmp_path: Path
) -> None:
    """Metrics of steps that came after the checkpoint, a line cut short and a half-written file do no harm."""
    folder, flags = stopped.copy(tmp_path / "run")
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"kind": "step", "step": 3, "loss": 123.0}) + '\n{"kind": "step", "st')
    (folder / ".checkpoint.pth.tmp").write_bytes(b"half a file")
    ended = pretrain(*flags, "--max-steps", "3")
    assert ended.code == 0, ended.err
    steps = [r for r in read_metrics(folder / "metrics.jsonl") if r["kind"] == "step"]
    assert [record["step"] for record in steps] == [1, 2, 3]
    assert steps[-1]["loss"] != 123.0
    assert not (folder / ".checkpoint.pth.tmp").exists()


def test_save_every_writes_within_an_epoch(pretrain: Pretrain, stopped: Stopped, tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for index in range(16):
        Image.new("RGB", (20, 20), (index * 15, 0, 0)).save(images / f"{index:02d}.png")
    folder = tmp_path / "run"
    flags = ["--save-every", "2", "--keep-last", "9", "--max-steps", "7"]
    assert pretrain("--data-path", images, *SMALL, "--output-dir", folder, *flags).code == 0
    assert [manifest.step for manifest in CheckpointFolder(folder).manifests()] == [7, 6, 4, 2]


def test_the_sample_is_used_without_a_data_path_and_the_first_line_says_so(pretrain: Pretrain, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    ended = pretrain("--max-steps", "1", "--batch-size-per-gpu", "4", "--knn-every", "0", "--output-dir", folder)
    assert ended.code == 0, ended.err
    assert "sample" in ended.out.splitlines()[0]
    assert "no --data-path" in ended.out.splitlines()[0]
    assert "12,000 images" in ended.out
    assert safe_load.read(folder / "checkpoint.pth")["args"]["data_path"] == "sample:fashion-mnist"


def test_the_knn_while_training_leaves_out_what_cannot_be_read(
    pretrain: Pretrain, labelled_photos: Path, tmp_path: Path
) -> None:
    shutil.copytree(labelled_photos, tmp_path / "photos")
    for broken in ("train/dark/3.png", "val/bright/1.png"):
        (tmp_path / "photos" / broken).write_bytes(b"<html>gone</html>")
    flags = [*SMALL, "--knn-every", "1", "--epochs", "1", "--output-dir", tmp_path / "run"]
    ended = pretrain("--data-path", tmp_path / "photos", *flags, "--max-unreadable", "0.1")
    assert ended.code == 0, ended.err
    assert "knn top1" in ended.out
    (epoch,) = [record for record in read_metrics(tmp_path / "run" / "metrics.jsonl") if record["kind"] == "epoch"]
    assert round(epoch["knn_top1"] * 3) in (0, 100, 200, 300)  # of three that can be read


def test_a_start_after_a_failure_never_forgets_what_resume_never_forgot_at_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = tiny_config(resume="never")
    for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"):
        with monkeypatch.context() as environment:
            assert starts_anew(config)
            environment.setenv(name, "0")
            assert starts_anew(config)
            environment.setenv(name, "1")
            assert not starts_anew(config)


def test_a_mistake_beside_resume_never_costs_nothing(pretrain: Pretrain, stopped: Stopped, tmp_path: Path) -> None:
    folder, flags = stopped.copy(tmp_path / "run")
    before = files_of(folder)
    pretrain(*flags, "--resume", "never", "--data-path", "absent").assert_refused("absent")
    assert files_of(folder) == before


# ---- as processes of their own


def test_the_plain_command_works_from_another_directory(tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, PRETRAIN, "--arch", "xcit_smal_12_p16"],
        cwd=tmp_path,
        env={key: value for key, value in ENVIRONMENT.items() if key != "PYTHONPATH"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    Ended(ended.returncode, ended.stdout, ended.stderr).assert_refused("xcit_small_12_p16")
    assert "sample" in ended.stdout.splitlines()[0]


def test_torchrun_with_two_processes_learns_what_one_learns(
    pretrain: Pretrain, labelled_photos: Path, tmp_path: Path
) -> None:
    flags = ["--data-path", labelled_photos, *SMALL, "--batch-size-per-gpu", "2", "--optimizer", "sgd"]
    flags += ["--warmup-epochs", "0", "--max-steps", "3", "--save-every", "2"]
    job = torchrun(tmp_path / "two", *flags)
    out, err = job.communicate(timeout=240)
    assert job.returncode == 0, err
    assert "2 processes" in out
    assert out.count("16 images") == 1  # one of them speaks
    one = pretrain(*flags, "--accumulation-steps", "2", "--output-dir", tmp_path / "one")
    assert one.code == 0, one.err
    networks = [learnt_in(tmp_path / name) for name in ("one", "two")]
    for path, value in networks[0].items():
        if path.startswith(("/student", "/teacher", "/dino_loss")) and "running_" not in path and "tracked" not in path:
            torch.testing.assert_close(networks[1][path], value, rtol=1e-4, atol=1e-6, msg=path)
