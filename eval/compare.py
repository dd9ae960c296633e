"""Compare results with paired tests over images, queries or draws; results of different protocols are refused.

    python -m eval.compare a.json b.json ...
    python -m eval.compare published:xcit_small_12_p16 mine.json
    python -m eval.compare linear.json linear.json --metric grid logreg --allow classifier

Each result is compared with the first. For each metric of both, the table has the value with its interval, the
difference with its paired interval, a p-value, and for hits the numbers of images that only one of the two has right.
"""

from __future__ import annotations

# Import before torch: it sets how OpenMP threads wait.
import dino_xcit  # noqa: F401  # isort: skip

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations, product
from pathlib import Path

from dino_xcit.cli import parse
from dino_xcit.errors import InputError, near_matches, printable, run_main
from dino_xcit.transform import EvalTransform
from eval import results, stats
from eval.config import PAPER_CROP_SCALE, PAPER_EPOCHS, CompareConfig
from eval.results import KNN_PROTOCOL, Images, JsonObject, Metric, Result, Setting, read_result, transform_metadata
from eval.table import Interval, escaped, markdown_table, percent, signed, table

PREFIX = "published:"
TRAIN, VAL, CLASSES = 1_281_167, 50_000, 1000
"""Images and classes of ImageNet-1k."""
K, TEMPERATURE = 20, 0.07
"""The published tables do not state k; the DINO paper's evaluation protocol uses 20."""

PUBLISHED = {
    "xcit_small_12_p16": {"knn": 76.0, "linear": 77.8},
    "xcit_small_12_p8": {"knn": 77.1, "linear": 79.2},
    "xcit_medium_24_p16": {"knn": 76.4, "linear": 78.8},
    "xcit_medium_24_p8": {"knn": 77.9, "linear": 80.3},
    "vit_small_p16_100ep": {"knn": 69.3},  # its linear probe uses 4 blocks, unlike the paper's classifier here
}
"""Top-1 on ImageNet-1k's validation images, percent: facebookresearch/dino, README."""

IGNORED = {"ks", "temperatures", "interval", "published"}
"""Protocol entries that do not affect a single metric, which has its own k and T."""
OVERLOOKED = {"k": {"k"}, "T": {"T"}, "classifier": {"classifier", "epoch"}}
"""Settings in which compared metrics may differ, by the word for ``--allow``."""
SGD, HELD_OUT = {"epochs", "batch", "crop_scale", "cached", "seed"}, {"holdout", "seed", "features"}
CLASSIFIERS = {
    "paper": SGD | {"lr"},
    "grid": SGD | HELD_OUT | {"lrs"},
    "logreg": HELD_OUT | {"cs", "iterations", "gap"},
}
"""Settings of a linear probe that affect each of its classifiers."""

Pairs = Sequence[tuple[Metric, Metric]]
"""Pairs of a metric of the first result and the metric of another result to compare it with."""


@dataclass(frozen=True)
class Entry:
    """A result of the command line with the selected metrics."""

    label: str
    result: Result
    metrics: tuple[Metric, ...]
    published: str = ""
    """Source of a published result; empty for a measured result."""

    @property
    def weights(self) -> str:
        """Hash of the weights; empty if published."""
        return str(self.result.weights.get("hash", ""))


@dataclass(frozen=True)
class Difference:
    """A difference between the protocols or data of two results."""

    name: str
    """Name for ``--allow``."""
    clause: str
    """Description, such as ``crop 224 -> 28``."""
    allowable: bool = True


@dataclass(frozen=True)
class Comparison:
    """A row of the table: a metric of one file compared with the first file's."""

    metric: str
    file: str
    percent: float
    interval: Interval | None
    unit: str
    """Unit of the mean: image, query or draw."""
    units: int | None
    """Number of units."""
    difference: float | None = None
    """Percentage points relative to the first file; None for the first file itself."""
    difference_interval: Interval | None = None
    only_first: int | None = None
    """Images or queries that only the first file has right; None if the metrics are not paired or not hits."""
    only_this: int | None = None
    p: float | None = None
    p_holm: float | None = None
    """p-value corrected for the number of tests in the table."""


