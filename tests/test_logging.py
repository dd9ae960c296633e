"""Lines of the main process: one rank speaks, a full disk is no error, a closed pipe is one."""

from __future__ import annotations

import errno
import io
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dino_xcit.runtime import logging as log

ROOT = Path(__file__).parent.parent


class Failing(io.StringIO):
    """A stdout that cannot be written."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def write(self, text: str) -> int:
        raise OSError(self.number, os.strerror(self.number))


def test_only_the_main_rank_prints(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    log.info("a")
    log.warning("b")
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 1)
    log.info("c")
    assert capsys.readouterr() == ("a\nwarning: b\n", "")


def test_the_standard_logging_level_applies(capsys: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("dino_xcit")
    logger.setLevel("WARNING")
    log.info("100% hidden")
    log.warning("100% shown")
    logger.setLevel("INFO")
    assert capsys.readouterr().out == "warning: 100% shown\n"


def test_a_line_does_not_tear_a_bar(capsys: pytest.CaptureFixture[str]) -> None:
    with log.progress_bar(3, "reading", shown=True) as bar:
        bar.update()
        log.info("between")
    assert capsys.readouterr().out == "between\n"


def test_a_full_disk_is_borne_and_a_closed_pipe_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
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
def test_names_that_are_not_utf8_are_printed_as_escapes_under_a_strict_encoding(through: str) -> None:
    code = (
        "from dino_xcit.errors import run_main; from dino_xcit.runtime import logging as log;"
        f"run_main(lambda: {through}('caf\\udce9.jpg'))"
    )
    environment = os.environ | {"PYTHONIOENCODING": "utf-8:strict"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=ROOT)
    assert (done.stdout, done.returncode) == ("caf\\udce9.jpg\n", 0), done.stderr
