"""The folder that an extraction goes into: whose it is, what is in it, and whether there is anything to do."""

from __future__ import annotations

import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from dino_xcit.data import Source
from dino_xcit.errors import InputError
from dino_xcit.reliability.run_lock import RunLock
from eval import shards
from eval.collection_card import data_of, differences, settings_of
from eval.protocol import Card
from eval.retrieval import NEW, existing, finish_renaming, is_half_renamed, open_collection

_MOST_NAMED = 3


def claim(folder: Path, card: Card, source: Source, add: bool, overwrite: bool, locks: ExitStack) -> str:
    """Make sure that an extraction may go into a folder, and lock it. Call it on one process.

    A collection that a killed process had all files of gets them under their names first.

    Args:
        card: what is to be extracted.
        add: to a collection that is there, instead of into a folder without one.
        locks: holds the folder until it is closed.

    Returns:
        Why there is nothing to do, for the screen; empty: go on.

    Raises:
        InputError: the folder holds something else, is in use, or cannot be written to.
    """
    existing(folder, card)  # refuses what is no folder
    work = folder / shards.FOLDER
    if not work.exists() and not (folder / NEW).exists():
        # Nothing was begun that another process may be at: a folder that cannot be written to will do.
        answer = _answer(folder, card, source, add, overwrite)
        if answer:
            return answer
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot create {folder}: {error.strerror}; choose another --output-dir") from error
    locks.enter_context(RunLock.take(work))
    if is_half_renamed(folder):
        finish_renaming(folder)
    answer = _answer(folder, card, source, add, overwrite)
    if answer:  # of a process that was killed when all was done
        shutil.rmtree(folder / NEW, ignore_errors=True)
        shards.remove(work)
    return answer


def _answer(folder: Path, card: Card, source: Source, add: bool, overwrite: bool) -> str:
    if add:
        return _refuse_to_add(folder, card, source)
    found = existing(folder, card)
    if found == "same" and not overwrite:
        return f"already complete: {folder} holds the vectors of these {len(source):,} images; nothing to do"
    if found and not overwrite:
        raise InputError(
            f"{folder} holds another extraction: choose another --output-dir, or --overwrite to replace it"
        )
    return ""


def _refuse_to_add(folder: Path, card: dict[str, Any], source: Source) -> str:
    collection = open_collection(folder)
    changed = differences(settings_of(collection.card), settings_of(card))
    if changed:
        raise InputError(f"cannot add to {folder}: {'; '.join(changed)}; repeat the settings that it was written with")
    if card["data"]["fingerprint"] in [data["fingerprint"] for data in data_of(collection.card)]:
        return f"already there: {folder} holds the {len(source):,} images of {source.url}; nothing to do"
    there = set(collection.names)
    again = [name for name in map(source.name, range(len(source))) if name in there]
    if again:
        more = f" and {len(again) - _MOST_NAMED:,} more" if len(again) > _MOST_NAMED else ""
        raise InputError(
            f"cannot add to {folder}: it has images of the same names already, {', '.join(again[:_MOST_NAMED])}{more}; "
            "give a --data-path with other images"
        )
    return ""
