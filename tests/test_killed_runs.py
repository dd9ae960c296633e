"""Killed runs of real processes: checkpoints on disk, and results after resuming."""

from __future__ import annotations

import random
import shutil
import signal
import time
from pathlib import Path

import pytest
from ranks import Run, Server, Start, state_in
from tiny_run import differing_bits

from dino_xcit import safe_load
from dino_xcit.checkpoint.folder import CheckpointFolder

BATCH, STEPS, INTERVAL = 2, 200, 7
"""Two ranks and 160 photos give 40 steps per epoch, so saves, epoch ends and kills fall on different steps."""


def half_written(folder: Path) -> list[str]:
    return [path.name for path in (folder / "checkpoints").glob(".step*.tmp")]


def newest_step(folder: Path) -> int:
    path, _ = CheckpointFolder(folder).newest()
    return int(safe_load.read(path)["step"]) if path else 0


class KilledRun:
    """A run of two ranks that is killed and restarted, and an uninterrupted run for comparison."""

    def __init__(self, start: Start, folder: Path, steps: int) -> None:
        self._start, self.folder, self.steps = start, folder, steps
        self.flags = ["--batch-size-per-gpu", BATCH, "--epochs", 5, "--max-steps", steps]
        self.flags += ["--save-every", INTERVAL, "--drop-path-rate", "0.3", "--hang-timeout", "60"]
        self.kills_inside_a_save = 0

    def start(self, name: str, slow_saves: float = 0.0) -> Run:
        faults = [
            ["together", ["record_random_state", str(self.folder / f"{name}-{rank}.rng")], ["slow_saves", slow_saves]]
            for rank in range(2)
        ]
        return self._start(*self.flags, name=name, faults=faults)

    def kill_after(self, steps: int, seconds: float = 0.0) -> None:
        """Kill the run this many steps after its newest checkpoint, and ``seconds`` later."""
        resumed_from = newest_step(self.folder / "killed")
        record = self.folder / "killed-0.rng"
        record.unlink(missing_ok=True)
        run = self.start("killed")
        run.until(lambda: record.exists() and int((record.read_text() or "0").split()[0]) >= resumed_from + steps)
        time.sleep(seconds)
        self._end(run)
        assert resumed_from == 0 or f"resuming after step {resumed_from} of" in run.out()

    def kill_inside_a_save(self, seconds: float) -> None:
        """Kill the run ``seconds`` after it begins to write a checkpoint."""
        for left in half_written(self.folder / "killed"):
            (self.folder / "killed" / "checkpoints" / left).unlink()  # left by an earlier kill
        run = self.start("killed", slow_saves=0.8)
        run.until(lambda: bool(half_written(self.folder / "killed")))
        time.sleep(seconds)
        self._end(run)
        self.kills_inside_a_save += bool(half_written(self.folder / "killed"))

    def _end(self, run: Run) -> None:
        assert None in run.codes(), f"the run ended before the kill:\n{run.out()}\n{run.err()}"
        run.kill()
        assert -9 in run.wait()

    def assert_equal_to_a_run_left_alone(self) -> None:
        for name in ("killed", "straight"):
            run = self.start(name)
            assert run.wait(300) == [0, 0], run.out() + run.err()
        assert differing_bits(state_in(self.folder / "killed"), state_in(self.folder / "straight")) == []
        assert int(state_in(self.folder / "killed")["/step"]) == self.steps
        for rank in range(2):
            killed, straight = ((self.folder / f"{name}-{rank}.rng").read_text() for name in ("killed", "straight"))
            assert killed == straight
            assert killed.startswith(f"{self.steps} ")


def test_run_killed_three_times_matches_uninterrupted_run(start: Start, tmp_path: Path) -> None:
    """One of the kills interrupts a save."""
    run = KilledRun(start, tmp_path, steps=40)
    run.kill_after(5)
    run.kill_inside_a_save(0.1)
    run.kill_after(10)
    run.assert_equal_to_a_run_left_alone()
    assert run.kills_inside_a_save == 1


@pytest.mark.slow
def test_run_killed_twenty_times_matches_uninterrupted_run(start: Start, tmp_path: Path) -> None:
    """At least five of the kills interrupt a save."""
    run = KilledRun(start, tmp_path, steps=STEPS)
    chance = random.Random(3)
    for kill in range(20):
        if kill % 3 == 1:
            run.kill_inside_a_save(chance.uniform(0, 0.8))
        else:
            run.kill_after(chance.randint(1, 9), chance.uniform(0, 0.1))
    run.assert_equal_to_a_run_left_alone()
    assert run.kills_inside_a_save >= 5


@pytest.mark.slow
def test_resume_on_three_ranks_matches_uninterrupted_run(start: Start, tmp_path: Path) -> None:
    """The sum of three numbers depends on their order, and so on the buckets of DistributedDataParallel."""
    flags = ["--batch-size-per-gpu", BATCH, "--save-every", "3", "--drop-path-rate", "0.3"]
    for name, last in (("straight", 6), ("stopped", 4), ("stopped", 6)):
        run = start(*flags, "--max-steps", last, name=name, ranks=3)
        assert run.wait() == [0, 0, 0], run.err()
    assert differing_bits(state_in(tmp_path / "stopped"), state_in(tmp_path / "straight")) == []


# ---- kills during a save

ALONE = ["--batch-size-per-gpu", "4", "--max-steps", "6", "--save-every", "2", "--hang-timeout", "60"]


