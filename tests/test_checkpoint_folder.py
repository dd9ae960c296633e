"""Checkpoints of a run on disk: the newest intact one is found, damaged ones are skipped, pruning is safe."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from dino_xcit import safe_load
from dino_xcit.checkpoint.folder import BEST, BEST_LABELFREE, CheckpointFolder, Score
from dino_xcit.checkpoint.saver import Saver
from dino_xcit.errors import InputError


def content(step: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(step)
    return {
        "step": step,
        "epoch": step // 10,
        "global_batch": 8,
        "world_size": 1,
        "backbone": {"cls_token": torch.randn(1, 1, 16, generator=generator)},
        "teacher": {"head.weight": torch.randn(40, 16, generator=generator)},
    }


def filled(folder: Path, steps: int = 3, keep_last: int = 2) -> CheckpointFolder:
    checkpoints = CheckpointFolder(folder, keep_last)
    for step in range(1, steps + 1):
        checkpoints.write(content(step))
    return checkpoints


def steps_in(folder: Path) -> list[int]:
    return sorted(int(path.stem[4:]) for path in (folder / "checkpoints").glob("*.pth"))


def newest_step(folder: Path) -> int:
    path, _ = CheckpointFolder(folder).newest()
    assert path is not None
    return int(safe_load.read(path)["step"])


def test_newest_checkpoint_is_found_with_its_link_and_backbone(tmp_path: Path) -> None:
    checkpoints = filled(tmp_path)
    path, notices = CheckpointFolder(tmp_path).newest()
    assert path == tmp_path / "checkpoints" / "step00000003.pth"
    assert notices == []
    assert os.path.samefile(path, tmp_path / "checkpoint.pth")
    backbone = torch.load(tmp_path / "backbone.pth", weights_only=True)
    assert backbone.keys() == {"cls_token"}
    assert torch.equal(backbone["cls_token"], content(3)["backbone"]["cls_token"])
    assert [manifest.step for manifest in checkpoints.manifests()] == [3, 2]


# ---- damage


def places(size: int, count: int = 50) -> list[int]:
    """Return ``count`` evenly spaced offsets in a file, including its first and last byte."""
    return sorted({round(share * (size - 1) / (count - 1)) for share in range(count)})


@pytest.mark.parametrize("suffix", [".pth", ".json"])
@pytest.mark.parametrize("damage", ["flip", "cut"])
def test_newest_skips_checkpoint_damaged_at_any_of_fifty_offsets(tmp_path: Path, suffix: str, damage: str) -> None:
    filled(tmp_path)
    victim = tmp_path / "checkpoints" / f"step00000003{suffix}"
    whole = victim.read_bytes()
    offsets = places(len(whole))
    assert len(offsets) == 50
    for offset in offsets:
        data = bytearray(whole)
        if damage == "flip":
            data[offset] ^= 1 << (offset % 8)
        else:
            del data[offset:]
        victim.write_bytes(data)
        path, notices = CheckpointFolder(tmp_path).newest()
        assert path == tmp_path / "checkpoints" / "step00000002.pth", offset
        assert "step00000003" in notices[0], offset
        assert "damaged" in notices[0], offset
        assert any("falling back to the checkpoint of step 2" in notice for notice in notices), offset
    victim.write_bytes(whole)
    assert newest_step(tmp_path) == 3


def test_newest_raises_if_all_checkpoints_are_damaged(tmp_path: Path) -> None:
    filled(tmp_path)
    for path in (tmp_path / "checkpoints").glob("*.pth"):
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match=r"no checkpoint in .* is intact \(.*step00000003.*--resume never"):
        CheckpointFolder(tmp_path).newest()


def test_newest_ignores_checkpoint_pth_unknown_to_manifests_with_warning(tmp_path: Path) -> None:
    filled(tmp_path)
    latest = tmp_path / "checkpoint.pth"
    data = bytearray(latest.read_bytes())
    data[100] ^= 1
    latest.unlink()  # breaks the hard link to the checkpoint of the step
    latest.write_bytes(data)
    path, notices = CheckpointFolder(tmp_path).newest()
    assert path == tmp_path / "checkpoints" / "step00000003.pth"
    assert notices == [f"{latest} is damaged or from another run: using {path}"]


def test_newest_accepts_checkpoint_pth_without_manifests_with_warning(tmp_path: Path) -> None:
    """Such a file is a copy, or from an earlier version."""
    torch.save(content(7), tmp_path / "checkpoint.pth")
    path, (notice,) = CheckpointFolder(tmp_path).newest()
    assert path == tmp_path / "checkpoint.pth"
    assert "has no manifest" in notice


def test_checkpoint_without_manifest_is_ignored_and_pruned(tmp_path: Path) -> None:
    """The save was interrupted between file and manifest."""
    filled(tmp_path)
    torch.save(content(4), tmp_path / "checkpoints" / "step00000004.pth")
    assert newest_step(tmp_path) == 3
    CheckpointFolder(tmp_path).prune()
    assert steps_in(tmp_path) == [2, 3]


# ---- pruning


def test_prune_keeps_last_n_marked_and_best_checkpoints(tmp_path: Path) -> None:
    checkpoints = CheckpointFolder(tmp_path, keep_last=2)
    for step in range(1, 10):
        checkpoints.write(content(step), keep=step % 4 == 0)
        scores = {BEST: Score("knn_top1", {3: 55.0, 5: 50.0}.get(step, 10.0 + step))}
        if step % 2 == 0:  # measured more seldom
            scores[BEST_LABELFREE] = Score("lidar", {6: 20.0}.get(step, 5.0))
        checkpoints.note_scores(step, scores)
    assert steps_in(tmp_path) == [3, 4, 6, 8, 9]
    for link, step in ((BEST, 3), (BEST_LABELFREE, 6)):
        assert os.path.samefile(tmp_path / link, tmp_path / "checkpoints" / f"step{step:08d}.pth")
    knn = {manifest.step: manifest.scores[BEST].value for manifest in checkpoints.manifests()}
    assert knn == {9: 19.0, 8: 18.0, 6: 16.0, 4: 14.0, 3: 55.0}


def test_prune_counts_only_intact_checkpoints(tmp_path: Path) -> None:
    filled(tmp_path, steps=4, keep_last=9)
    damaged = tmp_path / "checkpoints" / "step00000003.pth"
    damaged.write_bytes(damaged.read_bytes()[:-5])
    CheckpointFolder(tmp_path, keep_last=2).prune()
    # 4 and 2 are intact; 3 is damaged, so it does not count towards keep_last and 2 must stay
    assert steps_in(tmp_path) == [2, 3, 4]


def test_prune_keeps_checkpoint_with_unreadable_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A temporary read error must not remove a checkpoint that is marked to be kept."""
    checkpoints = CheckpointFolder(tmp_path, keep_last=1)
    checkpoints.write(content(1), keep=True)
    read = Path.read_bytes

    def stale(self: Path) -> bytes:
        if self.name == "step00000001.json":
            raise OSError(errno.ESTALE, "stale file handle")
        return read(self)

    with monkeypatch.context() as away:
        away.setattr(Path, "read_bytes", stale)
        checkpoints.write(content(2))
    checkpoints.write(content(3))
    assert steps_in(tmp_path) == [1, 3]


