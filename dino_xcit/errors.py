"""The one exception a user's mistake becomes, and the sentence it is shown as."""

from __future__ import annotations

import difflib
import errno
import sys
from collections.abc import Callable, Iterable


class InputError(ValueError):
    """Something the user gave cannot be used.

    The message says what was found, what was expected and what to type next. Runners print it alone, without a
    traceback, and exit with code 2.
    """


def near_matches(word: str, candidates: Iterable[str], count: int = 3, prefix: str = "") -> str:
    """A clause such as ``; did you mean a or b?`` for a misspelt ``word``, or an empty string.

    ``prefix`` is put before each candidate that is shown.
    """
    close = difflib.get_close_matches(word, list(candidates), n=count, cutoff=0.6)
    return f"; did you mean {' or '.join(prefix + name for name in close)}?" if close else ""


def run_main(main: Callable[[], None]) -> None:
    """Run a command's ``main`` and turn the user's mistakes into one sentence and exit code 2.

    Only mistakes that a user can mend are caught: :class:`InputError`, and a full disk. Anything else is a fault of
    ours and keeps its traceback.
    """
    try:
        main()
    except InputError as error:
        sentence = str(error)
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
    sys.stdout.flush()
    print(f"error: {sentence}", file=sys.stderr, flush=True)
    sys.exit(2)
