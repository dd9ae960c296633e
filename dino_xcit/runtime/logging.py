"""Console output: messages of rank 0 through Python's ``logging``, and progress bars.

from dino_xcit.runtime import logging as log
log.info("resuming after step 12")
"""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import logging
import sys
from typing import TextIO

from tqdm import tqdm

from dino_xcit.errors import printable
from dino_xcit.runtime import distributed


class Console(logging.Handler):
    """Prints to stdout on rank 0, above progress bars.

    Ignores a full disk and a closed terminal; a closed pipe raises.
    """

    def emit(self, record: logging.LogRecord) -> None:
        if not distributed.is_main() or sys.stdout is None:
            return
        prefix = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        try:
            tqdm.write(prefix + record.getMessage(), file=sys.stdout)
            sys.stdout.flush()
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
                raise


logger = logging.getLogger("dino_xcit")
"""``logging.getLogger("dino_xcit").setLevel("WARNING")`` silences everything except warnings."""
logger.setLevel(logging.INFO)
logger.propagate = False
logger.addHandler(Console())


def only_warnings() -> None:
    """Log no information from now on."""
    logger.setLevel(logging.WARNING)


def info(text: str) -> None:
    """Log a message; characters that a terminal cannot show become escapes."""
    logger.info(_printable(text), stacklevel=2)


def warning(text: str) -> None:
    """Log something that the user may want to change."""
    logger.warning(_printable(text), stacklevel=2)


def _printable(text: str) -> str:
    return "\n".join(map(printable, text.split("\n")))


warn_once = functools.cache(warning)


class Lines(io.TextIOBase):
    """Stream that turns tqdm's in-place updates into lines, for log files."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        line = text.replace("\r", "").strip()
        if line:
            with contextlib.suppress(OSError):  # a full disk must not end the run
                self._stream.write(line + "\n")
                self._stream.flush()
        return len(text)


def counted(count: int, noun: str) -> str:
    """Format a count with its noun: ``1 image``, ``2,000 images``, ``0 classes``, ``3 queries``."""
    if count == 1:
        return f"1 {noun}"
    if noun.endswith("y"):
        return f"{count:,} {noun[:-1]}ies"
    return f"{count:,} {noun}{'es' if noun.endswith(('s', 'tch')) else 's'}"


def progress_bar(total: int, description: str, shown: bool, done: int = 0, unit: str = "img") -> tqdm:
    """Return a progress bar on stderr; on a terminal it disappears when closed.

    In a file it writes a line every 15 s, and nothing for shorter work.
    """
    terminal = sys.stderr.isatty()
    return tqdm(
        total=total,
        initial=done,
        desc=description,
        unit=unit,
        disable=not shown,
        file=sys.stderr if terminal else Lines(sys.stderr),
        leave=False,
        dynamic_ncols=terminal,
        mininterval=0.5 if terminal else 15.0,
        delay=0 if terminal else 15,
        ascii=not terminal,
        bar_format="{desc} {percentage:3.0f}% |{bar:20}| {n_fmt}/{total_fmt} "
        "[{elapsed} < ETA {remaining}, {rate_fmt}{postfix}]",
    )
