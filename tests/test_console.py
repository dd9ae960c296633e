"""What is shown on the screen."""

from __future__ import annotations

import io
import os
import subprocess
import sys

import pytest

from dino_xcit.errors import InputError, printable, run_main
from dino_xcit.runtime.logging import progress_bar


def test_a_bar_says_what_it_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", shown := io.StringIO())
    with progress_bar(8, "indexing", shown=True, unit="shard") as bar:
        bar.delay = bar.mininterval = 0
        bar.update(4)
        bar.refresh()
    assert "indexing" in shown.getvalue()
    assert "shard/s" in shown.getvalue() or "s/shard" in shown.getvalue()


def test_names_and_sentences_cannot_steer_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    def mistake() -> None:
        raise InputError("in a.tar: b\x1b]0;x\x07.cls holds 'x'\nand more")

    with pytest.raises(SystemExit):
        run_main(mistake)
    assert capsys.readouterr().err == "error: in a.tar: b\\x1b]0;x\\x07.cls holds 'x'\nand more\n"
    assert printable("Bär 日本.jpg") == "Bär 日本.jpg"
    assert printable("a\x1b[2J\n\udcff\u202egpj.jpg") == r"a\x1b[2J\n\udcff\u202egpj.jpg"


# ---- what nobody reads

SAYS_MORE = """
import sys
from dino_xcit.errors import InputError, run_main
def main():
    {0}
run_main(main)
"""
PRINT = "print('much' * 100_000)"


@pytest.mark.parametrize(("stream", "does", "code", "options"), [
    ("stdout", PRINT, 141, []),
    ("stdout", PRINT, 141, ["-u"]),  # as run_slurm.py starts a run
    ("stdout", "print('a word')", 141, []),  # too little to be written before the end
    ("stdout", "print('a word'); sys.exit(0)", 141, []),  # as --help does
    ("stdout", "print('a word'); raise InputError('a mistake')", 2, []),
    ("stdout", "print('a word'); raise KeyboardInterrupt", 130, []),
    ("stderr", "print('a word', file=sys.stderr)", 141, []),
    ("stderr", "raise InputError('a mistake')", 2, []),
])  # fmt: skip
def test_a_command_whose_reader_went_away_ends_without_a_traceback(
    stream: str, does: str, code: int, options: list[str]
) -> None:
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


def test_a_pipe_that_breaks_elsewhere_is_a_fault_of_ours() -> None:
    def main() -> None:
        raise BrokenPipeError(32, "Broken pipe")

    with pytest.raises(BrokenPipeError):
        run_main(main)


def test_a_command_without_a_screen_runs_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    run_main(lambda: print("a word"))
    monkeypatch.undo()
