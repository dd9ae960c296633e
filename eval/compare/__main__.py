"""Compare results, image by image, query by query, draw by draw, and refuse to compare what is unlike.

    python -m eval.compare a.json b.json ...
    python -m eval.compare published:xcit_small_12_p16 mine.json
    python -m eval.compare linear.json linear.json --figure grid logreg --allow classifier

The first is what the others are held against. For each figure that both have: its value with its interval, the
difference with its paired interval, and a p-value; of accuracies also on how many images only one of the two is right.
"""

from __future__ import annotations

# Before torch: it decides how threads wait for each other.
import dino_xcit  # noqa: F401  # isort: skip

import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from dino_xcit.cli import parse
from dino_xcit.errors import InputError, near_matches, printable, run_main
from eval.compare.comparison import columns, compare, notes
from eval.compare.images import called, known_by, same_order
from eval.compare.likeness import OVERLOOKED, Likeness, liken
from eval.compare.published import PREFIX, published_result
from eval.compare.result_file import Result, read_result, shown
from eval.compare.typeset import aside, typeset
from eval.config import CompareConfig
from eval.protocol import now, versions, write_json


def main(argv: Sequence[str]) -> None:
    """The command.

    Raises:
        InputError: a mistake in the command, a file that is no result, or results that are unlike: a line each.
    """
    # ---- the results
    config = parse(CompareConfig, argv, "python -m eval.compare")
    results = open_results(config.files, config.figure)
    first, others = results[0], results[1:]

    # ---- may they be compared?
    likenesses = [liken(first, other, config.allow) for other in others]
    refuse_unlike(first, others, likenesses, config.allow)

    # ---- what to know beside the figures
    remarks = [
        f"allowed, and unlike {first.label}: {other.label}: {one.clause}"
        for other, likeness in zip(others, likenesses, strict=True)
        for one in likeness.differences
    ]
    remarks += _same_weights(results)
    for other, likeness in zip(others, likenesses, strict=True):
        remarks += _left_out(first, other, likeness) + _images_by_sample(first, other)
    remarks += [f"{one.label}: published, not measured here; {one.source}" for one in results if one.source]

    # ---- the figures
    pairs = [(other, likeness.pairs) for other, likeness in zip(others, likenesses, strict=True)]
    comparisons = compare(first, pairs, baselines=bool(config.figure))
    head = f"{first.measure}, {first.counts()}; the first file is {first.label}"
    for line in [*remarks, head]:
        print(aside(printable(line), config.table))
    if config.table == "markdown":
        print()  # which ends the list above the table, as the one below it does the table
    for line in typeset(columns(comparisons), config.table).split("\n"):
        print(printable(line))
    if config.table == "markdown":
        print()
    for line in notes(comparisons):
        print(aside(printable(line), config.table))
    if config.json:
        content = {
            "measure": "comparison",
            "files": [{"file": one.label, "weights": one.weights, "published": one.source} for one in results],
            "images": {name: part["images"] for name, part in first.data.items()},
            "comparisons": [asdict(one) for one in comparisons],
            "remarks": remarks,
            "date": now(),
            "versions": versions(),
        }
        write_json(Path(config.json).expanduser(), content)
        print(aside(printable(f"written: {config.json}"), config.table))


def open_results(files: Sequence[str], figures: Sequence[str]) -> list[Result]:
    """Result files and ``published:NAME``, in the order given, each with the figures that were asked for.

    Args:
        figures: words of the figures' names, for all files or one for each; none: all figures.

    Raises:
        InputError: none that was measured, one twice with the same figures, one that cannot be read, or has no such
            figure.
    """
    wanted = list(figures) if len(figures) == len(files) else [*figures, ""][:1] * len(files)
    asked = list(zip(map(_place, files), wanted, strict=True))
    for word, (place, words) in zip(files, asked, strict=True):
        if asked.count((place, words)) > 1:
            raise InputError(
                f"{word} is given more than once, expected different results, or different figures of one file with "
                "--figure WORDS WORDS, one for each file"
            )
    measured = {word: read_result(word) for word in files if not word.startswith(PREFIX)}
    if not measured:
        raise InputError("only published figures given, expected a result file too, as it says which of them are meant")
    measure = next(iter(measured.values())).measure
    found = [measured.get(word) or published_result(word, measure) for word in files]
    return [_only(result, words) if words else result for result, words in zip(found, wanted, strict=True)]


