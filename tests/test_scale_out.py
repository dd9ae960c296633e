"""More processes, more machines: what they exchange and when, and that the run stays the same run."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from ranks import Server, Start, state_in
from test_hanging_runs import alive
from tiny_run import differing_bits
from two_hosts import Host, two_hosts

from dino_xcit.runtime.metrics import read_metrics

MIB = 2**20


# ---- what a step exchanges, and when: S12/16 with 65,536 prototypes


@pytest.fixture(scope="module")
def exchanged(server: Server, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes saw (exchange_process.py)."""
    out = tmp_path_factory.mktemp("exchange") / "rank"
    server.two_ranks("exchange_process.py", out, timeout=300)
    return [json.loads(Path(f"{out}-{rank}.json").read_text()) for rank in range(2)]


def all_reduces(step: dict[str, Any]) -> list[dict[str, Any]]:
    """In the order in which they were started."""
    return [message for message in step["messages"] if message["kind"] == "allreduce"]


def test_gradients_travel_in_buckets_while_backward_goes_on(exchanged: list[dict[str, Any]]) -> None:
    for seen in exchanged:
        *buckets, own = all_reduces(seen["steps"][1])
        assert len(buckets) > 4
        assert sum(bucket["bytes"] for bucket in buckets) == seen["gradient_bytes"]
        assert all(bucket["bytes"] <= 30 * MIB for bucket in buckets[1:])  # 25, and the tensor that closes one
        started_after = [bucket["arrived"] for bucket in buckets]
        assert started_after == sorted(started_after)
        # All but the last leave while others' gradients are still to come; it carries less than a tenth.
        assert all(arrived < seen["gradients"] for arrived in started_after[:-1])
        assert buckets[-1]["bytes"] < seen["gradient_bytes"] / 10
        assert own["arrived"] == seen["gradients"]


def test_the_prototypes_a_third_of_all_bytes_leave_first_and_alone(exchanged: list[dict[str, Any]]) -> None:
    for seen in exchanged:
        first = all_reduces(seen["steps"][1])[0]
        assert seen["steps"][1]["first"] == "head.last_layer.weight_v"
        assert first["arrived"] == 1
        assert first["bytes"] == seen["prototype_bytes"] == 4 * 256 * 65536
        assert seen["prototype_bytes"] > seen["gradient_bytes"] / 3


def test_accumulation_exchanges_gradients_once_a_step(exchanged: list[dict[str, Any]]) -> None:
    for seen in exchanged:
        once, accumulating = (all_reduces(seen["steps"][number]) for number in (1, 2))
        assert seen["steps"][2]["passes"] == 2
        assert [message["bytes"] for message in accumulating] == [message["bytes"] for message in once]
        assert all(message["arrived"] > seen["gradients"] for message in accumulating)  # in the last pass


def test_besides_gradients_a_step_sends_one_message(exchanged: list[dict[str, Any]]) -> None:
    """Failure flag, sum of the teacher's logits, loss, counts, metrics and BatchNorm statistics; nothing else."""
    for seen in exchanged:
        for step in seen["steps"][1:]:
            assert {message["kind"] for message in step["messages"]} == {"allreduce"}
            assert all_reduces(step)[-1]["bytes"] == seen["own_bytes"]
            gradients = sum(message["bytes"] for message in all_reduces(step)[:-1])
            assert gradients == seen["gradient_bytes"]  # so the one is all there is besides
        # Once a run the processes settle the order of the buckets.
        assert [m["kind"] for m in seen["steps"][0]["messages"] if m["kind"] != "allreduce"] == ["broadcast"] * 2


def test_a_step_waits_for_no_number_until_it_is_logged(exchanged: list[dict[str, Any]]) -> None:
    for seen in exchanged:
        assert [step["host_waits"] for step in seen["steps"]] == [[], [], []]
        assert seen["logged"]["host_waits"]  # a control: there it does
        assert seen["logged"]["messages"] == []  # but tells the others nothing


# ---- the same trajectory on 1, 2 and 4 processes

STEPS = 16
TOLERANCE = 5e-5
"""Of a loss near 2, after 16 steps of AdamW, which makes what sums in another order differ by grow: ten times what was
measured (5e-6)."""