def main(argv: Sequence[str]) -> None:
    """Run the command.

    Raises:
        InputError: the command is wrong, a file is not a result file, or results differ (one line per difference).
    """
    config = parse(CompareConfig, argv, "python -m eval.compare")
    entries = open_entries(config.files, config.metric)
    first = entries[0]
    others = [(other, pair_up(first, other, config.allow)) for other in entries[1:]]
    unlike = [(other, one) for other, pairs in others for one in differences(first, other, pairs)]
    refuse_unlike(first, unlike, config.allow)

    remarks = [f"allowed difference of {other.label} from {first.label}: {one.clause}" for other, one in unlike]
    remarks += warnings(entries)
    remarks += [line for other, pairs in others for line in left_out(first, other, pairs)]
    comparisons = compare(first, others)
    images = {name: part.images for name, part in first.result.images().items()}
    counts = ", ".join(f"{name} {count:,}" for name, count in images.items())
    head = f"{first.result.measure}; images: {counts}; the first file is {first.label}"
    markdown = config.table == "markdown"
    _show([*remarks, head], markdown)
    print("", *map(printable, rows_of(comparisons, markdown)), "", sep="\n")
    _show(notes(comparisons), markdown)
    if config.json:
        content = {
            "measure": "comparison",
            "files": [{"file": one.label, "weights": one.weights, "published": one.published} for one in entries],
            "images": images,
            "comparisons": [asdict(one) for one in comparisons],
            "remarks": remarks,
            "date": results.now(),
            "versions": results.versions(),
        }
        results.write_json(Path(config.json), content)
        _show([f"written: {config.json}"], markdown)


# ---- input


def open_entries(files: Sequence[str], words: Sequence[str]) -> list[Entry]:
    """Open result files and ``published:NAME`` in the given order.

    Args:
        words: words in the names of the selected metrics: one string for all files, one per file, or none for all
            metrics.

    Raises:
        InputError: there is no measured result, a file is repeated with the same metrics or is unreadable, or a metric
            does not exist.
    """
    words = list(words) if len(words) == len(files) else [*words, ""][:1] * len(files)
    given = list(zip(files, words, strict=True))
    places = [(file if file.startswith(PREFIX) else os.path.realpath(file), one) for file, one in given]
    if len(set(places)) < len(places):
        raise InputError("a file is given more than once: give other files, or one --metric WORDS per file")
    measured = {file: read_result(file) for file in files if not file.startswith(PREFIX)}
    if not measured:
        raise InputError("only published results given, expected at least one result file: add one")
    measure = next(iter(measured.values())).measure
    return [
        _chosen(file, measured[file], one) if file in measured else _published(file, measure) for file, one in given
    ]


def _chosen(label: str, result: Result, words: str) -> Entry:
    """Select the metric named ``words``, or those with all of these words in their names; baselines only by name."""
    wanted = set(words.split())
    kept = tuple(one for one in result.metrics if one.name == words) or tuple(
        one
        for one in result.metrics
        if wanted <= set(one.name.replace(",", " ").split())
        and not (one.baseline and one.settings.get("model") not in wanted)
    )
    if not kept:
        names = "; ".join(one.name for one in result.metrics[:8])
        raise InputError(f"{label} has no metric with {words!r} in its name; it has: {names}")
    return Entry(label, result, kept)


