"""Runs of real processes: stop signals, resuming on another number of ranks, and non-finite steps."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Run, Server, Start, children_of, state_in, torchrun
from tiny_run import differing_bits, tensors_of, tiny_config

from dino_xcit.checkpoint.folder import BEST, CheckpointFolder
from dino_xcit.checkpoint.resume import Stored, keep_global_batch
from dino_xcit.errors import DIVERGED, PREEMPTED, InputError
from dino_xcit.metrics import read_metrics
from dino_xcit.runtime import distributed

SHORT = ["--batch-size-per-gpu", "2", "--epochs", "5", "--max-steps", "12", "--hang-timeout", "60"]


@pytest.fixture(scope="module")
def left_alone(server: Server, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of two ranks and twelve steps."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    assert server.start(folder, "--data-path", photos, *SHORT).wait() == [0, 0]
    return folder


def last_step_in(folder: Path) -> int:
    """Return the last step in metrics.jsonl; 0 without records."""
    return max((record["step"] for record in read_metrics(folder / "metrics.jsonl")), default=0)


# ---- stop signals


@pytest.mark.parametrize(
    ("number", "rank"),
    [
        pytest.param(signal.SIGTERM, 1, marks=pytest.mark.slow),
        (signal.SIGUSR1, 0),
        pytest.param(signal.SIGTERM, 0, marks=pytest.mark.slow),
        pytest.param(signal.SIGUSR1, 1, marks=pytest.mark.slow),
    ],
)
def test_stop_signal_to_any_rank_saves_last_step_and_resumes_exactly(
    start: Start, left_alone: Path, number: signal.Signals, rank: int
) -> None:
    run = start(*SHORT, faults=[["slow_steps", 0.2]] * 2)
    run.until_step(3)
    run.send(number, rank)
    assert run.wait(30) == [PREEMPTED, PREEMPTED], run.err()
    assert "Traceback" not in run.err()
    step = int(state_in(run.folder)["/step"])
    assert step == last_step_in(run.folder)  # the last completed step is saved
    assert f"after saving step {step}: run the same command to resume" in run.err()
    assert ("stopped by " + number.name in run.err()) == (rank == 0)
    again = start(*SHORT)
    assert again.wait() == [0, 0], again.err()
    assert f"resuming after step {step} of 12" in again.out()
    assert differing_bits(state_in(run.folder), state_in(left_alone)) == []


def test_stop_signal_to_ranks_and_loader_workers_resumes_exactly(start: Start, left_alone: Path) -> None:
    """Slurm and terminals signal every process of a job."""
    flags = [*SHORT, "--num-workers", "2"]
    run = start(*flags, faults=[["slow_steps", 0.2]] * 2)
    run.until_step(3)
    for pid in run.pids:
        os.killpg(pid, signal.SIGTERM)
    assert run.wait(30) == [PREEMPTED, PREEMPTED], run.err()
    assert start(*flags).wait() == [0, 0]
    assert differing_bits(state_in(run.folder), state_in(left_alone)) == []


def test_stop_signal_during_knn_evaluation_takes_effect_after_it(start: Start, labelled_photos: Path) -> None:
    """The step is saved before the evaluation begins, so a crash in the evaluation loses no step."""
    flags = ["--data-path", labelled_photos, "--batch-size-per-gpu", "2", "--knn-every", "1", "--hang-timeout", "60"]
    run = start(*flags, faults=[["slow_evaluation", 1.5]] * 2)  # four steps an epoch
    run.until(lambda: CheckpointFolder(run.folder).newest()[0] is not None)
    run.send(signal.SIGTERM, 1)
    assert "knn top1" not in run.out()
    assert run.wait(30) == [PREEMPTED, PREEMPTED], run.out() + run.err()
    assert run.out().count("knn top1") == 1
    (manifest,) = CheckpointFolder(run.folder).manifests()
    assert manifest.step == 4
    assert manifest.scores[BEST].metric == "knn_top1"


def ranks_below(pid: int) -> list[int]:
    """Return the PIDs of the ranks that torchrun has started."""
    return [child for child in children_of(pid) if "run_pretrain.py" in Path(f"/proc/{child}/cmdline").read_text()]


def wait_for_step(folder: Path, step: int, timeout: float = 90) -> None:
    until = time.monotonic() + timeout
    while last_step_in(folder) < step:
        assert time.monotonic() < until
        time.sleep(0.02)


@pytest.mark.slow
def test_torchrun_restarts_ranks_after_kill_and_saves_on_sigterm(photos: Path, tmp_path: Path) -> None:
    """SIGKILL to one rank makes torchrun restart both ranks; SIGTERM then goes to torchrun itself."""
    folder = tmp_path / "run"
    flags = ["--data-path", photos, *SHORT, "--max-steps", "400", "--epochs", "20", "--save-every", "2"]
    job = torchrun(folder, *flags, restarts=2)
    wait_for_step(folder, 3)
    before = ranks_below(job.pid)
    assert len(before) == 2
    os.kill(before[1], signal.SIGKILL)
    until = time.monotonic() + 60
    while len(set(ranks_below(job.pid)) - set(before)) < 2:  # torchrun starts both ranks again
        assert time.monotonic() < until
        time.sleep(0.05)
    wait_for_step(folder, last_step_in(folder) + 4)
    job.send_signal(signal.SIGTERM)
    out, err = job.communicate(timeout=30)
    assert "resuming after step" in out
    step = int(state_in(folder)["/step"])
    assert step == last_step_in(folder), err
    assert f"after saving step {step}" in err


def test_ranks_save_and_exit_when_torchrun_is_killed(photos: Path, tmp_path: Path) -> None:
    """Orphaned ranks would otherwise keep training and hold the lock of the output directory."""
    folder = tmp_path / "run"
    job = torchrun(folder, "--data-path", photos, *SHORT, "--max-steps", "3000", "--epochs", "100")
    wait_for_step(folder, 3)
    orphans = ranks_below(job.pid)
    assert len(orphans) == 2
    job.kill()
    until = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in orphans):
        assert time.monotonic() < until
        time.sleep(0.05)
    job.communicate()
    step = int(state_in(folder)["/step"])
    assert step == last_step_in(folder) < 3000


# ---- another number of ranks


def images_by_step(paths: list[Path]) -> dict[int, list[int]]:
    """Return the images of each step, ordered by forward pass and rank."""
    by_step: dict[int, list[list[list[int]]]] = {}
    for path in paths:
        for line in path.read_text().splitlines():
            step, passes = json.loads(line)
            by_step.setdefault(step, []).append(passes)
    return {
        step: [image for part in zip(*ranks, strict=True) for microbatch in part for image in microbatch]
        for step, ranks in by_step.items()
    }


@pytest.mark.parametrize("steps", [15, pytest.param(50, marks=pytest.mark.slow)])
def test_resuming_on_one_then_two_ranks_keeps_images_and_losses(start: Start, tmp_path: Path, steps: int) -> None:
    first, second = steps // 3, 2 * steps // 3
    # Sinkhorn-Knopp and KoLeo see the images of one forward pass
    auto = ["--recipe", "auto", "--centering", "centering", "--koleo-weight", "0"]
    flags = [*auto, "--batch-size-per-gpu", "4", "--epochs", "5", "--drop-path-rate", "0.1"]

    def run(name: str, ranks: int, last: int) -> Run:
        faults = [["record_images", str(tmp_path / f"{name}-{last}-{rank}")] for rank in range(ranks)]
        started = start(*flags, "--max-steps", last, name=name, ranks=ranks, faults=faults)
        assert started.wait() == [0] * ranks, started.err()
        return started

    run("straight", 2, steps)
    run("elastic", 2, first)
    alone = run("elastic", 1, second)
    assert "resuming on 1 process instead of 2 with 2 forward passes a step: the global batch stays 8" in alone.out()
    again = run("elastic", 2, steps)
    assert f"resuming after step {second} of {steps}" in again.out()
    straight = images_by_step([tmp_path / f"straight-{steps}-{rank}" for rank in range(2)])
    elastic = images_by_step([tmp_path / f"elastic-{first}-{rank}" for rank in range(2)])
    elastic |= images_by_step([tmp_path / f"elastic-{second}-0"])
    elastic |= images_by_step([tmp_path / f"elastic-{steps}-{rank}" for rank in range(2)])
    assert elastic == straight
    assert sorted(elastic) == list(range(steps))
    losses = [
        [record["loss"] for record in read_metrics(tmp_path / name / "metrics.jsonl") if record["kind"] == "step"]
        for name in ("straight", "elastic")
    ]
    assert len(losses[0]) == steps
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)


def test_indivisible_global_batch_is_refused_with_usable_world_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    stored = Stored({"world_size": 1, "global_batch": 3}, Path("checkpoint.pth"))
    with pytest.raises(InputError, match=r"the global batch of 3 \(from 1 process\) on 2 processes.*start 1 process"):
        keep_global_batch(tiny_config(batch_size_per_gpu=3), stored)


# ---- non-finite steps

SPOILT = ["--batch-size-per-gpu", "2", "--save-every", "1", "--keep-last", "20", "--use-bn-in-head", "true"]


def learnt_at(folder: Path, step: int) -> dict[str, Any]:
    content = torch.load(folder / "checkpoints" / f"step{step:08d}.pth", weights_only=True)
    parts = {"student": content["student"], "teacher": content["teacher"], "centre": content["dino_loss"]}
    return tensors_of(parts | {"moments": content["optimizer"]["state"]})


@pytest.mark.parametrize(
    "what",
    [pytest.param("activations", marks=pytest.mark.slow), "teacher", pytest.param("gradients", marks=pytest.mark.slow)],
)
def test_nonfinite_step_on_one_rank_is_skipped_on_all_ranks_and_counted(start: Start, what: str) -> None:
    faults = [["none"], ["spoil", what, 3, 4]]  # on rank 1 only
    run = start(*SPOILT, "--max-steps", "5", faults=faults)
    assert run.wait() == [0, 0], run.err()
    folder = run.folder
    assert any(path.endswith("running_var") for path in learnt_at(folder, 3))
    assert not (folder / "checkpoints" / "step00000004.pth").exists()  # a skipped step has nothing new to save
    assert differing_bits(learnt_at(folder, 3), learnt_at(folder, 5)) == []  # step 5 is saved at the end of the run
    again = start(*SPOILT, "--max-steps", "6")
    assert again.wait() == [0, 0], again.err()
    assert differing_bits(learnt_at(folder, 5), learnt_at(folder, 6)) != []  # training continues
    counted = {record["step"]: record["skipped_steps"] for record in read_metrics(folder / "metrics.jsonl")
               if record["kind"] == "step"}  # fmt: skip
    assert counted == {1: 0, 2: 0, 3: 0, 4: 1, 5: 2, 6: 2}


def test_max_skipped_steps_ends_all_ranks_and_records_batch(start: Start, tmp_path: Path) -> None:
    recorded = [["record_images", str(tmp_path / str(rank))] for rank in range(2)]
    faults = [recorded[0], ["together", recorded[1], ["spoil", "gradients", 3, 1000]]]
    run = start(*SPOILT, "--max-skipped-steps", "4", "--max-steps", "100", faults=faults)
    assert run.wait() == [DIVERGED, DIVERGED], run.err()
    assert "Traceback" not in run.err()
    assert "4 consecutive steps up to step 7 were not finite" in run.err()
    kept = json.loads((run.folder / "nonfinite.json").read_text())
    assert (kept["step"], kept["epoch"], kept["seed"], kept["skipped_in_a_row"]) == (6, 0, 0, 4)
    seen = images_by_step([tmp_path / "0", tmp_path / "1"])[6]
    assert [image for part in kept["images_by_forward_pass"] for image in part] == seen
    newest, _ = CheckpointFolder(run.folder).newest()
    assert newest == run.folder / "checkpoints" / "step00000003.pth"  # skipped steps were not saved


def test_nonfinite_command_repeats_skipped_step_and_names_first_module(start: Start, server: Server) -> None:
    """The weights of two ranks overflow; a single process reproduces the step."""
    flags = ["--batch-size-per-gpu", "2", "--optimizer", "sgd", "--lr", "1e22", "--lr-reference-batch", "0"]
    run = start(*flags, "--clip-grad", "0", "--max-skipped-steps", "3", "--max-steps", "20")
    folder = run.folder
    assert run.wait() == [DIVERGED, DIVERGED], run.out() + run.err()
    assert f"python -m dino_xcit.nonfinite {folder}/nonfinite.pth" in run.err()

    again = server.python("-m", "dino_xcit.nonfinite", folder / "nonfinite.pth")
    assert again.returncode == 0, again.stderr
    kept = json.loads((folder / "nonfinite.json").read_text())
    for number, images in enumerate(kept["images_by_forward_pass"]):
        (line,) = [line for line in again.stdout.splitlines() if line.startswith(f"  pass {number}: ")]
        assert "NOT FINITE" in line
        assert "first in " in line
        assert line.endswith("images " + ", ".join(map(str, images)))
    assert "the step is skipped again" in again.stdout
