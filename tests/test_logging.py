"""Lines of the main process: one rank speaks, a full disk is no error, a closed pipe is one."""

from __future__ import annotations

import errno
import io
import os
import sys

import pytest

from dino_xcit.runtime import logging as log


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


def test_a_line_does_not_tear_a_bar(capsys: pytest.CaptureFixture[str]) -> None:
    with log.progress_bar(3, "reading", shown=True) as bar:
        bar.update()
        log.info("between")
    assert capsys.readouterr().out == "between\n"


def test_a_full_disk_is_borne_and_a_closed_pipe_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    log.info("nowhere")
    monkeypatch.setattr(sys, "stdout", Failing(errno.ENOSPC))
    log.info("lost")
    monkeypatch.setattr(sys, "stdout", Failing(errno.EPIPE))
    with pytest.raises(BrokenPipeError):
        log.info("unread")
