"""Files beside the images of a folder that might be images too: they are passed over, and that is said."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import PurePosixPath

from dino_xcit.errors import printable
from dino_xcit.runtime import logging as log
from dino_xcit.runtime.logging import counted

_NEVER_IMAGES = frozenset({
    ".txt", ".md", ".rst", ".json", ".jsonl", ".csv", ".tsv", ".xml", ".yaml", ".yml", ".toml", ".html", ".htm", ".css",
    ".js", ".pdf", ".log", ".ini", ".cfg", ".db", ".sqlite", ".py", ".sh", ".ipynb", ".mat", ".npy", ".npz", ".pt",
    ".pth", ".pkl", ".h5", ".parquet", ".md5", ".sha256", ".lock", ".url", ".tmp", ".bak", ".part", ".aae", ".xmp",
})  # fmt: skip
"""What lies beside images in many data sets, and nobody takes for one."""

_NAMED = 5
_LONGEST_ENDING = 8


class PassedOver:
    """Counts files by their endings."""

    def __init__(self, names: Iterable[str] = ()) -> None:
        """``names``: of files that are no images."""
        self._endings: Counter[str] = Counter()
        for name in names:
            self.note(name)

    def note(self, name: str) -> None:
        """A file's name, or its path with slashes. Hidden ones are of no interest."""
        path = PurePosixPath(name)
        ending = path.suffix.lower()
        if not path.name.startswith(".") and ending not in _NEVER_IMAGES:
            known = 1 < len(ending) <= _LONGEST_ENDING and not ending[1:].isdigit()  # "IMG 2.10" has none
            self._endings[ending if known else ""] += 1

    def __str__(self) -> str:
        """``12 .heic, 1 without an ending``; empty where there was nothing."""
        shown = [
            f"{count:,} {printable(ending) or 'without an ending'}"
            for ending, count in self._endings.most_common(_NAMED)
        ]
        others = sum(self._endings.values()) - sum(count for _, count in self._endings.most_common(_NAMED))
        return ", ".join([*shown, *([f"{others:,} others"] if others else [])])

    def warn(self, root: str, read: str) -> None:
        """Warn once a run, if there was anything. ``read``: the endings that are read."""
        if total := sum(self._endings.values()):
            log.warning(f"{printable(root)}: {counted(total, 'file')} passed over ({self}): images end in {read}")
