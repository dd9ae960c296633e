"""User errors, exit codes, and the top-level error handler of all commands."""

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
    """Invalid user input.

    The message contains what was found, what was expected and what to type next. Runners print it without a traceback
    and exit with code 2.
    """


UNREAD = 141
"""Exit code if stdout or stderr is a closed pipe (``... | head``): the shell's code for SIGPIPE."""

DIVERGED, LOST, PREEMPTED = 3, 4, 75
"""Exit codes of a run. DIVERGED: too many consecutive skipped steps, only skipped steps, or a verdict of collapse with
--on-collapse stop. LOST: a phase exceeded --hang-timeout, or a rank or a loader worker died. PREEMPTED: stopped by a
signal after a save (75 is EX_TEMPFAIL in sysexits.h)."""


STOP_SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))
"""Signals on which a run saves and exits with code PREEMPTED. Windows has no SIGUSR1."""


class RunStopped(Exception):
    """Ends the run on every rank with a distinct exit code.

    The sentence is empty on ranks that print nothing.
    """

    def __init__(self, code: int, sentence: str) -> None:
        super().__init__(sentence)
        self.code = code


def near_matches(word: str, candidates: Iterable[str], count: int = 3, prefix: str = "") -> str:
    """Return a clause such as ``; did you mean a or b?`` for a misspelt ``word``, or an empty string.

    ``prefix`` is prepended to each suggestion.
    """
    close = difflib.get_close_matches(word, list(candidates), n=count, cutoff=0.6)
    return f"; did you mean {' or '.join(prefix + name for name in close)}?" if close else ""


def one_line(error: BaseException) -> str:
    """Return the message of a library's error as one line of at most 200 characters without a full stop."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())[:200].rstrip(".")


def printable(text: str) -> str:
    """Escape unprintable characters, such as terminal control sequences in file names."""
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode("ascii") for letter in text
    )


SHARED_MEMORY = "/dev/shm"
"""Folder through which loader workers pass tensors, 64 MB in a container by default."""
MORE_SHARED_MEMORY = "start the container with --ipc=host or a larger --shm-size"
"""Advice if shared memory is too small."""
LESS_MEMORY = "use smaller batches or images (--help lists the flags), or a machine with more memory"
"""Default advice for out-of-memory errors."""

_AMOUNT = re.compile(r"(?:tried to allocate|unable to allocate) ([\d.]+) ?(bytes|[KMGTPE]?i?B)", re.IGNORECASE)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means out of memory. PyTorch raises several subclasses of RuntimeError."""
    words = ("out of memory", "can't allocate memory")
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(w in str(error) for w in words))


def _out_of_memory(error: BaseException, advice: str) -> str:
    found = _AMOUNT.search(str(error))
    amount = " ".join(found.groups()) if found else ""
    if found and found[2] == "bytes":
        amount = f"{float(found[1]) / 1e9:,.1f} GB"
    return f"out of memory{f' (tried to allocate {amount})' if amount else ''}: {advice}"


def run_main(main: Callable[[], None], less_memory: str = LESS_MEMORY) -> None:
    """Run a command's ``main``; report user errors as one sentence with exit code 2.

    User errors are :class:`InputError`, a full disk and out of memory. :class:`RunStopped` has its own exit code. If
    stdout or stderr is a closed pipe, exit with code 141. Other exceptions are bugs and keep their traceback.

    Args:
        less_memory: advice for out-of-memory errors.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # of check_flags
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        _run_and_flush(main)
    except InputError as error:
        sentence = str(error)
    except RunStopped as stopped:
        _end(str(stopped), stopped.code)
    except OSError as error:
        if isinstance(error, BrokenPipeError) and (_is_closed_pipe(sys.stdout) or _is_closed_pipe(sys.stderr)):
            _end("", UNREAD)
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = f" while writing {error.filename}" if error.filename else ""
        sentence = (
            f"no space left on the disk{where}: free disk space or choose another directory, then run the same command"
        )
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        sentence = _out_of_memory(error, less_memory)
    except KeyboardInterrupt:
        _end("interrupted: the same command resumes from the last checkpoint or cache, if there is one", 130)
    else:
        return
    _end(f"error: {sentence}", 2)


def _run_and_flush(main: Callable[[], None]) -> None:
    """Run ``main`` and flush stdout, so that a closed pipe raises here and not when Python exits."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # file names may contain bytes that are not UTF-8
            stream.reconfigure(errors="backslashreplace")
    try:
        main()
    except SystemExit:  # such as from --help
        _flush(sys.stdout)
        raise
    _flush(sys.stdout)


def _end(sentence: str, code: int) -> NoReturn:
    _flush_or_discard(sys.stdout)
    with contextlib.suppress(OSError):  # on a full disk only the exit code reports the error
        if sentence:
            print("\n".join(map(printable, sentence.split("\n"))), file=sys.stderr, flush=True)
    _flush_or_discard(sys.stderr)
    sys.exit(code)


def _flush(stream: TextIO | None) -> None:
    if stream is not None:  # None if the process was started without the stream
        stream.flush()


def _flush_or_discard(stream: TextIO | None) -> None:
    """Flush a stream, or discard its buffer: Python would flush again at exit, fail and change the exit code."""
    try:
        _flush(stream)
    except OSError:
        with contextlib.suppress(OSError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, stream.fileno())  # type: ignore[union-attr]  # flushing None does not raise
            os.close(null)


def _is_closed_pipe(stream: TextIO | None) -> bool:
    """Whether the stream is the pipe that broke. Other broken pipes, such as to workers, are not user errors."""
    if stream is None:
        return False
    try:
        poll = select.poll()
        poll.register(stream.fileno(), 0)  # POLLERR and POLLHUP are always reported
        return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
    except (OSError, AttributeError):  # not a file; no poll on Windows
        return False
