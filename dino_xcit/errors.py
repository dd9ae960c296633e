"""The one exception a user's mistake becomes, and the sentence it is shown as."""

from __future__ import annotations

import contextlib
import difflib
import errno
import sys
from collections.abc import Callable, Iterable
from typing import NoReturn

from dino_xcit.console import printable


class InputError(ValueError):
    """Something the user gave cannot be used.

    The message says what was found, what was expected and what to type next. Runners print it alone, without a
    traceback, and exit with code 2.
    """


DIVERGED, LOST, PREEMPTED = 3, 4, 75
"""Exit codes of a run that stopped by itself: steps were not finite many times in a row; another process was lost or
stands still; it was asked to stop and has saved (75 is sysexits.h's "temporary failure: try again")."""


class RunStopped(Exception):
    """The run ends here, on every process, with an exit code that scripts can tell from others.

    An empty sentence: another process says it.
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


def run_main(main: Callable[[], None]) -> None:
    """Run a command's ``main`` and turn the user's mistakes into one sentence and exit code 2.

    Only mistakes that a user can mend are caught: :class:`InputError`, and a full disk; and :class:`RunStopped`, with
    its own exit code. Anything else is a fault of ours and keeps its traceback.
    """
    try:
        main()
    except InputError as error:
        sentence = str(error)
    except RunStopped as stopped:
        _end(str(stopped), stopped.code)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = f" while writing {error.filename}" if error.filename else ""
        sentence = (
            f"no space left on the disk{where}: free some, or choose another directory, then run the same command"
        )
    except RuntimeError as error:  # PyTorch's own out-of-memory errors are RuntimeErrors, of several classes
        if not any(words in str(error) for words in ("out of memory", "can't allocate memory")):
            raise
        sentence = (
            f"out of memory ({str(error).strip().splitlines()[0][:160]}): lower --batch-size-per-gpu "
            "(--accumulation-steps makes up for it when training), the crop sizes or --out-dim"
        )
    except KeyboardInterrupt:
        print("interrupted: the same command carries on from the last checkpoint or cache", file=sys.stderr)
        sys.exit(130)
    else:
        return
    _end(f"error: {sentence}", 2)


def _end(sentence: str, code: int) -> NoReturn:
    with contextlib.suppress(OSError):  # on a full disk the code still says what the sentence cannot
        sys.stdout.flush()
        if sentence:
            print("\n".join(map(printable, sentence.split("\n"))), file=sys.stderr, flush=True)
    sys.exit(code)