def refuse_unlike(
    first: Result, others: Sequence[Result], likenesses: Sequence[Likeness], allow: Sequence[str]
) -> None:
    """Refuse what differs and was not allowed.

    Raises:
        InputError: a line a difference; or a word in ``allow`` that is the name of none.
    """
    known = {"protocol", "transform", "order", "names", *first.data, *OVERLOOKED.get(first.measure, ())}
    known |= {one.name for likeness in likenesses for one in likeness.differences if one.allowable}
    for word in allow:
        if word not in known:
            raise InputError(
                f"--allow {word}: no difference has that name{near_matches(word, known)}; these results know "
                f"{', '.join(sorted(known))}"
            )
    refusals = []
    for other, likeness in zip(others, likenesses, strict=True):
        for one in likeness.differences:
            if not (one.allowable and one.name in allow):
                way = f" (--allow {one.name} compares them all the same)" if one.allowable else ""
                refusals.append(f"{other.label} cannot be compared with {first.label}: {one.clause}{way}")
    if refusals:
        raise InputError("\n".join(refusals))


def _place(word: str) -> str:
    """The same for every way to name a file."""
    return word if word.startswith(PREFIX) else os.path.realpath(os.path.expanduser(word))


def _only(result: Result, words: str) -> Result:
    """The result with the figure of this name, else with those whose name has all these words (k=20 is no part of
    k=200), baselines only where they are named; a published one has but one."""
    if result.source:
        return result
    wanted = set(words.split())
    kept = tuple(figure for figure in result.figures if figure.name == words) or tuple(
        figure
        for figure in result.figures
        if wanted <= set(figure.name.replace(",", " ").split())
        and not (figure.baseline and figure.settings.get("model") not in wanted)
    )
    if not kept:
        names = "; ".join(figure.name for figure in result.figures[:8])
        more = "; ..." if len(result.figures) > 8 else ""
        raise InputError(f"{result.label} has no figure with {words!r} in its name, only: {names}{more}")
    return replace(result, figures=kept)


def _same_weights(results: Sequence[Result]) -> list[str]:
    """A remark for each file that measures weights which one before it measured."""
    seen: dict[str, str] = {}
    remarks = []
    for result in results:
        if seen.get(result.weights) == result.label:  # other figures of one file
            continue
        if result.weights in seen:
            before = seen[result.weights]
            remarks.append(f"warning: {result.label} measured the same weights as {before} ({result.weights[:12]})")
        elif result.weights:
            seen[result.weights] = result.label
    return remarks


def _left_out(first: Result, other: Result, likeness: Likeness) -> list[str]:
    """Remarks about figures that one of the two alone has, and about other libraries."""
    if first.source or other.source:
        return []
    remarks = []
    both = {id(figure) for pair in likeness.pairs for figure in pair}
    for result in (first, other):
        alone = [one.name for one in result.figures if id(one) not in both and not one.baseline]
        if alone:
            more = " ..." if len(alone) > 6 else ""
            remarks.append(f"warning: only {result.label} has {', '.join(alone[:6])}{more}")
    changed = [
        f"{name} {shown(first.versions[name])} -> {shown(other.versions[name])}"
        for name in sorted(first.versions.keys() & other.versions.keys())
        if first.versions[name] != other.versions[name]
    ]
    if changed:
        remarks.append(f"warning: {other.label} was measured with other libraries: {', '.join(changed)}")
    return remarks


def _images_by_sample(first: Result, other: Result) -> list[str]:
    """Remarks about images that are known to be the same by a part of what tells them apart."""
    if first.source or other.source:
        return []
    known: dict[str, list[str]] = {}
    for name in first.data.keys() & other.data.keys():
        then, now = first.data[name], other.data[name]
        if same_order(then, now) and (how := known_by(then, now)):
            known.setdefault(how, []).append(name)
    return [
        f"warning: {' and '.join(called(name) for name in sorted(names))} of {other.label} are {first.label}'s {how}"
        for how, names in sorted(known.items())
    ]


def command() -> None:
    """The console entry."""
    run_main(lambda: main(sys.argv[1:]))


if __name__ == "__main__":
    command()