def _published(label: str, measure: str) -> Entry:
    """Wrap a published result as a result with the known parts of its protocol."""
    name = label.removeprefix(PREFIX)
    if measure not in PUBLISHED.get(name, ()):
        raise InputError(
            f"no {measure} result was published as {name!r}{near_matches(name, PUBLISHED)}; expected k-NN or linear "
            f"results and one of {', '.join(PUBLISHED)}"
        )
    settings: dict[str, Setting] = {"model": "trained", "k": K, "T": TEMPERATURE}
    protocol: JsonObject = {"name": KNN_PROTOCOL}
    if measure == "linear":  # published results are of the best epoch on the validation images
        settings = {"classifier": "paper", "epoch": "best"}
        protocol = {"epochs": PAPER_EPOCHS, "lr": 0.001, "crop_scale": list(PAPER_CROP_SCALE), "cached": None}
    metric = Metric(f"published {measure} top-1", settings, PUBLISHED[name][measure], None)
    data: dict[str, JsonObject] = {
        part: {"images": count, "classes": CLASSES} for part, count in (("train", TRAIN), ("val", VAL))
    }
    transform = transform_metadata(EvalTransform())
    result = Result(measure=measure, protocol=protocol, data=data, transform=transform, metrics=(metric,))
    return Entry(label, result, result.metrics, "facebookresearch/dino, README")


# ---- comparability


def pair_up(first: Entry, other: Entry, allow: Sequence[str] = ()) -> Pairs:
    """Pair metrics with equal settings; if there are none, pair metrics that differ in allowed settings only."""
    if first.result.measure != other.result.measure:
        return []
    overlooked = {setting for word in allow for setting in OVERLOOKED.get(word, ())}
    every = list(product(first.metrics, other.metrics))
    exact = [(mine, own) for mine, own in every if mine.settings == own.settings]
    return exact or [(mine, own) for mine, own in every if _changed(mine.settings, own.settings).keys() <= overlooked]


def differences(first: Entry, other: Entry, pairs: Pairs) -> list[Difference]:
    """List all differences that affect the metrics, except the weights."""
    then, now = first.result, other.result
    if then.measure != now.measure:
        return [Difference("measure", f"measure {then.measure} -> {now.measure}", allowable=False)]
    found: dict[str, Difference] = {}
    every = product(first.metrics, other.metrics)
    closest = min(every, key=lambda pair: len(_changed(pair[0].settings, pair[1].settings)))
    for mine, own in pairs or [closest]:
        fixed = (mine.settings.keys() | own.settings.keys()) - OVERLOOKED.keys()
        for name, clause in _unlike_settings(first, other, mine, own).items():
            if name in found and clause not in found[name].clause:
                clause = f"{found[name].clause}; {clause}"
            found[name] = Difference("protocol" if name == "name" else name, clause, name not in fixed)
    if transform := _changed(then.transform, now.transform):
        found["transform"] = Difference("transform", f"transform: {', '.join(transform.values())}")
    images, published = (then.images(), now.images()), bool(first.published or other.published)
    for name in sorted(images[0].keys() | images[1].keys()):
        if clause := _unlike_images(images[0].get(name), images[1].get(name)):
            found[name] = Difference(name, f"different {name} images: {clause}", not published)
    return list(found.values())


def _unlike_settings(first: Entry, other: Entry, mine: Metric, own: Metric) -> dict[str, str]:
    then, now = _deciding(first.result, mine), _deciding(other.result, own)
    keys = then.keys() | now.keys()
    if mine.settings.get("classifier") != own.settings.get("classifier"):
        keys = (then.keys() & now.keys()) - {"epoch"}  # settings that affect both classifiers
    for entry, settings in ((first, then), (other, now)):
        if entry.published:  # compare only the published settings
            keys = keys & settings.keys()
    return _changed({key: then.get(key) for key in keys}, {key: now.get(key) for key in keys})


def _deciding(result: Result, metric: Metric) -> JsonObject:
    """Return the settings that affect a metric: its own and those of the protocol."""
    protocol = {key: value for key, value in result.protocol.items() if key not in IGNORED}
    if isinstance(whitening := protocol.get("whitening"), dict):  # it belongs to its weights; compare its data
        protocol["whitening"] = whitening.get("learned_on")
    decided = CLASSIFIERS.get(str(metric.settings.get("classifier")))
    if decided is not None:
        logreg = protocol.pop("logreg", None)
        others = {"name"}.union(*CLASSIFIERS.values()) - decided
        protocol |= logreg if isinstance(logreg, dict) else {}
        protocol = {key: value for key, value in protocol.items() if key not in others}
    return {**protocol, **metric.settings}


