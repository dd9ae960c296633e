"""Linear probes: which settings decide which classifier, and one kind of classifier against another."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from eval.compare.difference import Difference
from eval.compare.result_file import Result
from eval.figures import Figure
from eval.linear.probe import GRID

SETTING = "classifier"
"""The setting of a figure that says which classifier it is of, and what ``--allow`` calls another one."""

_REGRESSION = "logreg"
_OF_ONE_KIND = {"paper": ("lr",), "grid": ("lrs", "holdout", "features")}
"""What decides one kind of the classifiers by SGD alone: they learn side by side, and none knows of the others. The
paper's learns from every training image, by the class token."""
_SHARED = ("holdout", "seed")
"""What holds for all classifiers of a probe."""


def protocol_of(result: Result, figures: Iterable[Figure]) -> Mapping[str, object]:
    """The settings that decide these figures of a result.

    A classifier that was trained beside others changes nothing of them, nor they of it.
    """
    protocol = result.protocol
    if result.measure != "linear" or result.source:
        return protocol
    kinds = {one.settings.get(SETTING) for one in figures}
    beside = protocol.get(_REGRESSION)
    if _REGRESSION not in kinds:
        others = [name for kind, names in _OF_ONE_KIND.items() if kind not in kinds for name in names]
        of_sgd = {name: value for name, value in protocol.items() if name not in (_REGRESSION, *others)}
        return of_sgd if "grid" in kinds else of_sgd | {"name": str(protocol.get("name")).removesuffix(GRID)}
    if not isinstance(beside, Mapping):  # there is but the regression, so that everything is of it
        return protocol
    of_regression = {name: protocol[name] for name in (*_SHARED, "features") if name in protocol} | dict(beside)
    return of_regression if kinds == {_REGRESSION} else protocol


def shared_protocol(result: Result) -> Mapping[str, object]:
    """The settings that two classifiers of different kinds have in common."""
    return {name: result.protocol[name] for name in _SHARED if name in result.protocol}


def other_classifier(first: Result, other: Result) -> Difference | None:
    """That no classifier of the one is of a kind that the other has; None for what is no linear probe."""
    if first.measure != "linear" or first.source or other.source:
        return None
    kinds = [sorted({str(one.settings.get(SETTING)) for one in result.figures}) for result in (first, other)]
    if set(kinds[0]) & set(kinds[1]):
        return None
    then, now = (", ".join(names) for names in kinds)
    return Difference(SETTING, f"{SETTING} {then} -> {now}, each trained by its own rules")
