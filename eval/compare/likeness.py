"""May two results be compared? What differs between them besides the weights, by name."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from dino_xcit.errors import InputError
from eval.compare import images
from eval.compare.classifiers import SETTING as CLASSIFIER
from eval.compare.classifiers import other_classifier, protocol_of, shared_protocol
from eval.compare.difference import Difference, changed
from eval.compare.result_file import Result, shown
from eval.figures import Figure, Setting

SWEPT = ("ks", "temperatures", "interval", "published")
"""Parts of a protocol that decide no single figure: which figures there are (each names its own k and T), how
intervals are computed, and what was published."""

OVERLOOKED = {"knn": ("k", "T"), "linear": (CLASSIFIER,)}
"""What figures of one file may differ in, and a user may want to overlook between two, by measure."""


@dataclass(frozen=True)
class Likeness:
    """What one result has in common with another, and what not."""

    differences: list[Difference]
    """All that makes the figures unlike, besides the weights."""
    pairs: list[tuple[Figure, Figure]]
    """The first's figures with the other's of equal settings."""


def liken(first: Result, other: Result, allowed: Collection[str] = ()) -> Likeness:
    """Hold a result against the first.

    Args:
        allowed: differences to let pass. Settings of figures among them need not be equal where no pair has all of
            them equal.

    Raises:
        InputError: without those settings, several figures of one file are the same.
    """
    if first.measure != other.measure:
        clause = f"measure {first.measure} -> {other.measure}"
        return Likeness([Difference("measure", clause, allowable=False)], [])
    overlooked = set(allowed) & set(OVERLOOKED.get(first.measure, ()))
    pairs = _alike(first, other, overlooked - {CLASSIFIER})
    found = _images(first, other)
    unlike = None if pairs else other_classifier(first, other)
    if unlike:
        found += [unlike, *_protocol(shared_protocol(first), shared_protocol(other))]
        every = [(one, another) for one in first.figures for another in other.figures]
        return Likeness(found, every if CLASSIFIER in overlooked else [])
    protocols = [
        protocol_of(result, [pair[place] for pair in pairs] or result.figures)
        for place, result in enumerate((first, other))
    ]
    published = [result.protocol.keys() for result in (first, other) if result.source]
    if published:  # of a published figure, only what was published can be compared
        protocols = [{key: one[key] for key in published[0] if key in one} for one in protocols]
    found = _protocol(*protocols) + found
    if not pairs or any(one.settings != another.settings for one, another in pairs):
        found += _unlike_settings(first, other)
    return Likeness(found, pairs)


def _protocol(then: Mapping[str, object], now: Mapping[str, object]) -> list[Difference]:
    found = []
    for key in sorted(then.keys() | now.keys()):
        values = [_deciding(key, protocol.get(key)) for protocol in (then, now)]
        if key not in SWEPT and values[0] != values[1]:
            name = "protocol" if key == "name" else key
            one, other = values
            if isinstance(one, Mapping) and isinstance(other, Mapping):
                found.append(Difference(name, f"{name}: {', '.join(changed(one, other))}"))
            else:
                found.append(Difference(name, f"{name} {shown(one)} -> {shown(other)}"))
    return found


def _deciding(key: str, value: object) -> object:
    """A whitening belongs to its weights, which may differ: what has to be alike is what it was learned on."""
    return value.get("learned_on") if key == "whitening" and isinstance(value, Mapping) else value


def _images(first: Result, other: Result) -> list[Difference]:
    """What differs in what was seen."""
    found = []
    unlike = changed(first.transform, other.transform)
    if unlike:
        found.append(Difference("transform", f"transform: {', '.join(unlike)}"))
    for name in sorted(first.data.keys() | other.data.keys()):
        found += images.differences(name, first, other)
    return found


def paired(first: Result, other: Result, mine: Figure, own: Figure) -> bool:
    """Whether value i of the one figure and value i of the other are of the same image, query or draw."""
    if first.source or other.source or mine.unit != own.unit or mine.which != own.which:
        return False
    # A draw is rows of the training images; its figure is a mean over validation images in any order.
    names = {"image": ["val"], "draw": ["train"], "query": sorted(first.data.keys() | other.data.keys())}[mine.unit]
    return all(
        name in first.data and name in other.data and images.same_order(first.data[name], other.data[name])
        for name in names
    )


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
            allowable = name in OVERLOOKED.get(first.measure, ())
            found.append(Difference(name, f"{name} {', '.join(then)} -> {', '.join(now)}", allowable))
    return found or [Difference("figures", "no figure has the same settings in both", allowable=False)]


def _key(one: Figure, overlooked: Collection[str] = ()) -> frozenset[tuple[str, Setting]]:
    return frozenset((name, value) for name, value in one.settings.items() if name not in overlooked)