def _unlike_images(then: Images | None, now: Images | None) -> str:
    if then is None or now is None:
        return "missing in one of the two"
    counts = [f"{part.images:,}" + (f" of {part.classes} classes" if part.classes else "") for part in (then, now)]
    if counts[0] != counts[1]:
        return " -> ".join(counts)
    for what in ("labels", "names", "contents"):  # empty where unknown: published results, older files
        if getattr(then, what) and getattr(now, what) and getattr(then, what) != getattr(now, what):
            return f"same number, but other {what} or order"
    return ""


def refuse_unlike(first: Entry, unlike: Sequence[tuple[Entry, Difference]], allow: Sequence[str]) -> None:
    """Refuse differences that are not allowed.

    Raises:
        InputError: a difference is not allowed (one line each), or a word in ``allow`` is unknown.
    """
    known = {"protocol", "transform", *first.result.data, *OVERLOOKED}
    known |= {one.name for _, one in unlike if one.allowable}
    for word in set(allow) - known:
        near = near_matches(word, known)
        raise InputError(f"--allow {word} is unknown{near}; expected one of {', '.join(sorted(known))}")
    refused = [(other, one) for other, one in unlike if not (one.allowable and one.name in allow)]
    if refused:
        lines = [f"{other.label} cannot be compared with {first.label}: {one.clause}" for other, one in refused]
        if all(one.allowable for _, one in refused):
            words = dict.fromkeys((*allow, *(one.name for _, one in refused)))
            lines.append(f"compare them anyway with --allow {' '.join(words)}")
        raise InputError("\n".join(lines))


def warnings(entries: Sequence[Entry]) -> list[str]:
    """List remarks on published results and on results of the same weights."""
    lines = [f"{one.label}: published, not measured here; {one.published}" for one in entries if one.published]
    for before, one in combinations(entries, 2):
        if one.weights and one.weights == before.weights and one.label != before.label:
            lines.append(f"warning: {one.label} measured the same weights as {before.label} ({one.weights[:12]})")
    return lines


def left_out(first: Entry, other: Entry, pairs: Pairs) -> list[str]:
    """List warnings about metrics that only one of the two has and about different library versions."""
    if first.published or other.published:
        return []
    both = {one.name for pair in pairs for one in pair}
    lines = []
    for entry in (first, other):
        if alone := [one.name for one in entry.metrics if one.name not in both]:
            more = f" and {len(alone) - 3:,} more" if len(alone) > 3 else ""
            lines.append(f"warning: only {entry.label} has {', '.join(alone[:3])}{more}")
    if libraries := _changed(first.result.versions, other.result.versions):
        lines.append(f"warning: {other.label} was measured with other versions: {', '.join(libraries.values())}")
    return lines


# ---- the table


def compare(first: Entry, others: Sequence[tuple[Entry, Pairs]]) -> list[Comparison]:
    """Compute a row per metric and file, the first file first."""
    rows = []
    for metric in first.metrics:
        partners = [(other, own) for other, pairs in others for mine, own in pairs if mine is metric]
        if partners:
            rows += [_row(first, metric), *(_against(first, metric, other, own) for other, own in partners)]
    corrected = iter(stats.holm([row.p for row in rows if row.p is not None]))
    return [row if row.p is None else replace(row, p_holm=next(corrected)) for row in rows]


def _row(entry: Entry, metric: Metric) -> Comparison:
    interval = None
    if metric.hits is not None:
        interval = stats.wilson_interval(metric.hits)
    elif metric.values is not None:
        of = stats.query_interval if metric.unit == "query" else stats.mean_interval
        interval = of(metric.values)
    return Comparison(metric.name, entry.label, metric.percent, interval, metric.unit, metric.units)