def losses_in(folder: Path) -> list[float]:
    """One a step."""
    return [record["loss"] for record in read_metrics(folder / "metrics.jsonl") if record["kind"] == "step"]


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_several_ranks_have_the_losses_of_one(start: Start, ranks: int) -> None:
    """4, 2 and 1 forward passes of 4 images per step: 16 images in each case."""
    flags = ["--batch-size-per-gpu", "4", "--max-steps", STEPS, "--lr", "2e-3", "--lr-reference-batch", "0"]

    def losses(name: str, ranks: int, drop_path: float = 0.2) -> list[float]:
        own = ["--accumulation-steps", 4 // ranks, "--drop-path-rate", drop_path]
        run = start(*flags, *own, name=name, ranks=ranks)
        assert run.wait() == [0] * ranks, run.err()
        return losses_in(run.folder)

    one = losses("one", 1)
    assert len(one) == STEPS
    assert losses("several", ranks) == pytest.approx(one, abs=TOLERANCE)
    assert max(one) - min(one) > 0.5  # it learns something
    # A control: the tolerance is far below what a few other masks of drop-path do.
    other = losses("other", 1, 0.21)
    assert max(abs(a - b) for a, b in zip(one, other, strict=True)) > 100 * TOLERANCE


# ---- two hosts under torchrun


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[tuple[Host, Host]]:
    """Two of them, joined by a cable."""
    with ExitStack() as stack:
        try:
            made = stack.enter_context(two_hosts(tmp_path))
        except OSError as error:
            pytest.skip(f"two hosts cannot be made here: {error}")
        yield made


@pytest.mark.slow
def test_two_hosts_meet_under_torchrun_and_train_what_one_host_trains(
    hosts: tuple[Host, Host], server: Server, photos: Path, tmp_path: Path
) -> None:
    """Each has a directory of its own, which shows who writes: rank 0 alone."""
    flags = ["--data-path", photos, "--batch-size-per-gpu", "4", "--max-steps", "6", "--save-every", "3"]
    jobs = [host.torchrun(hosts[0].name, tmp_path / host.name, *flags) for host in hosts]
    ended = [job.communicate(timeout=150) for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], ended
    assert "2 processes on cpu in float32; global batch 8" in ended[0][0]
    assert ended[1][0] == ""
    kept = sorted(path.name for path in (tmp_path / hosts[0].name / "checkpoints").glob("*.pth"))
    assert kept == ["step00000003.pth", "step00000006.pth"]
    assert not (tmp_path / hosts[1].name).exists()
    assert server.start(tmp_path / "here", *flags).wait() == [0, 0]
    assert losses_in(tmp_path / hosts[0].name) == losses_in(tmp_path / "here")  # two numbers: one order of summing
    assert differing_bits(state_in(tmp_path / hosts[0].name), state_in(tmp_path / "here")) == []


@pytest.mark.slow
def test_a_host_that_vanishes_ends_the_ranks_of_both_in_time(
    hosts: tuple[Host, Host], photos: Path, tmp_path: Path
) -> None:
    """Nothing closes a connection: each side waits for the other."""
    timeout = 5.0
    flags = ["--data-path", photos, "--batch-size-per-gpu", "4", "--epochs", "400", "--hang-timeout", timeout]
    said = [tmp_path / "said-0", tmp_path / "said-1"]
    jobs = [
        host.torchrun(hosts[0].name, tmp_path / "run", *flags, err=path) for host, path in zip(hosts, said, strict=True)
    ]
    until = time.monotonic() + 120
    while len(losses_in(tmp_path / "run")) < 5:
        assert time.monotonic() < until, [path.read_text() for path in said]
        time.sleep(0.05)
    time.sleep(1.5)  # each has told the other that it lives
    ranks = [rank for host in hosts for rank in host.ranks()]
    assert len(ranks) == 2
    hosts[1].vanish()
    began = time.monotonic()
    while any(map(alive, ranks)):
        assert time.monotonic() - began < timeout + 10
        time.sleep(0.1)
    for rank, path in enumerate(said):
        (sentence,) = [line for line in path.read_text().splitlines() if line.startswith("error: ")]
        assert f"error: rank {rank}, step " in sentence
    assert jobs[0].wait(timeout=30) == 1  # torchrun's; the other one's torchrun looks for the first for minutes
