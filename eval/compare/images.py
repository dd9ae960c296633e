"""Did two results see the same images, in the same order? By what their cards say (:func:`eval.protocol.images_card`).

A part is what one card says of ``train``, ``val``, or a set of a retrieval benchmark.
"""

from __future__ import annotations

from collections.abc import Mapping

from eval.compare.difference import Difference
from eval.compare.result_file import Result
from eval.protocol import LOOKED_AT

Part = Mapping[str, object]

_CALLED = {"train": "training", "val": "validation"}


def called(name: str) -> str:
    """``validation images`` for ``val``."""
    return f"{_CALLED.get(name, name)} images"


def same_order(then: Part, now: Part) -> bool:
    """Whether image i of the one is image i of the other, by its class and name or by what is in it."""
    return then["order"] == now["order"] or _same_content(then, now)


def known_by(then: Part, now: Part) -> str:
    """By what the images are known to be the same where not by all their names and sizes; empty where they are."""
    if _agree("fingerprint", then, now) and then.get("added") == now.get("added"):
        return ""
    known = ["labels"]
    if then["order"] == now["order"] or _agree("names", then, now):
        known.append("names")
    if _agree("whole", then, now):
        known.append("sizes")
    if "names" in known and "sizes" in known:
        return ""
    return f"by {LOOKED_AT} images, and by the {' and '.join(known)} of all"


def differences(name: str, first: Result, other: Result) -> list[Difference]:
    """What differs between the images that both results call ``name``."""
    meant = called(name)
    if not (name in first.data and name in other.data):
        return [Difference(name, f"{meant} are named in one of the two only", allowable=False)]
    then, now = first.data[name], other.data[name]
    counts = [_counted(part) for part in (then, now)]
    if first.source or other.source:  # only the data set's name was published
        different = "" if counts[0] == counts[1] else f"{counts[0]} -> {counts[1]}"
        return [Difference(name, f"other {meant}: {different}", allowable=False)] if different else []
    if _same_content(then, now):  # in a folder or in shards
        if then["order"] == now["order"] or _agree("names", then, now, unknown=True):
            return []
        clause = f"{meant} of other names; the same {known_by(then, now)}"
        return [Difference("names", clause)]
    if then["members"] != now["members"]:
        counted = f": {counts[0]} -> {counts[1]}" if counts[0] != counts[1] else " (other names or labels)"
        return [Difference(name, f"other {meant}{counted}")]
    if then["order"] != now["order"]:
        # No classifier here depends on the order of the training images, but a sample of contents does.
        return [] if name == "train" else [Difference("order", f"the same {meant} in another order")]
    return [Difference(name, f"{meant} of the same names, but other contents (resized or saved anew?)")]


def _counted(part: Part) -> str:
    images = f"{int(str(part['images'])):,}"
    return images if part.get("classes") is None else f"{images} of {part['classes']} classes"


def _same_content(then: Part, now: Part) -> bool:
    return then["labels"] == now["labels"] and then["contents"] == now["contents"] and _agree("whole", then, now, True)


def _agree(key: str, then: Part, now: Part, unknown: bool = False) -> bool:
    """Whether both have the same there; ``unknown`` where one of the two cards has nothing there, or is older."""
    if then.get(key) is None or now.get(key) is None:
        return unknown
    return then[key] == now[key]