def test_finish_completes_links_of_interrupted_save(tmp_path: Path) -> None:
    checkpoints = filled(tmp_path)
    checkpoints.note_scores(3, {BEST: Score("knn_top1", 50.0)})
    (tmp_path / "best.pth").unlink()
    (tmp_path / "checkpoint.pth").unlink()
    (tmp_path / "checkpoint.pth").write_bytes((tmp_path / "checkpoints" / "step00000002.pth").read_bytes())
    path, _ = CheckpointFolder(tmp_path).newest()
    assert path is not None
    CheckpointFolder(tmp_path).finish(path, safe_load.read(path))
    for name in ("checkpoint.pth", "best.pth"):
        assert os.path.samefile(tmp_path / name, path)


def test_clear_removes_all_checkpoints(tmp_path: Path) -> None:
    checkpoints = filled(tmp_path)
    checkpoints.note_scores(3, {BEST: Score("knn_top1", 50.0)})
    checkpoints.clear()
    assert CheckpointFolder(tmp_path).newest() == (None, [])
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["backbone.pth", "checkpoints"]


# ---- disk failures


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Event; while it is set, the disk is full."""
    fsync, full = os.fsync, threading.Event()

    def fail_while_full(descriptor: int) -> None:
        if full.is_set():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fail_while_full)
    return full


def test_saver_keeps_old_checkpoints_and_raises_after_max_failures(
    tmp_path: Path, full: threading.Event, capsys: pytest.CaptureFixture[str]
) -> None:
    saver = Saver(CheckpointFolder(tmp_path), max_failures=3)
    saver.begin(0)
    saver.save(content(1))
    saver.ensure(1, lambda: content(1))
    assert capsys.readouterr().out == ""

    full.set()
    for step in (2, 3):
        saver.save(content(step))
        assert not saver.save_error
    with pytest.raises(InputError, match=r"No space left.*resumes after step 1"):
        saver.ensure(3, lambda: content(3))
    said = capsys.readouterr().out.splitlines()
    assert ["failure 1 of 3" in said[0], "failure 2 of 3" in said[1], "failure 3 of 3" in said[2]] == [True] * 3
    assert "cannot write the checkpoint of step 2 (No space left on device)" in said[0]
    assert saver.save_error
    assert newest_step(tmp_path) == 1

    full.clear()
    saver.ensure(4, lambda: content(4))
    assert not saver.save_error
    assert newest_step(tmp_path) == 4
    assert [p.name for p in (tmp_path / "checkpoints").glob(".*")] == []


def test_saver_raises_programming_errors_unchanged(tmp_path: Path) -> None:
    saver = Saver(CheckpointFolder(tmp_path), max_failures=3)
    broken = content(1)
    del broken["epoch"]
    saver.save(broken)
    with pytest.raises(KeyError, match="epoch"):
        saver.ensure(1, lambda: content(1))


# ---- asynchronous writes


@pytest.fixture
def may_write(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Event; checkpoints are written only after it is set."""
    write, may_write = CheckpointFolder.write, threading.Event()

    def waiting(self: CheckpointFolder, *arguments: Any) -> object:
        assert may_write.wait(20)
        return write(self, *arguments)

    monkeypatch.setattr(CheckpointFolder, "write", waiting)
    return may_write


def test_saver_context_exit_waits_for_pending_write(tmp_path: Path, may_write: threading.Event) -> None:
    with Saver(CheckpointFolder(tmp_path), max_failures=1) as saver:
        saver.save(content(1))
        threading.Timer(0.1, may_write.set).start()
    assert newest_step(tmp_path) == 1
    assert not list(tmp_path.rglob(".*.tmp"))


def test_saver_writes_state_at_time_of_call(tmp_path: Path, may_write: threading.Event) -> None:
    """Training continues during the write, so the copy must be complete before ``save`` returns."""
    state = content(1)
    saver = Saver(CheckpointFolder(tmp_path), max_failures=1)
    saver.save(state)
    assert not (tmp_path / "checkpoint.pth").exists()  # save returned before the write
    tensors = state["backbone"] | state["teacher"]
    for tensor in tensors.values():
        tensor.zero_()
    may_write.set()
    saver.ensure(1, lambda: state)
    stored, expected = safe_load.read(tmp_path / "checkpoint.pth"), content(1)
    for part in ("backbone", "teacher"):
        assert all(torch.equal(stored[part][name], tensor) for name, tensor in expected[part].items())
