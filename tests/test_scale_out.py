"""Several ranks and hosts: collectives per step, losses independent of the number of ranks, and two hosts."""

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

from dino_xcit.metrics import read_metrics

MIB = 2**20


# ---- collectives of a step: S12/16 with 65,536 prototypes


@pytest.fixture(scope="module")
def exchanged(server: Server, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The collectives that each of two ranks recorded (exchange_process.py)."""
    out = tmp_path_factory.mktemp("exchange") / "rank"
    server.two_ranks("exchange_process.py", out, timeout=300)
    return [json.loads(Path(f"{out}-{rank}.json").read_text()) for rank in range(2)]


def all_reduces(step: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the all-reduces of a step in start order."""
    return [message for message in step["messages"] if message["kind"] == "allreduce"]


def test_gradient_buckets_are_reduced_during_backward(exchanged: list[dict[str, Any]]) -> None:
    for seen in exchanged:
        *buckets, own = all_reduces(seen["steps"][1])
        assert len(buckets) > 4
        assert sum(bucket["bytes"] for bucket in buckets) == seen["gradient_bytes"]
        assert all(bucket["bytes"] <= 30 * MIB for bucket in buckets[1:])  # 25 MiB and the tensor that fills the bucket
        started_after = [bucket["arrived"] for bucket in buckets]
        assert started_after == sorted(started_after)
        # All buckets but the last start before backward ends; the last holds less than a tenth of the bytes.
        assert all(arrived < seen["gradients"] for arrived in started_after[:-1])
        assert buckets[-1]["bytes"] < seen["gradient_bytes"] / 10
        assert own["arrived"] == seen["gradients"]


def test_first_bucket_holds_only_prototype_gradients(exchanged: list[dict[str, Any]]) -> None:
    """Prototypes are more than a third of all gradient bytes."""
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
        assert all(message["arrived"] > seen["gradients"] for message in accumulating)  # during the second pass


def test_step_reduces_one_message_besides_gradients(exchanged: list[dict[str, Any]]) -> None:
    """It holds the failure flag, the sum of the teacher logits, loss, counts, metrics and BatchNorm statistics."""
    for seen in exchanged:
        for step in seen["steps"][1:]:
            assert {message["kind"] for message in step["messages"]} == {"allreduce"}
            assert all_reduces(step)[-1]["bytes"] == seen["own_bytes"]
            gradients = sum(message["bytes"] for message in all_reduces(step)[:-1])
            assert gradients == seen["gradient_bytes"]  # so exactly one message is left
        # DistributedDataParallel broadcasts the bucket order once per run.
        assert [m["kind"] for m in seen["steps"][0]["messages"] if m["kind"] != "allreduce"] == ["broadcast"] * 2


def test_step_reads_no_device_value_until_it_is_logged(exchanged: list[dict[str, Any]]) -> None:
    for seen in exchanged:
        assert [step["host_waits"] for step in seen["steps"]] == [[], [], []]
        assert seen["logged"]["host_waits"]  # control: logging reads values
        assert seen["logged"]["messages"] == []  # logging sends no message


# ---- equal losses on 1, 2 and 4 ranks

STEPS = 16
TOLERANCE = 5e-5
"""For a loss near 2 after 16 steps; AdamW amplifies differences in summation order. Ten times the measured 5e-6."""


def losses_in(folder: Path) -> list[float]:
    """Return the loss of each step."""
    return [record["loss"] for record in read_metrics(folder / "metrics.jsonl") if record["kind"] == "step"]


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_losses_on_several_ranks_equal_losses_on_one_rank(start: Start, ranks: int) -> None:
    """1, 2 and 4 ranks run 4, 2 and 1 forward passes of 4 images: the global batch is always 16."""
    flags = ["--batch-size-per-gpu", "4", "--max-steps", STEPS, "--lr", "2e-3", "--lr-reference-batch", "0"]

    def losses(name: str, ranks: int, drop_path: float = 0.2) -> list[float]:
        own = ["--accumulation-steps", 4 // ranks, "--drop-path-rate", drop_path]
        run = start(*flags, *own, name=name, ranks=ranks)
        assert run.wait() == [0] * ranks, run.err()
        return losses_in(run.folder)

    one = losses("one", 1)
    assert len(one) == STEPS
    assert losses("several", ranks) == pytest.approx(one, abs=TOLERANCE)
    assert max(one) - min(one) > 0.5  # the loss changes
    # Control: a slightly different drop path rate changes losses far more than the tolerance.
    other = losses("other", 1, 0.21)
    assert max(abs(a - b) for a, b in zip(one, other, strict=True)) > 100 * TOLERANCE


# ---- two hosts under torchrun


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[tuple[Host, Host]]:
    """Two hosts with a network link, or a skip where they cannot be created."""
    with ExitStack() as stack:
        try:
            made = stack.enter_context(two_hosts(tmp_path))
        except OSError as error:
            pytest.skip(f"two hosts cannot be made here: {error}")
        yield made


@pytest.mark.slow
def test_torchrun_on_two_hosts_matches_two_ranks_on_one_host(
    hosts: tuple[Host, Host], server: Server, photos: Path, tmp_path: Path
) -> None:
    """Each host has its own output directory, which shows that only rank 0 writes."""
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
    assert losses_in(tmp_path / hosts[0].name) == losses_in(tmp_path / "here")  # two ranks: one summation order
    assert differing_bits(state_in(tmp_path / hosts[0].name), state_in(tmp_path / "here")) == []


@pytest.mark.slow
def test_ranks_of_both_hosts_exit_in_time_when_link_goes_down(
    hosts: tuple[Host, Host], photos: Path, tmp_path: Path
) -> None:
    """The connections stay open, so each side waits for the other."""
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
    time.sleep(1.5)  # both ranks have written their phase to the store
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
    assert jobs[0].wait(timeout=30) == 1  # torchrun's code; on the other host torchrun retries for minutes
