"""run_pretrain.py as a user runs it: a process, its output, its exit code and its files."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from last_words import last_words
from PIL import Image
from tiny_run import differing_bits, tensors_of, tiny_config

from dino_xcit import safe_load
from dino_xcit.errors import InputError
from dino_xcit.metrics import read_metrics
from dino_xcit.reliability.checkpoint_folder import CheckpointFolder
from dino_xcit.reliability.resume import output_folder, starts_anew

HERE = Path(__file__).parent
ENVIRONMENT = os.environ | {
    "PYTHONPATH": str(HERE.parent),
    "OMP_NUM_THREADS": "1",
    "MPLBACKEND": "Agg",
}
SMALL = [
    "--arch", "xcit_pico_4_p4", "--out-dim", "16", "--head-hidden-dim", "16", "--head-bottleneck-dim", "8",
    "--global-crops-size", "16", "--local-crops-size", "8", "--local-crops-number", "1", "--batch-size-per-gpu", "4",
    "--epochs", "3", "--num-workers", "0", "--device", "cpu", "--knn-every", "0", "--log-every", "1",
]  # fmt: skip
STEPS_AN_EPOCH = 4


@dataclass
class Ended:
    """A run that is over."""

    code: int
    out: str
    err: str

    def assert_refused(self, *words: str) -> None:
        """Exit code 2, and one sentence with these words as the last line of stderr."""
        assert "Traceback" not in self.err
        last = self.err.strip().splitlines()[-1]
        assert last.startswith("error: "), self.err
        for word in words:
            assert word in last
        assert self.code == 2


Pretrain = Callable[..., Ended]


@pytest.fixture(scope="module")
def pretrain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pretrain]:
    """``pretrain(*flags)`` runs the command in a process of its own, in an empty directory of this module."""
    folder = tmp_path_factory.mktemp("pretrain")
    server = subprocess.Popen(
        [sys.executable, str(HERE / "forking_server.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=ENVIRONMENT,
        text=True,
    )
    assert server.stdin is not None
    assert server.stdout is not None
    stdin, stdout = server.stdin, server.stdout

    def run(*argv: str | Path) -> Ended:
        request = {
            "argv": last_words(argv),
            "cwd": str(folder),
            "out": str(folder / "out"),
            "err": str(folder / "err"),
        }
        stdin.write(json.dumps(request) + "\n")
        stdin.flush()
        code = json.loads(stdout.readline())
        return Ended(code, (folder / "out").read_text(), (folder / "err").read_text())

    yield run
    stdin.close()
    server.wait(timeout=20)
    stdout.close()


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DIR/train and DIR/val with two classes: 16 and 4 pictures."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for part, count in (("train", 8), ("val", 2)):
        for number, name in enumerate(("dark", "bright")):
            (folder / part / name).mkdir(parents=True)
            for index in range(count):
                pixels = rng.integers(120 * number, 120 * number + 120, (24, 20, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / part / name / f"{index}.png")
    return folder


def files_of(folder: Path) -> dict[str, tuple[str, int]]:
    """Content and time of every file below a folder; but for the lock, which says who was there last."""
    return {
        str(path.relative_to(folder)): (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def learnt_in(folder: Path) -> dict[str, torch.Tensor]:
    content = torch.load(folder / "checkpoint.pth", weights_only=True)
    return tensors_of({name: content[name] for name in ("student", "teacher", "optimizer", "dino_loss", "step")})


@dataclass
class Stopped:
    """A run that was stopped after two steps."""

    folder: Path
    flags: list[Any]
    ended: Ended

    def copy(self, to: Path) -> tuple[Path, list[Any]]:
        """The same run in another directory, and the flags that continue it there."""
        shutil.copytree(self.folder, to)
        return to, [*self.flags[:-1], to]


@pytest.fixture(scope="module")
def stopped(pretrain: Pretrain, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Stopped:
    folder = tmp_path_factory.mktemp("stopped") / "run"
    flags = ["--data-path", photos, *SMALL, "--output-dir", folder]
    return Stopped(folder, flags, pretrain("--max-steps", "2", *flags))


# ---- a run


def test_a_run_of_two_steps_ends_with_a_complete_checkpoint(stopped: Stopped, photos: Path) -> None:
    assert stopped.ended.code == 0, stopped.ended.err
    first = stopped.ended.out.splitlines()[0]
    assert "dino" in first
    assert str(photos) in first
    assert "16 images" in stopped.ended.out
    assert "warmup_epochs" in stopped.ended.out  # ten epochs of warm-up in a run of three: shortened, with a notice
    content = safe_load.read(stopped.folder / "checkpoint.pth")
    assert content["step"] == 2
    assert content["args"]["max_steps"] == 2
    assert content["args"]["data_path"] == str(photos)
    backbone = torch.load(stopped.folder / "backbone.pth", weights_only=True)
    teacher = {k.removeprefix("backbone."): v for k, v in content["teacher"].items() if k.startswith("backbone.")}
    assert differing_bits(tensors_of(backbone), tensors_of(teacher)) == []
    assert [path.name for path in stopped.folder.glob(".*")] == [".lock"]


def test_a_run_writes_metrics_tensorboard_and_curves(stopped: Stopped) -> None:
    records = read_metrics(stopped.folder / "metrics.jsonl")
    assert [(record["kind"], record["step"]) for record in records] == [("step", 1), ("step", 2), ("end", 2)]
    for name in ("loss", "teacher_entropy", "kl", "feature_std", "images_per_s", "data_wait", "lr", "rejected_steps"):
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
    assert all(manifest.knn_top1 == measured[step] for step, manifest in manifests.items())
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


def test_an_official_architecture_runs_on_the_sample(pretrain: Pretrain, tmp_path: Path) -> None:
    ended = pretrain(
        "--arch", "xcit_nano_12_p16", "--max-steps", "1", "--batch-size-per-gpu", "4", "--knn-every", "0",
        "--output-dir", tmp_path / "run",
    )  # fmt: skip
    assert ended.code == 0, ended.err


def test_flat_folders_and_lists_need_no_labels(pretrain: Pretrain, photos: Path, tmp_path: Path) -> None:
    listed = tmp_path / "list.txt"
    listed.write_text("\n".join(str(path) for path in sorted(photos.rglob("*.png"))))
    ended = pretrain("--data-path", listed, *SMALL, "--max-steps", "1", "--output-dir", tmp_path / "run")
    assert ended.code == 0, ended.err
    assert "20 images" in ended.out


def test_help_ends_well(pretrain: Pretrain) -> None:
    ended = pretrain("--help")
    assert ended.code == 0
    assert "--global" in ended.out


def test_the_knn_while_training_leaves_out_what_cannot_be_read(
    pretrain: Pretrain, photos: Path, tmp_path: Path
) -> None:
    shutil.copytree(photos, tmp_path / "photos")
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


# ---- refusals, which lose nothing


@pytest.mark.parametrize(
    ("changed", "word"),
    [
        (["--lr", "0.3"], "lr 0.0005 -> 0.3"),
        (["--out-dim", "17"], "out_dim 16 -> 17"),
        (["--arch", "xcit_nano_12_p4"], "arch"),
        (["--batch-size-per-gpu", "5"], "batch"),  # 3 steps an epoch, not 4
    ],
)
def test_an_output_directory_of_another_run_is_refused_untouched(
    pretrain: Pretrain, stopped: Stopped, tmp_path: Path, changed: list[str], word: str
) -> None:
    folder, flags = stopped.copy(tmp_path / "run")
    before = files_of(folder)
    pretrain(*flags, *changed).assert_refused(word, "--output-dir", "--resume")
    assert files_of(folder) == before


def test_an_output_directory_that_cannot_be_written_to_is_refused_before_the_first_step(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)  # as root every folder can be written to
    with pytest.raises(InputError, match="cannot write to the output directory"), output_folder(tmp_path):
        pass


def test_the_next_command_fits_the_data(pretrain: Pretrain, photos: Path, tmp_path: Path) -> None:
    """Images without labels cannot be measured with k-NN: there the next thing is to extract."""
    flags = [*SMALL, "--batch-size-per-gpu", "4", "--max-steps", "1"]
    heap = pretrain("--data-path", photos / "train" / "dark", *flags, "--output-dir", tmp_path / "heap")
    assert heap.code == 0
    assert "next: python run_extract.py" in heap.out + heap.err
    classes = pretrain("--data-path", photos, *flags, "--output-dir", tmp_path / "classes")
    assert "next: python run_knn.py" in classes.out + classes.err


def test_other_images_under_the_same_path_are_refused_and_named(
    pretrain: Pretrain, photos: Path, tmp_path: Path
) -> None:
    """Another image shifts the numbers of those behind it, so that an epoch would see some twice and others never."""
    images = tmp_path / "photos"
    shutil.copytree(photos, images)
    flags = ["--data-path", images, *SMALL, "--output-dir", tmp_path / "run"]
    assert pretrain(*flags, "--max-steps", "1").code == 0
    (images / "train" / "dark" / "0.png").rename(images / "train" / "dark" / "9.png")
    before = files_of(tmp_path / "run")
    pretrain(*flags, "--max-steps", "2").assert_refused("other images", "16 images", "--resume changed")
    assert files_of(tmp_path / "run") == before
    assert pretrain(*flags, "--max-steps", "2", "--resume", "changed").code == 0


def test_another_global_batch_is_refused_even_where_an_epoch_has_as_many_steps(
    pretrain: Pretrain, photos: Path, tmp_path: Path
) -> None:
    """16 images are 2 steps of 8 and 2 steps of 7; the learning rate and the images of each step differ."""
    flags = ["--data-path", photos, *SMALL, "--output-dir", tmp_path / "run"]
    assert pretrain(*flags, "--batch-size-per-gpu", "8", "--max-steps", "1").code == 0
    before = files_of(tmp_path / "run")
    pretrain(*flags, "--batch-size-per-gpu", "7").assert_refused("batch")
    assert files_of(tmp_path / "run") == before


def test_the_same_global_batch_in_smaller_passes_is_the_same_run(
    pretrain: Pretrain, stopped: Stopped, tmp_path: Path
) -> None:
    _, flags = stopped.copy(tmp_path / "run")
    ended = pretrain(*flags, "--batch-size-per-gpu", "2", "--accumulation-steps", "2", "--max-steps", "3")
    assert ended.code == 0, ended.err
    assert "after step 2" in ended.out


def test_resume_changed_carries_on_and_resume_never_starts_anew(
    pretrain: Pretrain, stopped: Stopped, tmp_path: Path
) -> None:
    folder, flags = stopped.copy(tmp_path / "run")
    changed = pretrain(*flags, "--lr", "0.3", "--resume", "changed", "--max-steps", "3")
    assert changed.code == 0, changed.err
    assert "after step 2" in changed.out
    content = safe_load.read(folder / "checkpoint.pth")
    assert (content["step"], content["args"]["lr"]) == (3, 0.3)

    anew = pretrain(*flags, "--resume", "never", "--max-steps", "2")
    assert anew.code == 0, anew.err
    assert "after step" not in anew.out
    assert differing_bits(learnt_in(folder), learnt_in(stopped.folder)) == []
    steps = [r["step"] for r in read_metrics(folder / "metrics.jsonl") if r["kind"] == "step"]
    assert steps == [1, 2]


def test_a_run_begins_from_weights_once_and_is_carried_on_without_them(
    pretrain: Pretrain, stopped: Stopped, photos: Path, tmp_path: Path
) -> None:
    source = tmp_path / "weights.pth"
    shutil.copy(stopped.folder / "checkpoint.pth", source)
    flags = ["--data-path", photos, *SMALL, "--output-dir", tmp_path / "run", "--init-weights", source]
    refused = pretrain(*flags, "--arch", "xcit_pico_4_p8")
    refused.assert_refused("a xcit_pico_4_p4, but arch is xcit_pico_4_p8")
    begun = pretrain(*flags, "--max-steps", "1")
    assert begun.code == 0, begun.err
    assert f"starting from teacher xcit_pico_4_p4 of {source}" in begun.out
    assert "heads too" in begun.out
    content, before = (safe_load.read(path) for path in (tmp_path / "run/checkpoint.pth", source))
    assert (content["step"], content["args"]["init_weights"]) == (1, str(source))
    # The first step's learning rate is 0: the student's weights are still the ones it began with.
    weights = [key for key in content["student"] if not key.endswith(("running_mean", "running_var", "tracked"))]
    assert len(weights) > 50
    assert all(torch.equal(content["student"][key], before["teacher"][key]) for key in weights)

    source.unlink()
    carried_on = pretrain(*flags, "--max-steps", "2")
    assert carried_on.code == 0, carried_on.err
    assert f"after step 1 of 2; it began from {source}, which is not read again" in carried_on.out
    pretrain(*flags[:-2], "--max-steps", "3").assert_refused(f"init_weights {source} -> ")
    pretrain(*flags, "--resume", "never", "--max-steps", "3").assert_refused(f"there is no file {source}")
    assert safe_load.read(tmp_path / "run/checkpoint.pth")["step"] == 2


def test_where_every_checkpoint_is_damaged_the_run_is_refused_and_they_are_kept(
    pretrain: Pretrain, stopped: Stopped, tmp_path: Path
) -> None:
    folder, flags = stopped.copy(tmp_path / "run")
    for file in (folder / "checkpoints").glob("*.pth"):
        file.write_bytes(file.read_bytes()[:-9])
    before = files_of(folder)
    pretrain(*flags).assert_refused("no checkpoint", "is whole", "--resume never")
    assert files_of(folder) == before


def test_a_foreign_checkpoint_is_refused_and_kept(pretrain: Pretrain, stopped: Stopped, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    torch.save({"model": {"weight": torch.zeros(3)}}, tmp_path / "run" / "checkpoint.pth")
    before = files_of(tmp_path / "run")
    pretrain(*stopped.flags[:-1], tmp_path / "run").assert_refused("not a checkpoint of run_pretrain.py")
    assert files_of(tmp_path / "run") == before


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--data-path", "absent"], ["absent"]),
        (["--data-path", "EMPTY"], ["no image"]),
        (["--data-path", "EMPTY/one.png"], ["no data"]),
        (["--data-path", "PHOTOS", "--arch", "xcit_smal_12_p16"], ["xcit_smal_12_p16", "xcit_small_12_p16"]),
        (["--data-path", "PHOTOS", "--arch", "timm:resnet81"], ["resnet18"]),
        (["--data-path", "PHOTOS", "--recipe", "dinno"], ["dinno", "dino"]),
        (["--data-path", "PHOTOS", "--epoch", "3"], ["--epoch", "epochs"]),
        (["--data-path", "PHOTOS", "--batch-size-per-gpu", "17"], ["16 images", "17"]),
        (["--data-path", "PHOTOS", "--out-dim", "1"], ["out_dim"]),
        (["--data-path", "PHOTOS", "--global-crops-size", "0"], ["global_crops_size"]),
        (["--data-path", "PHOTOS", "--global-crops-scale", "0.9", "0.1"], ["global_crops_scale"]),
        (["--data-path", "PHOTOS", "--epochs", "many"], ["epochs"]),
        (["--data-path", "PHOTOS", "--output-dir", "EMPTY/file/run"], ["output directory"]),
        (["--data-path", "PHOTOS/val/dark", "--batch-size-per-gpu", "2", "--knn-every", "1"], ["--train-data"]),
        (["--data-path", "PHOTOS", "--batch-size-per-gpu", "1", "--local-crops-size", "4"], ["crop"]),
        (["--recipe", "dino", "--data-path", ""], ["--data-path"]),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(
    pretrain: Pretrain, photos: Path, tmp_path: Path, flags: list[str], words: list[str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    places = {"PHOTOS": str(photos), "EMPTY": str(tmp_path)}
    for word, place in places.items():
        flags = [flag.replace(word, place) for flag in flags]
    pretrain(*SMALL, "--output-dir", tmp_path / "run", *flags).assert_refused(*words)
    assert not list(tmp_path.rglob("*.pth"))


# ---- as processes of their own


def test_the_plain_command_works_from_another_directory(tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, str(HERE.parent / "run_pretrain.py"), "--arch", "xcit_smal_12_p16"],
        cwd=tmp_path,
        env={key: value for key, value in ENVIRONMENT.items() if key != "PYTHONPATH"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    Ended(ended.returncode, ended.stdout, ended.stderr).assert_refused("xcit_small_12_p16")
    assert "sample" in ended.stdout.splitlines()[0]


def test_torchrun_with_two_processes_learns_what_one_learns(pretrain: Pretrain, photos: Path, tmp_path: Path) -> None:
    flags = ["--data-path", photos, *SMALL, "--batch-size-per-gpu", "2", "--optimizer", "sgd", "--warmup-epochs", "0"]
    flags += ["--max-steps", "3", "--save-every", "2"]
    ended = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         str(HERE.parent / "run_pretrain.py"), *map(str, flags), "--output-dir", str(tmp_path / "two")],
        cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert "2 process(es)" in ended.stdout
    assert ended.stdout.count("16 images") == 1  # one of them speaks
    one = pretrain(*flags, "--accumulation-steps", "2", "--output-dir", tmp_path / "one")
    assert one.code == 0, one.err
    networks = [learnt_in(tmp_path / name) for name in ("one", "two")]
    for path, value in networks[0].items():
        if path.startswith(("/student", "/teacher", "/dino_loss")) and "running_" not in path and "tracked" not in path:
            torch.testing.assert_close(networks[1][path], value, rtol=1e-4, atol=1e-6, msg=path)
