"""Settings and output directories that run_pretrain.py refuses or resumes, without loss of existing files."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from pretrain_fixtures import SMALL, Stopped, files_of, pretrain_here
from ranks import state_in
from run_here import Outcome
from tiny_run import CPU, differing_bits, tiny_config

from dino_xcit import safe_load
from dino_xcit.checkpoint.folder import CheckpointFolder
from dino_xcit.checkpoint.resume import find_stored, output_folder, prepare, starts_anew
from dino_xcit.errors import DIVERGED, InputError, RunStopped
from dino_xcit.health import Health, UnreadableLog
from dino_xcit.metrics import read_metrics
from dino_xcit.runtime.run_lock import locked
from dino_xcit.train import build_state
from run_pretrain import train


@dataclass
class Folder:
    """An output directory and the flags of its run. A call with further flags runs run_pretrain.py."""

    path: Path
    flags: list[Any]

    def __call__(self, *flags: object) -> Outcome:
        return pretrain_here(*self.flags, *flags)

    def steps(self) -> list[int]:
        return [row["step"] for row in read_metrics(self.path / "metrics.jsonl") if row["kind"] == "step"]

    def assert_refused_untouched(self, flags: Sequence[object], *words: str) -> None:
        """Check that the run is refused with these words and that the folder is unchanged."""
        before = files_of(self.path)
        self(*flags).assert_refused(*words)
        assert files_of(self.path) == before


@pytest.fixture
def fresh(labelled_photos: Path, tmp_path: Path) -> Folder:
    """A run over 16 images in batches of 4, before its start."""
    folder = tmp_path / "run"
    return Folder(folder, ["--data-path", labelled_photos, *SMALL, "--output-dir", folder])


@pytest.fixture
def begun(stopped: Stopped, tmp_path: Path) -> Folder:
    """The same run after two steps."""
    return Folder(*stopped.copy(tmp_path / "run"))


@pytest.mark.parametrize(
    "typed",
    {
        "--lr 0.3": "lr 0.0005 -> 0.3",
        "--out-dim 17": "out_dim 16 -> 17",
        "--resume changed --optimizer sgd": "(optimizer adamw -> sgd)",
        "--resume changed --out-dim 17": "(out_dim 16 -> 17)",
        "--resume changed --arch xcit_pico_4_p8": "(arch xcit_pico_4_p4 -> xcit_pico_4_p8)",
        "--resume changed --norm-last-layer false": "(norm_last_layer true -> false)",
        "--resume never --num-workers 5000": "num_workers is 5000",
        "--resume never --data-path absent": "absent",
    }.items(),
    ids=" ".join,
)  # fmt: skip
def test_changed_or_invalid_settings_are_refused_without_file_changes(begun: Folder, typed: tuple[str, str]) -> None:
    begun.assert_refused_untouched([*typed[0].split(), "--max-steps", "3"], typed[1])


def test_augmentation_on_a_gpu_is_refused_without_one(begun: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    knobs = pytest.importorskip("triton").knobs
    monkeypatch.setattr(knobs.runtime, "interpret", False)
    begun.assert_refused_untouched(["--resume", "never", "--augment-device", "cuda"], "augment_device cuda needs a GPU")


def test_locked_output_directory_is_refused_without_file_changes(begun: Folder) -> None:
    with locked(begun.path):
        begun.assert_refused_untouched([], f"process {os.getpid()} ", "--output-dir")


def test_unwritable_output_directory_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)  # root can write to every folder
    with pytest.raises(InputError, match="cannot write to the output directory"), output_folder(tmp_path):
        pass


def test_changed_images_under_same_path_are_refused(fresh: Folder, labelled_photos: Path, tmp_path: Path) -> None:
    """A changed image shifts the indices of later ones: an epoch would use some images twice and others never."""
    images = shutil.copytree(labelled_photos, tmp_path / "photos")
    assert fresh("--data-path", images, "--max-steps", "1").code == 0
    (images / "train" / "dark" / "0.png").rename(images / "train" / "dark" / "9.png")
    fresh.assert_refused_untouched(["--data-path", images], "16 images", "--resume changed")


def test_run_with_changed_global_batch_is_refused_at_equal_epoch_length(fresh: Folder) -> None:
    """16 images give 2 steps with a batch of 8 or 7, but learning rate and images of each step differ."""
    assert fresh("--batch-size-per-gpu", "8", "--max-steps", "1").code == 0
    fresh.assert_refused_untouched(["--batch-size-per-gpu", "7"], "batch")


def test_run_resumes_with_accumulation_at_same_global_batch(begun: Folder) -> None:
    ended = begun("--batch-size-per-gpu", "2", "--accumulation-steps", "2", "--max-steps", "3")
    assert ended.code == 0, ended.err
    assert "after step 2" in ended.out


def test_resume_changed_mode_continues_and_never_mode_starts_over(begun: Folder, stopped: Stopped) -> None:
    changed = begun("--lr", "0.3", "--resume", "changed", "--max-steps", "3")
    assert changed.code == 0, changed.err
    assert "after step 2" in changed.out
    content = safe_load.read(begun.path / "checkpoint.pth")
    assert (content["step"], content["args"]["lr"]) == (3, 0.3)

    anew = begun("--resume", "never", "--max-steps", "2")
    assert anew.code == 0, anew.err
    assert "after step" not in anew.out
    assert differing_bits(state_in(begun.path), state_in(stopped.folder)) == []
    assert begun.steps() == [1, 2]


@pytest.mark.parametrize(("batch", "step"), [(8, 3), (2, 12)])
def test_resume_with_changed_batch_size_keeps_epoch_position(begun: Folder, batch: int, step: int) -> None:
    """16 images in batches of 4 give 4 steps per epoch; the run stops after 6 steps."""
    assert begun("--max-steps", "6", "--saveckp-freq", "1").code == 0
    other = ["--batch-size-per-gpu", batch, "--saveckp-freq", "1"]
    resumed = begun(*other, "--resume", "changed", "--max-steps", step + 1)
    assert resumed.code == 0, resumed.err
    assert f"step 6, 1.50 epochs, is now {step}" in resumed.out
    again = begun(*other, "--max-steps", step + 2)
    assert f"after step {step + 1} of" in again.out  # resumes from its own checkpoint, not from the old step 6
    kept = {path.name for path in (begun.path / "checkpoints").iterdir()}
    earlier = "step00000004-4.pth" if batch == 8 else "step00000004.pth"  # batch 8 saves its own step 4
    assert earlier in kept
    steps = begun.steps()
    assert steps == sorted(steps)
    assert steps[-2:] == [step + 1, step + 2]


@pytest.mark.parametrize("last", [1, 2])
def test_complete_run_prints_reason_and_next_command_and_keeps_files(begun: Folder, last: int) -> None:
    before = files_of(begun.path)
    ended = begun("--max-steps", last)
    assert ended.code == 0
    assert f"already complete: {begun.path} is at step 2, and this run ends after step {last}" in ended.out
    assert "resuming" not in ended.out
    assert f"next: python run_knn.py --weights {begun.path / 'checkpoint.pth'}" in ended.out
    assert files_of(begun.path) == before


def test_init_weights_are_read_at_start_and_not_on_resume(fresh: Folder, stopped: Stopped, tmp_path: Path) -> None:
    source = tmp_path / "weights.pth"
    shutil.copy(stopped.folder / "checkpoint.pth", source)
    initial = ["--init-weights", source]
    refused = fresh(*initial, "--arch", "xcit_pico_4_p8")
    refused.assert_refused("a xcit_pico_4_p4, but arch is xcit_pico_4_p8")
    ended = fresh(*initial, "--max-steps", "1")
    assert ended.code == 0, ended.err
    assert f"starting from teacher xcit_pico_4_p4 of {source}" in ended.out
    assert "heads too" in ended.out
    content, before = (safe_load.read(path) for path in (fresh.path / "checkpoint.pth", source))
    assert (content["step"], content["args"]["init_weights"]) == (1, str(source))
    # The learning rate of the first step is 0, so the student still has its initial weights.
    weights = [key for key in content["student"] if not key.endswith(("running_mean", "running_var", "tracked"))]
    assert len(weights) > 50
    assert all(torch.equal(content["student"][key], before["teacher"][key]) for key in weights)

    source.unlink()
    resumed = fresh(*initial, "--max-steps", "2")
    assert resumed.code == 0, resumed.err
    assert "after step 1 of 2; the initial weights are not loaded again" in resumed.out
    fresh("--max-steps", "3").assert_refused(f"init_weights {source} -> ")
    fresh(*initial, "--resume", "never").assert_refused(f"there is no file {source}")
    assert safe_load.read(fresh.path / "checkpoint.pth")["step"] == 2


def test_foreign_checkpoint_is_refused_and_kept(fresh: Folder) -> None:
    fresh.path.mkdir()
    torch.save({"model": {"weight": torch.zeros(3)}}, fresh.path / "checkpoint.pth")
    fresh.assert_refused_untouched([], "its format is None")


UNUSABLE = {
    "--data-path absent": "absent",
    "--data-path EMPTY": "no image",
    "--data-path EMPTY/one.png": "no data",
    "--data-path absent --arch xcit_smal_12_p16": "xcit_small_12_p16",
    "--data-path PHOTOS --arch timm:resnet81": "resnet18",
    "--data-path PHOTOS --batch-size-per-gpu 17": "16 training images",
    "--data-path PHOTOS --output-dir EMPTY/file/run": "output directory",
    "--data-path PHOTOS --output-dir EMPTY/file": "file is not a folder: choose",
    "--data-path PHOTOS/val/dark --batch-size-per-gpu 2 --knn-every 1": "--train-data",
    "--data-path PHOTOS --batch-size-per-gpu 1 --local-crops-size 4": "crop",
    "--data-path PHOTOS --val-data PHOTOS/val": "knn_every is 0",
    "--data-path PHOTOS --train-data x --knn-every 1 --knn-holdout 4": "knn_holdout is 4",
}  # fmt: skip


@pytest.mark.parametrize("typed", UNUSABLE)
def test_unusable_settings_are_refused_in_one_sentence(
    fresh: Folder, labelled_photos: Path, tmp_path: Path, typed: str
) -> None:
    (tmp_path / "file").write_text("in the way")
    flags = typed.replace("PHOTOS", str(labelled_photos)).replace("EMPTY", str(tmp_path)).split()
    fresh(*flags).assert_refused(UNUSABLE[typed])
    assert not list(tmp_path.rglob("*.pth"))


@pytest.mark.parametrize("name", ["TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"])
def test_restart_starts_anew_until_old_checkpoints_are_cleared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    config, folder = tiny_config(resume="never", output_dir=str(tmp_path)), CheckpointFolder(tmp_path)
    folder.latest.write_bytes(b"another run")
    first = find_stored(config, folder)
    monkeypatch.setenv(name, "1")
    assert not first
    assert not find_stored(config, folder)
    prepare(config, folder, first)
    assert not folder.latest.exists()
    assert not starts_anew(config)


@pytest.mark.parametrize(
    ("precision", "scale", "words"),
    [
        ("fp16", 4096.0, r"fp16 is settling \(now 4096\)"),
        ("fp16", 0.5, "including the last 3: lower --lr"),
        ("fp32", 1.0, "including the last 3: lower --lr"),
    ],
)
def test_health_finish_raises_if_all_steps_skipped_and_warns_if_some(
    precision: str, scale: float, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(precision=precision, output_dir=str(tmp_path))
    state = build_state(config, CPU)
    state.scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=precision == "fp16")
    state.step = 3
    state.skipped_steps += 3
    state.skipped_in_a_row += 3
    with Health(config, CPU) as health:
        health._unreadable = UnreadableLog(tmp_path, 48, 0.05, start_anew=True)
        with pytest.raises(RunStopped, match=words) as ended:
            health.finish(state)
        assert ended.value.code == DIVERGED
        state.step = 4
        health.finish(state)
    assert re.search(f"warning: 3 steps of 4 .*{words}", capsys.readouterr().out)


def test_unknown_arch_is_refused_before_data_is_opened(tmp_path: Path) -> None:
    config = tiny_config(arch="xcit_pico_4_p3", data_path=str(tmp_path / "absent"), output_dir=str(tmp_path / "run"))
    with pytest.raises(InputError, match="unknown arch 'xcit_pico_4_p3'"):
        train(config, CPU)
