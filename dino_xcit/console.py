"""Progress where there is no terminal."""

from __future__ import annotations

import contextlib
import io
from typing import TextIO


class Lines(io.TextIOBase):
    """What tqdm would redraw in place, as lines: for log files."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        line = text.replace("\r", "").strip()
        if line:
            with contextlib.suppress(OSError):  # a log on a full disk does not end a run
                self._stream.write(line + "\n")
                self._stream.flush()
        return len(text)
