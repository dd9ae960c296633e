"""``--against DIR`` of the benchmarks: two commits in turn; and a killed benchmark leaves no process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from ranks import ENVIRONMENT, Server

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
MARK = "BENCHMARK_UNDER_TEST"
needs_proc = pytest.mark.skipif(sys.platform != "linux", reason="it looks for processes in /proc")


def earlier(folder: Path, script: str) -> Path:
    """A checkout of an earlier commit, whose step.py is ``script``."""
    (folder / "earlier" / "benchmarks").mkdir(parents=True)
    (folder / "earlier" / "benchmarks" / "step.py").write_text(script)
    return folder / "earlier"


# ---- the comparison

BOTH = """
import argparse, sys
sys.path.insert(0, {benchmarks!r})
import against
from pathlib import Path
from dino_xcit.errors import run_main
against.ROOT = Path({this!r})
parser = argparse.ArgumentParser()
parser.add_argument("--quick", action="store_true")
parser.add_argument("--k", nargs="+")
against.add_arguments(parser)
figures = {{"speed": (("rows", "ours", "img_per_s"), "more"), "time": (("s",), "less"), "new": (("new",), "less")}}
run_main(lambda: against.compare_commits("step.py", figures, parser.parse_args()))
"""
TURN = """
import json, os, sys
from pathlib import Path
root = Path(__file__).parent.parent
assert os.environ["PYTHONPATH"] == str(root)
with (root.parent / "turns").open("a") as file:
    print(json.dumps([root.name, *sys.argv[1:]]), file=file)
turn = len((root.parent / "turns").read_text().splitlines())
print("a table")
print(json.dumps({"rows": {"ours": {"img_per_s": SPEED * turn}}, "s": 2.0}))
"""


def test_both_commits_run_in_turn_with_the_same_arguments_and_ratios_are_of_a_round(
    server: Server, tmp_path: Path
) -> None:
    that = earlier(tmp_path, TURN.replace("SPEED", "1"))
    this = tmp_path / "this"
    (this / "benchmarks").mkdir(parents=True)
    (this / "benchmarks" / "step.py").write_text(TURN.replace("SPEED", "2"))
    script = tmp_path / "both.py"
    script.write_text(BOTH.format(benchmarks=str(BENCHMARKS), this=str(this)))
    done = server.python(script, "--k", "1", "2", "--against", str(that), "--quick", "--against-rounds", "2")
    assert done.returncode == 0, done.stderr
    turns = [json.loads(line) for line in (tmp_path / "turns").read_text().splitlines()]
    assert turns == [[name, "--k", "1", "2", "--quick"] for name in ("this", "earlier", "earlier", "this")]
    found = json.loads(done.stdout.splitlines()[-1])["against"]
    assert found["speed"]["rounds"] == [1.0, 2.6667]  # 2 x 1 over 2, then 2 x 4 over 3
    assert found["speed"]["ratio"] == pytest.approx(1.8333, abs=1e-4)
    assert found["time"] == {"ratio": 1.0, "rounds": [1.0, 1.0], "this": 2.0, "that": 2.0, "better": "less"}
    assert "new" not in found


@pytest.mark.parametrize(
    ("script", "code", "sentence"),
    [
        ("import sys; sys.exit(7)", 7, "a turn ended with code 7, expected 0 and a JSON object"),
        ("print('no JSON')", 1, "a turn ended with code 0, expected 0 and a JSON object in its last line"),
    ],
)
def test_a_turn_that_fails_is_a_sentence(server: Server, tmp_path: Path, script: str, code: int, sentence: str) -> None:
    that = earlier(tmp_path, script)
    both = tmp_path / "both.py"
    both.write_text(BOTH.format(benchmarks=str(BENCHMARKS), this=str(that)))
    done = server.python(both, "--against", str(that))
    assert done.returncode == code
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--against", "."], "has no benchmarks/step.py, expected a checkout of an earlier commit"),
        (["--against", str(BENCHMARKS.parent), "--against-rounds", "0"], "--against-rounds is 0, expected at least 1"),
    ],
)
def test_a_folder_without_the_script_is_a_sentence(server: Server, words: list[str], sentence: str) -> None:
    done = server.python(BENCHMARKS / "step.py", *words)
    assert done.returncode == 2
    assert sentence in done.stderr


# ---- killed


def marked(mark: str) -> dict[int, str]:
    """Command lines of the living processes that have ``mark`` in their environment, which is handed down."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            alive = folder.joinpath("stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
            if alive and f"{MARK}={mark}".encode() in folder.joinpath("environ").read_bytes().split(b"\0"):
                found[int(folder.name)] = folder.joinpath("cmdline").read_text().replace("\0", " ")
        except OSError:  # gone meanwhile, or of somebody else
            continue
    return found


def until(happened: Callable[[], bool], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not (there := happened()) and time.monotonic() < end:
        time.sleep(0.02)
    return there


@contextmanager
def benchmark(folder: Path, *words: str) -> Iterator[tuple[subprocess.Popen, str]]:
    """step.py in a process of its own, and the mark of all processes that it starts."""
    mark = str(folder)
    process = subprocess.Popen(
        [sys.executable, str(BENCHMARKS / "step.py"), "--quick", *words],
        env=os.environ | ENVIRONMENT | {MARK: mark, "TMPDIR": str(folder)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield process, mark
    finally:
        for pid in marked(mark):
            os.kill(pid, signal.SIGKILL)
        process.wait()


def holds(mark: str, name: str) -> Callable[[], bool]:
    return lambda: any(name in command for command in marked(mark).values())


@needs_proc
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_benchmark_leaves_no_process(tmp_path: Path, number: signal.Signals) -> None:
    with benchmark(tmp_path, "--only", "ours-fp32", "--rounds", "1") as (process, mark):
        assert until(holds(mark, "step_worker.py"), 15)
        for pid, command in marked(mark).items():
            if "step_worker.py" in command:
                os.kill(pid, signal.SIGSTOP)  # it can notice nothing by itself
        process.send_signal(number)
        assert until(lambda: not marked(mark), 5), marked(mark)


@needs_proc
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_comparison_leaves_nothing_of_the_earlier_commit(tmp_path: Path, number: signal.Signals) -> None:
    """Its workers know nothing of this."""
    that = earlier(tmp_path, "import subprocess; subprocess.run(['sleep', '1000'])")
    this = tmp_path / "this.py"
    this.write_text(BOTH.format(benchmarks=str(BENCHMARKS), this=str(that)))
    environment = os.environ | ENVIRONMENT | {MARK: str(tmp_path)}
    with subprocess.Popen([sys.executable, str(this), "--against", str(that)], env=environment) as process:
        try:
            assert until(holds(str(tmp_path), "sleep"), 15)
            process.send_signal(number)
            assert until(lambda: not marked(str(tmp_path)), 5), marked(str(tmp_path))
        finally:
            for pid in marked(str(tmp_path)):
                os.kill(pid, signal.SIGKILL)
