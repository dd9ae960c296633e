"""What is shown on the screen."""

from __future__ import annotations

import io
import sys

import pytest

from dino_xcit.console import printable, progress_bar
from dino_xcit.errors import InputError, run_main


def test_a_bar_says_what_it_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", shown := io.StringIO())
    with progress_bar(8, "indexing", shown=True, unit="shard") as bar:
        bar.delay = bar.mininterval = 0
        bar.update(4)
        bar.refresh()
    assert "indexing" in shown.getvalue()
    assert "shard/s" in shown.getvalue() or "s/shard" in shown.getvalue()


def test_an_error_s_sentence_cannot_steer_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    def mistake() -> None:
        raise InputError("in a.tar: b\x1b]0;x\x07.cls holds 'x'\nand more")

    with pytest.raises(SystemExit):
        run_main(mistake)
    assert capsys.readouterr().err == "error: in a.tar: b\\x1b]0;x\\x07.cls holds 'x'\nand more\n"


def test_names_cannot_steer_a_terminal_nor_be_more_than_it_can_show() -> None:
    assert printable("Bär 日本.jpg") == "Bär 日本.jpg"
    shown = printable("a\x1b[2J\n\udcff\u202egpj.jpg")
    assert shown == r"a\x1b[2J\n\udcff\u202egpj.jpg"
    shown.encode("utf-8")