@pytest.fixture(scope="module")
def left_alone(server: Server, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One rank, six steps, saved after steps 2, 4 and 6; the save of step 6 prunes step 2."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    assert server.start(folder, "--data-path", photos, *ALONE, ranks=1).wait() == [0]
    return folder


def assert_equal_when_started_again(start: Start, left_alone: Path, name: str = "run") -> Run:
    again = start(*ALONE, name=name, ranks=1)
    assert again.wait() == [0], again.err()
    assert differing_bits(state_in(again.folder), state_in(left_alone)) == []
    assert not list(again.folder.rglob(".*.tmp"))
    return again


def die_at_operations(numbers: range, start: Start, tmp_path: Path, left_alone: Path) -> set[str]:
    """Kill a run before each of these file operations of its third save; return the files concerned."""
    victims = set()
    for number in numbers:
        folder = tmp_path / f"at-{number}"
        run = start(*ALONE, name=folder.name, ranks=1, faults=[["die_at_file_operation", str(folder), 6, number]])
        (code,) = run.wait()
        if code == 0:  # the save has fewer operations
            assert not (folder / "died-at").exists()
            return victims | {"end"}
        assert code == -9, run.err()
        at, name = (folder / "died-at").read_text().split(" ", 1)
        assert int(at) == number
        victims.add(("fsync " if name.startswith("fsync") else "") + Path(name).name)
        assert newest_step(folder) in (4, 6)  # at most one interval old
        assert_equal_when_started_again(start, left_alone, folder.name)
    return victims


def test_kill_at_some_file_operations_of_save_loses_at_most_one_interval(
    start: Start, tmp_path: Path, left_alone: Path
) -> None:
    assert len(die_at_operations(range(2, 29, 13), start, tmp_path, left_alone)) > 1


@pytest.mark.slow
def test_kill_at_any_file_operation_of_save_loses_at_most_one_interval(
    start: Start, tmp_path: Path, left_alone: Path
) -> None:
    victims = die_at_operations(range(1, 200), start, tmp_path, left_alone)
    assert "end" in victims
    assert {"step00000006.pth", "step00000006.json", "checkpoint.pth", "backbone.pth", "step00000002.pth",
            "step00000002.json", "fsync .step00000006.pth.tmp", "fsync .step00000006.json.tmp",
            "fsync checkpoints"} <= victims  # fmt: skip


@pytest.mark.parametrize(
    "share", [0.5, pytest.param(0.01, marks=pytest.mark.slow), pytest.param(0.99, marks=pytest.mark.slow)]
)
def test_kill_inside_checkpoint_write_keeps_previous_checkpoint(start: Start, left_alone: Path, share: float) -> None:
    """A file size limit ends the process within write(2) while it saves step 6, after step 4 was saved."""
    assert start(*ALONE, "--max-steps", "4", ranks=1).wait() == [0]
    size = (left_alone / "checkpoint.pth").stat().st_size
    run = start(*ALONE, ranks=1, faults=[["die_in_the_middle_of_a_file", int(size * share)]])
    assert run.wait() == [-signal.SIGXFSZ]
    assert len(half_written(run.folder)) == 1
    assert newest_step(run.folder) == 4
    assert_equal_when_started_again(start, left_alone)


# ---- full disks


@pytest.mark.slow
def test_temporarily_full_disk_gives_warning_and_run_continues(start: Start, tmp_path: Path, left_alone: Path) -> None:
    full = tmp_path / "full"
    run = start(*ALONE, ranks=1, faults=[["together", ["full_disk_while", str(full)], ["slow_steps", 0.3]]])
    run.until_step(1)
    full.touch()
    run.until_step(3)
    full.unlink()
    assert run.wait() == [0], run.err()
    assert "warning: cannot write the checkpoint of step 2 (No space left on device)" in run.out()
    assert differing_bits(state_in(run.folder), state_in(left_alone)) == []


def test_permanently_full_disk_ends_all_ranks_and_keeps_last_checkpoint(start: Start, tmp_path: Path) -> None:
    full = tmp_path / "full"
    fault = ["together", ["full_disk_while", str(full)], ["slow_steps", 0.1]]
    flags = ["--batch-size-per-gpu", "2", "--save-every", "2", "--max-steps", "40", "--max-failed-saves", "2"]
    run = start(*flags, faults=[fault])
    run.until_step(3)
    full.touch()
    assert run.wait(60) == [2, 2], run.out() + run.err()
    assert "Traceback" not in run.err()
    (sentence,) = [line for line in run.err().splitlines() if line.startswith("error: ")]
    before = newest_step(run.folder)
    assert 2 <= before <= 8
    assert "No space left on device" in sentence
    assert f"resumes after step {before}" in sentence


# ---- damaged checkpoints


def test_damaged_checkpoint_gives_warning_and_previous_one_is_resumed(
    start: Start, tmp_path: Path, left_alone: Path
) -> None:
    folder = shutil.copytree(left_alone, tmp_path / "run")
    newest = folder / "checkpoints" / "step00000006.pth"
    data = bytearray(newest.read_bytes())
    data[len(data) // 3] ^= 4
    newest.write_bytes(data)
    said = assert_equal_when_started_again(start, left_alone).out()
    assert f"warning: {newest} is damaged: its SHA-256 differs from its manifest" in said
    assert "resuming after step 4 of 6" in said
