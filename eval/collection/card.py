"""What the card of a collection says: what its vectors are, and whether two collections have the same."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from eval.pooling import CLASS_TOKEN

FORMAT = "dino-xcit-vectors-2"
FORMATS = ("dino-xcit-vectors-1", FORMAT)
"""The first had the class token alone, float32, and an exact index."""


def rows_of(card: Mapping[str, Any]) -> dict[str, Any]:
    """What decides a row before it is normalised or whitened, by name, as JSON has it."""
    names = ("weights", "pooling", "gem_p", "scales", "transform")
    return {name: value for name, value in settings_of(card).items() if name in names}


def kind_of(card: Mapping[str, Any]) -> dict[str, Any]:
    """What makes vectors comparable before whitening, by name, as JSON has it."""
    return {
        "weights": str(card["weights"]["hash"]),
        **card.get("descriptor", CLASS_TOKEN.to_dict()),
        "normalised": card["normalised"],
    }


def settings_of(card: Mapping[str, Any]) -> dict[str, Any]:
    """All but the images that decides what is in a collection, by name, as JSON has it."""
    whitening, index = card.get("whitening"), card.get("index")
    parts = kind_of(card) | {
        "transform": card["transform"],
        "whitening": whitening["hash"] if whitening else None,
        "dtype": card.get("dtype", "fp32"),
        "index_type": index["type"] if index else "flat",
    }
    plain: dict[str, Any] = json.loads(json.dumps(parts))
    return plain


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """``name is this there and that here`` for each setting that differs; long values are cut short."""
    return [
        f"{name} is {_short(there.get(name))} there and {_short(here.get(name))} here"
        for name in [*here, *(there.keys() - here.keys())]
        if there.get(name) != here.get(name)
    ]


def _short(value: object) -> str:
    if value is None:
        return "none"
    text = str(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def data_of(card: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The data cards of the sources whose images a collection has, in the order of its rows."""
    return [card["data"], *(card.get("added") or [])]


def images_in(data: Mapping[str, Any]) -> int:
    """How many rows a collection has of a source: its images without those that could not be read."""
    unreadable = data.get("unreadable") or {"count": 0}
    return int(data["images"]) - int(unreadable["count"])


def url_of(data: Mapping[str, Any]) -> str:
    """Where a source's images are, whichever folder one is in."""
    return str(data.get("absolute_url") or data["url"])


def same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two cards describe the same vectors of the same images."""
    prints = [[data["fingerprint"] for data in data_of(card)] for card in (one, other)]
    return settings_of(one) == settings_of(other) and prints[0] == prints[1]
