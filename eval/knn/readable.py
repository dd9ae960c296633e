"""Which images are measured, where some cannot be read (``--unreadable skip``)."""

from __future__ import annotations

import numpy as np

from dino_xcit.data import Source, Subset
from dino_xcit.runtime import logging as log
from eval.config import KnnConfig
from eval.features import Features, fingerprint_without, unreadable_card
from eval.knn.report import unreadable_notices
from eval.results import Card, data_card


def measured(
    sources: tuple[Source, Source], parts: tuple[Features, Features], config: KnnConfig
) -> tuple[tuple[Source, Source], dict[str, Card]]:
    """The images that could be read, and the cards of the data; says how many could not."""
    read, cards = list(sources), dict[str, Card]()
    for place, (name, meant) in enumerate((("train", "training"), ("val", "validation"))):
        source, part = sources[place], parts[place]
        cards[name] = data_card(source, fingerprint_without(part.fingerprint, part.unreadable))
        if len(part.unreadable):
            for notice in unreadable_notices(meant, source, part.unreadable):
                log.warning(f"{notice}{f'; {config.json} names them' if config.json else ''}")
            read[place] = Subset(source, np.delete(np.arange(len(source)), part.unreadable))
            names = [source.name(int(number)) for number in part.unreadable]
            cards[name] |= {"images": len(read[place]), "unreadable": unreadable_card(names)}
    return (read[0], read[1]), cards
