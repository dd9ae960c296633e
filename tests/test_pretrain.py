"""The command line of run_pretrain.py: output, exit code and files."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from pretrain_fixtures import SMALL, STEPS_AN_EPOCH, Stopped, pretrain_here
from ranks import ENVIRONMENT, PRETRAIN, state_in
from run_here import Outcome
from tiny_run import differing_bits

from dino_xcit import safe_load
from dino_xcit.checkpoint.folder import BEST, CheckpointFolder
from dino_xcit.metrics import read_metrics
from dino_xcit.runtime.logging import logger

# ---- runs in this process


def test_two_step_run_prints_setup_and_writes_checkpoint(stopped: Stopped, labelled_photos: Path) -> None:
    assert stopped.ended.code == 0, stopped.ended.err
    assert str(labelled_photos) in stopped.ended.out.splitlines()[0]
    assert "16 images" in stopped.ended.out
    assert "1 process on cpu in float32" in stopped.ended.out
    assert "warmup_epochs" in stopped.ended.out  # warning: 10 warm-up epochs in a run of 3 are shortened
    content = safe_load.read(stopped.folder / "checkpoint.pth")
    assert content["step"] == 2
    assert content["args"]["max_steps"] == 2
    assert content["args"]["data_path"] == str(labelled_photos)
    assert [path.name for path in stopped.folder.glob(".*")] == [".lock"]


def test_run_writes_metrics_tensorboard_and_report(stopped: Stopped) -> None:
    records = read_metrics(stopped.folder / "metrics.jsonl")
    kinds = [(record["kind"], record["step"]) for record in records]
    assert kinds == [("run", 0), ("step", 1), ("step", 2), ("end", 2)]
    records = records[1:]
    of_the_method = {"loss", "teacher_entropy", "kl", "feature_std"}
    assert of_the_method | {"images_per_s", "data_wait", "lr", "skipped_steps"} <= records[0].keys()
    assert of_the_method <= records[2].keys()
    assert list((stopped.folder / "tensorboard").iterdir())
    assert "uPlot" in (stopped.folder / "report.html").read_text()


def test_quiet_run_prints_nothing(labelled_photos: Path, tmp_path: Path) -> None:
    flags = ("--quiet", "--warmup-epochs", 0, "--max-steps", 1, "--data-path", labelled_photos)
    try:
        done = pretrain_here(*SMALL, *flags, "--output-dir", tmp_path / "run")
    finally:
        logger.setLevel("INFO")
    assert (done.code, done.out, done.err) == (0, "", "")


def test_resumed_run_matches_uninterrupted_run_with_knn_evaluation(stopped: Stopped, tmp_path: Path) -> None:
    """Evaluation, kept checkpoints and loader workers in the uninterrupted run do not change training."""
    folder, flags = stopped.copy(tmp_path / "resumed")
    resumed = pretrain_here(*flags)
    assert resumed.code == 0, resumed.err
    assert "after step 2" in resumed.out
    straight = tmp_path / "straight"
    whole = pretrain_here(
        *flags, "--output-dir", straight, "--knn-every", "1", "--saveckp-freq", "2", "--num-workers", "2"
    )
    assert whole.code == 0, whole.err
    assert differing_bits(state_in(folder), state_in(straight)) == []
    assert int(state_in(folder)["/step"]) == 3 * STEPS_AN_EPOCH

    # Both runs log the same losses, without missing or repeated steps.
    def losses(run: Path) -> dict[int, float]:
        steps = [record for record in read_metrics(run / "metrics.jsonl") if record["kind"] == "step"]
        assert [record["step"] for record in steps] == list(range(1, 13))
        return {record["step"]: record["loss"] for record in steps}

    assert losses(folder) == losses(straight)
    epochs = [record for record in read_metrics(straight / "metrics.jsonl") if record["kind"] == "epoch"]
    assert [record["step"] for record in epochs] == [4, 8, 12]
    assert all(0 <= record["knn_top1"] <= 100 for record in epochs)
    assert "knn top1" in whole.out
    names = ["backbone.pth", "best-labelfree.pth", "best.pth", "checkpoint.pth"]
    assert sorted(p.name for p in straight.glob("*.pth")) == names
    manifests = {manifest.step: manifest for manifest in CheckpointFolder(straight).manifests()}
    assert {8, 12} <= manifests.keys() <= {4, 8, 12}  # 8 by --saveckp-freq, 12 as the newest, 4 if it is a best one
    assert manifests[8].keep
    measured = {record["step"]: record["knn_top1"] for record in epochs}
    assert all(manifest.scores[BEST].value == measured[step] for step, manifest in manifests.items())
    best = safe_load.read(straight / "best.pth")["step"]
    assert measured[best] == max(measured.values())


def test_run_without_data_path_uses_sample_and_reports_it_first(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    ended = pretrain_here("--max-steps", "1", "--batch-size-per-gpu", "4", "--knn-every", "0", "--output-dir", folder)
    assert ended.code == 0, ended.err
    assert "no --data-path" in ended.out.splitlines()[0]
    assert "12,000 images" in ended.out
    assert safe_load.read(folder / "checkpoint.pth")["args"]["data_path"] == "sample:fashion-mnist"


# ---- the script in a separate process


def test_script_in_another_directory_refuses_misspelt_arch(tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, PRETRAIN, "--arch", "xcit_smal_12_p16"],
        cwd=tmp_path,
        env={key: value for key, value in ENVIRONMENT.items() if key != "PYTHONPATH"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    Outcome(ended.returncode, ended.stdout, ended.stderr).assert_refused("xcit_small_12_p16")
    assert "sample" in ended.stdout.splitlines()[0]