def _against(first: Entry, mine: Metric, other: Entry, own: Metric) -> Comparison:
    row = replace(_row(other, own), difference=own.percent - mine.percent)
    if not _paired(first, other, mine, own):
        return row
    if mine.hits is not None and own.hits is not None:
        lost, won = stats.discordant(mine.hits, own.hits)
        interval = stats.paired_interval(mine.hits, own.hits)
        return replace(row, difference_interval=interval, only_first=lost, only_this=won, p=stats.mcnemar(lost, won))
    if mine.values is not None and own.values is not None:
        between, p = stats.paired_means(mine.values, own.values)
        return replace(row, difference_interval=between, p=p)
    return row


def _paired(first: Entry, other: Entry, mine: Metric, own: Metric) -> bool:
    """Return whether values at equal positions belong to the same image, query or draw."""
    if first.published or other.published or (mine.unit, mine.which) != (own.unit, own.which):
        return False
    then, now = first.result.images(), other.result.images()
    # A draw selects training images; its accuracy is a mean over validation images in any order.
    names = {"image": {"val"}, "draw": {"train"}, "query": then.keys() | now.keys()}[mine.unit]
    return all(name in then and then[name].pairs_with(now.get(name)) for name in names)


# ---- the table


def rows_of(comparisons: Sequence[Comparison], markdown: bool) -> list[str]:
    """Format the table as lines of text or GitHub Markdown."""
    header = ["metric", "file", "% [95%]", "difference [95%]", "only first right", "only this right", "p", "p (Holm)"]
    rows, named = [], ""
    for one in comparisons:
        new = one.difference is None or one.metric != named  # with --allow k, names differ between files
        named = one.metric
        counts = ["-" if count is None else f"{count:,}" for count in (one.only_first, one.only_this)]
        cells = [named if new else "", one.file, percent(one.percent, one.interval)]
        rows.append([*cells, signed(one.difference, one.difference_interval), *counts, _p(one.p), _p(one.p_holm)])
    return (markdown_table if markdown else table)(header, rows, left=2).split("\n")


def notes(comparisons: Sequence[Comparison]) -> list[str]:
    """List notes on how to read the table."""
    tests = [one for one in comparisons if one.p is not None]
    lines = []
    if any(one.only_first is not None for one in tests):
        lines.append("differences: paired bootstrap intervals; p: McNemar's exact test on hits of only one file")
    if any(one.only_first is None for one in tests):
        lines.append("means over queries or draws: intervals and p of differences by the paired t-test")
    if len(tests) > 1:
        lines.append(f"p (Holm): corrected for the {len(tests)} tests of this table; --metric WORDS selects fewer")
    if any(one.difference is not None and one.p is None for one in comparisons):
        lines.append("no p: not paired, individual values unknown, or all differences equal")
    return lines


def shown(value: object) -> str:
    """Format a setting for a message."""
    text = "not set" if value is None else str(value)
    return text if len(text) <= 160 else f"{text[:157]}..."


def _changed(then: Mapping[str, object], now: Mapping[str, object]) -> dict[str, str]:
    """Return ``name then -> now`` by name for each value that differs."""
    return {
        name: f"{name} {shown(then.get(name))} -> {shown(now.get(name))}"
        for name in sorted(then.keys() | now.keys())
        if then.get(name) != now.get(name)
    }


def _p(value: float | None) -> str:
    return "-" if value is None else "< 0.0001" if value < 1e-4 else f"{value:.4f}"


def _show(lines: Sequence[str], markdown: bool) -> None:
    """Print lines, in Markdown as a list."""
    for line in lines:
        print(f"- {escaped(printable(line))}" if markdown else printable(line))


def command() -> None:
    """Run :func:`main` with the exit codes of docs/reliability.md."""
    run_main(lambda: main(sys.argv[1:]))


if __name__ == "__main__":
    command()
