"""Console output: escaped names, closed pipes, messages of the main process, out-of-memory errors."""

from __future__ import annotations

import errno
import io
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from pretrain_fixtures import SMALL, pretrain_here

from dino_xcit.errors import InputError, printable, run_main
from dino_xcit.runtime import logging as log


def test_output_escapes_terminal_control_sequences(capsys: pytest.CaptureFixture[str]) -> None:
    def mistake() -> None:
        raise InputError("in a.tar: b\x1b]0;x\x07.cls holds 'x'\nand more")

    with pytest.raises(SystemExit):
        run_main(mistake)
    assert capsys.readouterr().err == "error: in a.tar: b\\x1b]0;x\\x07.cls holds 'x'\nand more\n"
    assert printable("Bär 日本.jpg") == "Bär 日本.jpg"
    assert printable("a\x1b[2J\n\udcff\u202egpj.jpg") == r"a\x1b[2J\n\udcff\u202egpj.jpg"


# ---- closed pipes

SAYS_MORE = """
import sys
from dino_xcit.errors import InputError, run_main
def main():
    {0}
run_main(main)
"""
PRINT = "print('much' * 100_000)"


@pytest.mark.parametrize(("stream", "does", "code", "options"), [
    ("stdout", PRINT, 141, ["-u"]),  # as run_slurm.py starts a run
    ("stdout", "print('a word'); sys.exit(0)", 141, []),  # as --help does
    ("stdout", "print('a word'); raise InputError('a mistake')", 2, []),
    ("stdout", "print('a word'); raise KeyboardInterrupt", 130, []),
    ("stderr", "raise InputError('a mistake')", 2, []),
])  # fmt: skip
def test_closed_pipe_ends_command_without_traceback(stream: str, does: str, code: int, options: list[str]) -> None:
    with subprocess.Popen(
        [sys.executable, *options, "-c", SAYS_MORE.format(does)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONUNBUFFERED": ""},
    ) as process:  # fmt: skip
        getattr(process, stream).close()
        other = process.stderr if stream == "stdout" else process.stdout
        assert other is not None
        said = other.read()
        assert process.wait(60) == code
    assert bool(said) is (stream == "stdout" and code != 141)
    assert "Traceback" not in said


IMPORTING = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell in the background ignores it
from dino_xcit.cli import check_flags
from dino_xcit.config import PretrainConfig
sys.argv = ["run_pretrain.py"]
check_flags(PretrainConfig, "run_pretrain.py")
interrupt = lambda: os.kill(os.getpid(), signal.SIGINT)
{0}
"""


@pytest.mark.parametrize(
    ("then", "code", "said"),
    [
        ("interrupt()", -2, ""),  # the shell shows 130
        ("from dino_xcit.errors import run_main; run_main(interrupt)", 130, "interrupted"),
    ],
)
def test_interrupt_prints_no_traceback(then: str, code: int, said: str) -> None:
    words = [sys.executable, "-c", IMPORTING.format(then)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert done.returncode == code
    assert done.stderr.startswith(said)
    assert ("Traceback" in done.stderr, bool(done.stderr)) == (False, bool(said))


def test_broken_pipe_error_unrelated_to_output_is_raised() -> None:
    def main() -> None:
        raise BrokenPipeError(32, "Broken pipe")

    with pytest.raises(BrokenPipeError):
        run_main(main)


def test_command_without_stdout_raises_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    run_main(lambda: print("a word"))
    monkeypatch.undo()


# ---- messages of the main process: a full disk is ignored, a closed pipe raises


ROOT = Path(__file__).parent.parent


class Failing(io.StringIO):
    """Stream whose writes fail with an errno."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def write(self, text: str) -> int:
        raise OSError(self.number, os.strerror(self.number))


def test_only_main_rank_prints(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    log.info("a")
    log.warning("b")
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 1)
    log.info("c")
    assert capsys.readouterr() == ("a\nwarning: b\n", "")


def test_log_ignores_full_disk_and_raises_on_closed_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    log.info("nowhere")
    monkeypatch.setattr(sys, "stdout", Failing(errno.ENOSPC))
    monkeypatch.setattr(sys, "stderr", Failing(errno.ENOSPC))
    log.info("lost")
    with log.progress_bar(2, "reading", shown=True) as bar:
        bar.delay = bar.mininterval = 0
        bar.update()
    monkeypatch.setattr(sys, "stdout", Failing(errno.EPIPE))
    with pytest.raises(BrokenPipeError):
        log.info("unread")


@pytest.mark.parametrize("through", ["log.info", "print"])
def test_non_utf8_names_are_printed_as_escapes_with_strict_encoding(through: str) -> None:
    code = (
        "from dino_xcit.errors import run_main; from dino_xcit.runtime import logging as log;"
        f"run_main(lambda: {through}('caf\\udce9.jpg'))"
    )
    environment = os.environ | {"PYTHONIOENCODING": "utf-8:strict"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=ROOT)
    assert (done.stdout, done.returncode) == ("caf\\udce9.jpg\n", 0), done.stderr


# ---- out of memory


def in_torch() -> None:
    torch.empty(1 << 50)


def in_numpy() -> None:
    np.ones(1 << 50, np.uint8)


def on_a_gpu() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.50 GiB. GPU 0 has a total capacity of 8 GiB")


@pytest.mark.parametrize(
    ("main", "amount"), [(in_torch, "4,503,599.6 GB"), (in_numpy, "1.00 PiB"), (on_a_gpu, "20.50 GiB")]
)
def test_out_of_memory_message_has_amount_and_no_command_flags(
    capsys: pytest.CaptureFixture[str], main: Callable[[], None], amount: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        run_main(main)
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: out of memory (tried to allocate {amount}): ")
    assert said.count("\n") == 1
    assert not any(flag in said for flag in ("--out-dim", "--accumulation-steps", "alloc_cpu.cpp"))


def test_pretraining_out_of_memory_message_names_its_flags(labelled_photos: Path) -> None:
    ended = pretrain_here("--data-path", labelled_photos, *SMALL, "--out-dim", "100000000000")
    ended.assert_refused("out of memory", "--batch-size-per-gpu", "--accumulation-steps", "--out-dim")


def test_logging_level_filters_messages(capsys: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("dino_xcit")
    logger.setLevel("WARNING")
    log.info("100% hidden")
    log.warning("100% shown")
    logger.setLevel("INFO")
    assert capsys.readouterr().out == "warning: 100% shown\n"
