"""The one exception a user's mistake becomes, and the sentence it is shown as."""

from __future__ import annotations

import contextlib
import difflib
import errno
import io
import os
import re
import select
import signal
import sys
from collections.abc import Callable, Iterable
from typing import NoReturn, TextIO


class InputError(ValueError):
    """Something the user gave cannot be used.

    The message says what was found, what was expected and what to type next. Runners print it alone, without a
    traceback, and exit with code 2.
    """


UNREAD = 141
"""Exit code of a command whose reader went away (``... | head``): the shell's for SIGPIPE."""

DIVERGED, LOST, PREEMPTED = 3, 4, 75
"""Exit codes of a run that ends itself. DIVERGED: too many consecutive steps were not finite, or all
were. LOST: a phase exceeded --hang-timeout, or a rank or a loader process died. PREEMPTED: it received a signal and has
saved (75 is sysexits.h's "temporary failure: try again")."""


STOP_SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))
"""Signals that ask a run to save and end with code PREEMPTED. Windows has no SIGUSR1."""


class RunStopped(Exception):
    """The run ends here, on every process, with an exit code that scripts can tell from others.

    An empty sentence: another rank prints it.
    """

    def __init__(self, code: int, sentence: str) -> None:
        super().__init__(sentence)
        self.code = code


def near_matches(word: str, candidates: Iterable[str], count: int = 3, prefix: str = "") -> str:
    """A clause such as ``; did you mean a or b?`` for a misspelt ``word``, or an empty string.

    ``prefix`` is put before each candidate that is shown.
    """
    close = difflib.get_close_matches(word, list(candidates), n=count, cutoff=0.6)
    return f"; did you mean {' or '.join(prefix + name for name in close)}?" if close else ""


def one_line(error: BaseException) -> str:
    """What another library's error says, in 200 letters of one line, without a full stop; perhaps nothing."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())[:200].rstrip(".")


def printable(text: str) -> str:
    """The text with what could steer a terminal, or what no terminal can show, as escapes: names come from others."""
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode("ascii") for letter in text
    )


LESS_MEMORY = "give it smaller batches or images (--help lists its flags), or a machine with more memory"
"""What helps a command that knows nothing better."""

_AMOUNT = re.compile(r"(?:tried to allocate|unable to allocate) ([\d.]+) ?(bytes|[KMGTPE]?i?B)", re.IGNORECASE)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory did not suffice. PyTorch's own are RuntimeErrors, of several classes."""
    words = ("out of memory", "can't allocate memory")
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(w in str(error) for w in words))


def _out_of_memory(error: BaseException, advice: str) -> str:
    asked = _AMOUNT.search(str(error))
    amount = " ".join(asked.groups()) if asked else ""
    if asked and asked[2] == "bytes":
        amount = f"{float(asked[1]) / 1e9:,.1f} GB"
    return f"out of memory{f' ({amount} more were asked for)' if amount else ''}: {advice}"


def run_main(main: Callable[[], None], less_memory: str = LESS_MEMORY) -> None:
    """Run a command's ``main`` and turn the user's mistakes into one sentence and exit code 2.

    Only what a user can mend is caught: :class:`InputError`, a full disk, too little memory; and :class:`RunStopped`,
    with its own exit code. Where nobody reads any longer what is printed, it ends without words, with code 141.
    Anything else is a fault of ours and keeps its traceback.

    Args:
        less_memory: what to type where the memory does not suffice.
    """
    try:
        _to_the_last_word(main)
    except InputError as error:
        sentence = str(error)
    except RunStopped as stopped:
        _end(str(stopped), stopped.code)
    except OSError as error:
        if isinstance(error, BrokenPipeError) and (_is_unread(sys.stdout) or _is_unread(sys.stderr)):
            _end("", UNREAD)
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = f" while writing {error.filename}" if error.filename else ""
        sentence = (
            f"no space left on the disk{where}: free some, or choose another directory, then run the same command"
        )
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        sentence = _out_of_memory(error, less_memory)
    except KeyboardInterrupt:
        _end("interrupted: run the same command to resume from the last checkpoint or cache", 130)
    else:
        return
    _end(f"error: {sentence}", 2)


def _to_the_last_word(main: Callable[[], None]) -> None:
    """What ``main`` printed is out when it ends: else Python, at its own end, would find that it cannot be."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # names of files need not be UTF-8
            stream.reconfigure(errors="backslashreplace")
    try:
        main()
    except SystemExit:  # of --help, too
        _flush(sys.stdout)
        raise
    _flush(sys.stdout)


def _end(sentence: str, code: int) -> NoReturn:
    _write_out(sys.stdout)
    with contextlib.suppress(OSError):  # on a full disk the code still says what the sentence cannot
        if sentence:
            print("\n".join(map(printable, sentence.split("\n"))), file=sys.stderr, flush=True)
    _write_out(sys.stderr)
    sys.exit(code)


def _flush(stream: TextIO | None) -> None:
    if stream is not None:  # as it is where a process is started without
        stream.flush()


def _write_out(stream: TextIO | None) -> None:
    """What was printed and cannot be written goes nowhere: Python would try once more at its end, complain, and change
    the exit code."""
    try:
        _flush(stream)
    except OSError:
        with contextlib.suppress(OSError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())  # type: ignore[union-attr]  # without a stream nothing is raised
            os.close(nowhere)


def _is_unread(stream: TextIO | None) -> bool:
    """Whether this is the pipe that broke. Other pipes lead to processes of ours, and are no matter of the user's."""
    if stream is None:
        return False
    try:
        poll = select.poll()
        poll.register(stream.fileno(), 0)  # what broke is told unasked
        return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
    except (OSError, AttributeError):  # not a file at all; no poll on Windows
        return False
