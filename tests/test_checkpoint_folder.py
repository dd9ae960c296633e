"""The checkpoints of a run on disk: found whole, passed over where damaged, pruned only when safe."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from dino_xcit import safe_load
from dino_xcit.checkpoint.folder import CheckpointFolder
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


def test_the_newest_is_found_and_named_and_its_backbone_lies_beside_it(tmp_path: Path) -> None:
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
    """``count`` offsets over a whole file, its first and last byte among them."""
    return sorted({round(share * (size - 1) / (count - 1)) for share in range(count)})


@pytest.mark.parametrize("suffix", [".pth", ".json"])
@pytest.mark.parametrize("damage", ["flip", "cut"])
def test_damage_at_any_of_fifty_places_is_seen_said_and_passed_over(tmp_path: Path, suffix: str, damage: str) -> None:
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


def test_where_all_are_damaged_nothing_is_started_anew_in_silence(tmp_path: Path) -> None:
    filled(tmp_path)
    for path in (tmp_path / "checkpoints").glob("*.pth"):
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match=r"no checkpoint in .* is intact \(.*step00000003.*--resume never"):
        CheckpointFolder(tmp_path).newest()


def test_a_checkpoint_pth_that_no_manifest_knows_is_passed_over_aloud(tmp_path: Path) -> None:
    filled(tmp_path)
    latest = tmp_path / "checkpoint.pth"
    data = bytearray(latest.read_bytes())
    data[100] ^= 1
    latest.unlink()  # no longer the same file as the step's
    latest.write_bytes(data)
    path, notices = CheckpointFolder(tmp_path).newest()
    assert path == tmp_path / "checkpoints" / "step00000003.pth"
    assert notices == [f"{latest} is damaged or from another run: using {path}"]


def test_a_checkpoint_pth_alone_is_taken_as_it_is(tmp_path: Path) -> None:
    """An earlier version wrote it, or somebody copied it."""
    torch.save(content(7), tmp_path / "checkpoint.pth")
    path, (notice,) = CheckpointFolder(tmp_path).newest()
    assert path == tmp_path / "checkpoint.pth"
    assert "has no manifest" in notice


def test_a_file_without_a_manifest_is_no_checkpoint(tmp_path: Path) -> None:
    """A save that was cut short between the two."""
    filled(tmp_path)
    torch.save(content(4), tmp_path / "checkpoints" / "step00000004.pth")
    assert newest_step(tmp_path) == 3
    CheckpointFolder(tmp_path).prune()
    assert steps_in(tmp_path) == [2, 3]


# ---- what is kept


def test_the_last_n_every_kth_and_the_best_are_kept(tmp_path: Path) -> None:
    checkpoints = CheckpointFolder(tmp_path, keep_last=2)
    for step in range(1, 10):
        checkpoints.write(content(step), keep=step % 4 == 0)
        checkpoints.note_metric(step, "knn_top1", {3: 55.0, 5: 50.0}.get(step, 10.0 + step))
    assert steps_in(tmp_path) == [3, 4, 8, 9]
    assert os.path.samefile(tmp_path / "best.pth", tmp_path / "checkpoints" / "step00000003.pth")
    knn = {manifest.step: manifest.metric for manifest in checkpoints.manifests()}
    assert knn == {9: 19.0, 8: 18.0, 4: 14.0, 3: 55.0}


def test_pruning_counts_only_checkpoints_that_were_read_back_whole(tmp_path: Path) -> None:
    filled(tmp_path, steps=4, keep_last=9)
    damaged = tmp_path / "checkpoints" / "step00000003.pth"
    damaged.write_bytes(damaged.read_bytes()[:-5])
    CheckpointFolder(tmp_path, keep_last=2).prune()
    # 4 and 2 are whole; 3 does not count as one of the two, and may not push 2 out
    assert steps_in(tmp_path) == [2, 3, 4]


def test_pruning_leaves_alone_what_it_cannot_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that is away for a moment must not cost the checkpoint that was to be kept."""
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


def test_the_rest_of_a_save_that_was_cut_short_is_done_at_the_next_start(tmp_path: Path) -> None:
    checkpoints = filled(tmp_path)
    checkpoints.note_metric(3, "knn_top1", 50.0)
    (tmp_path / "best.pth").unlink()
    (tmp_path / "checkpoint.pth").unlink()
    (tmp_path / "checkpoint.pth").write_bytes((tmp_path / "checkpoints" / "step00000002.pth").read_bytes())
    path, _ = CheckpointFolder(tmp_path).newest()
    assert path is not None
    CheckpointFolder(tmp_path).finish(path, safe_load.read(path))
    for name in ("checkpoint.pth", "best.pth"):
        assert os.path.samefile(tmp_path / name, path)


def test_starting_anew_forgets_them_all(tmp_path: Path) -> None:
    checkpoints = filled(tmp_path)
    checkpoints.note_metric(3, "knn_top1", 50.0)
    checkpoints.clear()
    assert CheckpointFolder(tmp_path).newest() == (None, [])
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["backbone.pth", "checkpoints"]


# ---- disks that fail


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """While it is set, the disk is full."""
    fsync, full = os.fsync, threading.Event()

    def fail_while_full(descriptor: int) -> None:
        if full.is_set():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fail_while_full)
    return full


def test_a_save_that_fails_leaves_the_others_and_is_borne_so_many_times(
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


def test_a_fault_of_ours_in_a_save_is_not_taken_for_the_disks(tmp_path: Path) -> None:
    saver = Saver(CheckpointFolder(tmp_path), max_failures=3)
    broken = content(1)
    del broken["epoch"]
    saver.save(broken)
    with pytest.raises(KeyError, match="epoch"):
        saver.ensure(1, lambda: content(1))


# ---- beside the training


@pytest.fixture
def may_write(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """No checkpoint is written before it is set."""
    write, may_write = CheckpointFolder.write, threading.Event()

    def waiting(self: CheckpointFolder, *arguments: Any) -> object:
        assert may_write.wait(20)
        return write(self, *arguments)

    monkeypatch.setattr(CheckpointFolder, "write", waiting)
    return may_write


def test_the_saver_does_not_leave_its_context_before_the_disk_is_done(
    tmp_path: Path, may_write: threading.Event
) -> None:
    with Saver(CheckpointFolder(tmp_path), max_failures=1) as saver:
        saver.save(content(1))
        threading.Timer(0.1, may_write.set).start()
    assert newest_step(tmp_path) == 1
    assert not list(tmp_path.rglob(".*.tmp"))


def test_what_is_saved_is_the_state_when_it_was_asked_for(tmp_path: Path, may_write: threading.Event) -> None:
    """Training goes on while the disk writes: the copy must be complete before ``save`` returns."""
    state = content(1)
    saver = Saver(CheckpointFolder(tmp_path), max_failures=1)
    saver.save(state)
    assert not (tmp_path / "checkpoint.pth").exists()  # it came back before the disk was done
    tensors = state["backbone"] | state["teacher"]
    for tensor in tensors.values():
        tensor.zero_()
    may_write.set()
    saver.ensure(1, lambda: state)
    stored, expected = safe_load.read(tmp_path / "checkpoint.pth"), content(1)
    for part in ("backbone", "teacher"):
        assert all(torch.equal(stored[part][name], tensor) for name, tensor in expected[part].items())
