"""May two results be compared? What differs between them besides the weights, by name."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from dino_xcit.errors import InputError
from eval.compare.result_file import Result, shown
from eval.figures import Figure, Setting

SWEPT = ("ks", "temperatures", "interval", "published")
"""Parts of a protocol that decide no single figure: which figures there are (each names its own k and T), how
intervals are computed, and what was published."""

FIGURE_SETTINGS = ("k", "T")
"""What figures of one file may differ in, and a user may want to overlook between two."""


@dataclass(frozen=True)
class Difference:
    """Something that makes two figures unlike."""

    name: str
    """What ``--allow`` calls it."""
    clause: str
    """What differs: ``crop 224 -> 28``."""
    allowable: bool = True


@dataclass(frozen=True)
class Likeness:
    """What one result has in common with another, and what not."""

    differences: list[Difference]
    """All that makes the figures unlike, besides the weights."""
    pairs: list[tuple[Figure, Figure]]
    """The first's figures with the other's of equal settings."""


def liken(first: Result, other: Result, overlooked: Collection[str] = ()) -> Likeness:
    """Hold a result against the first.

    Args:
        overlooked: settings of figures that need not be equal where no pair has all of them equal.

    Raises:
        InputError: without the overlooked settings, several figures of one file are the same.
    """
    found = _differences(first, other)
    if any(one.name == "measure" for one in found):
        return Likeness(found, [])
    pairs = _alike(first, other, overlooked)
    if not pairs or any(one.settings != another.settings for one, another in pairs):
        found += _unlike_settings(first, other)
    return Likeness(found, pairs)


def _differences(first: Result, other: Result) -> list[Difference]:
    """Besides the figures' own settings. Of a published figure, only what was published can be compared."""
    if first.measure != other.measure:
        return [Difference("measure", f"measure {first.measure} -> {other.measure}", allowable=False)]
    found = []
    published = [result.protocol.keys() for result in (first, other) if result.source]
    keys = published[0] if published else first.protocol.keys() | other.protocol.keys()
    for key in sorted(keys):
        then, now = first.protocol.get(key), other.protocol.get(key)
        if key in SWEPT or then == now:
            continue
        name = "protocol" if key == "name" else key
        found.append(Difference(name, f"{name} {shown(then)} -> {shown(now)}"))
    changed = _changed(first.transform, other.transform)
    if changed:
        found.append(Difference("transform", f"transform: {', '.join(changed)}"))
    for name in sorted(first.data.keys() | other.data.keys()):
        found += _data(name, first, other)
    return found


def paired(first: Result, other: Result) -> bool:
    """Whether image i is the same image in both, by its name or by its contents."""
    if first.source or other.source:
        return False
    then, now = first.data["val"], other.data["val"]
    return then["order"] == now["order"] or _same_images(then, now)


def _same_images(then: Mapping[str, object], now: Mapping[str, object]) -> bool:
    return all(then[key] == now[key] for key in ("images", "labels", "contents"))


def _alike(first: Result, other: Result, overlooked: Collection[str]) -> list[tuple[Figure, Figure]]:
    """The pairs of figures with equal settings, in the first's order; those of baselines are paired like the rest."""
    exact = {_key(one): one for one in other.figures}
    pairs = [(one, exact[_key(one)]) for one in first.figures if _key(one) in exact]
    if pairs or not overlooked:
        return pairs
    by_rest: list[dict[frozenset[tuple[str, Setting]], Figure]] = []
    for result in (first, other):
        rest = {_key(one, overlooked): one for one in result.figures}
        if len(rest) < len(result.figures):
            raise InputError(
                f"{result.label} has several figures that differ in {' and '.join(sorted(overlooked))}: measure "
                "it with one, such as --ks 20 --temperatures 0.07"
            )
        by_rest.append(rest)
    return [(one, by_rest[1][key]) for key, one in by_rest[0].items() if key in by_rest[1]]


def _unlike_settings(first: Result, other: Result) -> list[Difference]:
    """Why no figure of the one is a figure of the other: the settings whose values they do not share."""
    found = []
    for name in sorted({name for result in (first, other) for one in result.figures for name in one.settings}):
        then, now = (sorted({shown(one.settings.get(name)) for one in r.figures}) for r in (first, other))
        if not set(then) & set(now):
            found.append(Difference(name, f"{name} {', '.join(then)} -> {', '.join(now)}", name in FIGURE_SETTINGS))
    return found or [Difference("figures", "no figure has the same settings in both", allowable=False)]


def _key(one: Figure, overlooked: Collection[str] = ()) -> frozenset[tuple[str, Setting]]:
    return frozenset((name, value) for name, value in one.settings.items() if name not in overlooked)


def _changed(then: Mapping[str, object], now: Mapping[str, object]) -> list[str]:
    return [
        f"{key} {shown(then.get(key))} -> {shown(now.get(key))}"
        for key in sorted(then.keys() | now.keys())
        if then.get(key) != now.get(key)
    ]


def _data(name: str, first: Result, other: Result) -> list[Difference]:
    """What differs in the ``train`` or ``val`` images."""
    meant = {"train": "training", "val": "validation"}[name]
    if not (name in first.data and name in other.data):
        return [Difference(name, f"{meant} images are named in one of the two only", allowable=False)]
    then, now = first.data[name], other.data[name]
    counts = [f"{int(str(part['images'])):,} of {part['classes']} classes" for part in (then, now)]
    if first.source or other.source:  # only the data set's name was published
        different = "" if counts[0] == counts[1] else f"{counts[0]} -> {counts[1]}"
        return [Difference(name, f"other {meant} images: {different}", allowable=False)] if different else []
    if _same_images(then, now):  # in a folder or in shards, under whatever names
        return []
    if then["members"] != now["members"]:
        counted = f": {counts[0]} -> {counts[1]}" if counts[0] != counts[1] else " (other names or labels)"
        return [Difference(name, f"other {meant} images{counted}")]
    if then["order"] != now["order"]:
        # No classifier here depends on the order of the training images, but a sample of contents does.
        return [Difference("order", "the same validation images in another order")] if name == "val" else []
    return [Difference(name, f"{meant} images of the same names, but other contents (resized or saved anew?)")]
