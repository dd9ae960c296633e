"""The folder that an extraction goes into: whose it is, what is in it, and whether there is anything to do."""

from __future__ import annotations

import os
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

from dino_xcit.data import Source
from dino_xcit.errors import InputError
from dino_xcit.runtime.run_lock import locked
from eval.collection import shards
from eval.collection.card import data_of, differences, rows_of, settings_of
from eval.collection.card_file import read_card
from eval.collection.store import CARD, NEW, existing, finish_renaming, is_half_renamed, open_collection
from eval.results import Card

_MOST_NAMED = 3


Unreadable = Literal["refuse", "skip"]


def claim(
    folder: Path,
    card: Card,
    source: Source,
    add: bool,
    overwrite: bool,
    locks: ExitStack,
    unreadable: Unreadable = "refuse",
) -> str:
    """Make sure that an extraction may go into a folder, and lock it. Call it on one process.

    A collection that a killed process had all files of gets them under their names first.

    Args:
        card: what is to be extracted.
        add: to a collection that is there, instead of into a folder without one.
        locks: holds the folder until it is closed.
        unreadable: what becomes of an image that cannot be read.

    Returns:
        Why there is nothing to do, for the screen; empty: go on.

    Raises:
        InputError: the folder holds something else, is in use, or cannot be written to.
    """
    existing(folder, card)  # refuses what is no folder
    work = folder / shards.FOLDER
    if not work.exists() and not (folder / NEW).exists():
        # Nothing was begun that another process may be at: a folder that cannot be written to will do.
        answer = _answer(folder, card, source, add, overwrite, unreadable)
        if answer:
            return answer
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot create {folder}: {error.strerror}; choose another --output-dir") from error
    locks.enter_context(locked(work))
    if is_half_renamed(folder):
        finish_renaming(folder)
    answer = _answer(folder, card, source, add, overwrite, unreadable)
    # What a process left that was killed when all was done; but not the parts of others that are being added.
    if answer and shards.are_of(work, identity(card), len(source)):
        shutil.rmtree(folder / NEW, ignore_errors=True)
        shards.remove(work)
    return answer


def lies_among(folder: Path, url: str) -> bool:
    """Whether a folder is within the folder of images at ``url``, or that folder itself.

    Pictures that are written there later, such as a query's contact sheet, would be images of the next extraction.
    """
    return os.path.isdir(url) and Path(os.path.realpath(folder)).is_relative_to(os.path.realpath(url))


def refuse_among_images(folder: Path, source: Source) -> None:
    """Refuse to put a collection into the folder whose images it is of.

    Not leaving that folder out of the images instead: what belongs to a data set would then depend on what is read of
    it, and k-NN, training and another extraction would each see another set.

    Raises:
        InputError: naming a folder beside it.
    """
    if lies_among(folder, source.url):
        images = os.path.abspath(source.url)
        raise InputError(
            f"output_dir is {folder}, which lies within the folder of the images, {source.url}: the contact sheets of "
            f"queries would be images of it at the next run; choose another, such as --output-dir {images}-vectors"
        )


def identity(card: dict[str, Any]) -> dict[str, Any]:
    """All that decides the rows of an extraction, as its plan has it."""
    return rows_of(card) | {"data": card["data"]["fingerprint"]}


def _answer(folder: Path, card: Card, source: Source, add: bool, overwrite: bool, unreadable: Unreadable) -> str:
    if add:
        return _refuse_to_add(folder, card, source, unreadable)
    found = existing(folder, card)
    if found == "same" and not overwrite:
        stored = read_card(folder / CARD)
        return f"already complete: {folder} holds the vectors of {_how_many(stored['data'], unreadable)}"
    if found and not overwrite:
        raise InputError(
            f"{folder} holds another extraction: choose another --output-dir, or --overwrite to replace it"
        )
    return ""


def _how_many(data: dict[str, Any], unreadable: Unreadable) -> str:
    """Of the images of a data card that is there."""
    left_out = data.get("unreadable", {"count": 0})["count"]
    if not left_out:
        return f"these {data['images']:,} images; nothing to do"
    # Refusing is the default: nobody may have thought of it, so that what is there stays as it is.
    refuse = "" if unreadable == "skip" else ", although --unreadable is refuse now (mend them, then --overwrite)"
    return (
        f"{data['images'] - left_out:,} of these {data['images']:,} images; {left_out:,} could not be read and were "
        f"left out, {CARD} names them{refuse}; nothing to do"
    )


def _refuse_to_add(folder: Path, card: dict[str, Any], source: Source, unreadable: Unreadable) -> str:
    collection = open_collection(folder)
    changed = differences(settings_of(collection.card), settings_of(card))
    if changed:
        raise InputError(f"cannot add to {folder}: {'; '.join(changed)}; repeat the settings that it was written with")
    for data in data_of(collection.card):
        if data["fingerprint"] == card["data"]["fingerprint"]:
            return f"already there: {folder} holds, of {source.url}, {_how_many(data, unreadable)}"
    there = set(collection.names)
    again = [name for name in map(source.name, range(len(source))) if name in there]
    if again:
        more = f" and {len(again) - _MOST_NAMED:,} more" if len(again) > _MOST_NAMED else ""
        raise InputError(
            f"cannot add to {folder}: it has images of the same names already, {', '.join(again[:_MOST_NAMED])}{more}; "
            "give a --data-path with other images"
        )
    return ""
