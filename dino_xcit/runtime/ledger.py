"""Images that could not be read: which, why, and when there are too many of them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from dino_xcit.data.loader import Batch, Unreadable
from dino_xcit.errors import InputError
from dino_xcit.runtime import distributed

FILE_NAME = "unreadable_images.jsonl"

_ENOUGH = 10_000
"""A share of fewer images than this says little: they are counted as if they were so many."""


class Ledger:
    """Keeps ``unreadable_images.jsonl``: a line for each image that was replaced, its path and the cause.

    Every process notes what it met; the main one writes. An image is listed once, however often its turn comes.
    """

    def __init__(self, folder: Path, images: int, most: float, start_anew: bool, say: Callable[[str], None]) -> None:
        """``most`` is the share of the ``images`` that may be unreadable."""
        self.path = folder / FILE_NAME
        self._images, self._most, self._say = images, most, say
        self._noted: list[Unreadable] = []
        self._listed: set[int] = set()
        if distributed.is_main():
            try:
                self._take_up(start_anew)
            except OSError as error:
                self._say(f"warning: {self.path} cannot be used ({error.strerror})")

    def _take_up(self, start_anew: bool) -> None:
        if start_anew:
            self.path.unlink(missing_ok=True)
        self._listed = {row["index"] for row in read_ledger(self.path)}
        if self.path.exists() and not self.path.read_bytes().endswith(b"\n"):
            with open(self.path, "a", encoding="utf-8") as file:
                file.write("\n")  # a crash cut the last line short: the next one shall not be glued to it

    def __len__(self) -> int:
        return len(self._listed)

    def note(self, batches: Iterable[Batch]) -> int:
        """Remember what could not be read in these; how many there were."""
        before = len(self._noted)
        for batch in batches:
            self._noted += batch.unreadable
        return len(self._noted) - before

    def write(self) -> None:
        """Bring together what all processes noted, and list what is new. All processes call it."""
        noted, self._noted = self._noted, []
        everything = sorted(
            (bad for part in distributed.gather_objects(noted) for bad in part), key=lambda bad: (bad.epoch, bad.index)
        )
        if not distributed.is_main():
            return
        new = []
        for bad in everything:
            if bad.index not in self._listed:
                self._listed.add(bad.index)
                new.append(json.dumps(dataclasses.asdict(bad)) + "\n")
        if not new:
            return
        if len(new) == len(self._listed):
            self._say(f"warning: {everything[0].name} cannot be read ({everything[0].cause}); another image stands in "
                      f"for it, and for each further one that {self.path} lists")  # fmt: skip
        try:
            with open(self.path, "a", encoding="utf-8", errors="surrogateescape") as file:
                file.writelines(new)
        except OSError as error:
            self._say(f"warning: {self.path} cannot be written ({error.strerror})")

    def too_many(self, seen: int) -> bool:
        """Whether more than the allowed share of the first ``seen`` images could not be read."""
        counted = min(max(seen, _ENOUGH), self._images)
        return len(self._listed) > self._most * counted

    def refusal(self, seen: int) -> InputError:
        """What the run ends with where there are too many."""
        return InputError(
            f"{len(self._listed):,} of the first {min(seen, self._images):,} images cannot be read, more than "
            f"--max-unreadable {self._most:g} of them allows: {self.path} lists paths and causes; mend or remove them, "
            "or allow more"
        )


def read_ledger(path: Path) -> list[dict[str, Any]]:
    """The lines of a ledger; one cut short by a crash is left out."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8", errors="surrogateescape").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict) and isinstance(row.get("index"), int):
            rows.append(row)
    return rows
