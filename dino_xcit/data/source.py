"""The interface of a data set: numbered items with a name and an optional label."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

Item = bytes | NDArray[np.uint8]
"""An encoded image file, or decoded pixels: [height, width] or [height, width, 3], uint8."""

MAX_CLASSES = 1_000_000
"""Labels must be less than this."""

_NAMED_PART = re.compile(r"(.+?)/(train|val)/*(\?.*)?", re.DOTALL)


@runtime_checkable
class Source(Protocol):
    """Random access to images. Implementations have no open files, so that workers can share them."""

    url: str
    """URL given to :func:`dino_xcit.data.open_source`, with the opened part."""
    classes: tuple[str, ...] | None
    """Class names in label order; None without labels."""
    labels: NDArray[np.int64] | None
    """[len], available without reading images; None without labels."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> tuple[Item, int | None]:
        """Read item ``index``; return it and its label (None without labels)."""
        ...

    def name(self, index: int) -> str:
        """Return the name of item ``index``, such as its path. Unique within the source."""
        ...

    def fingerprint(self) -> str:
        """Return a hash of the items, their order and their labels, the key of the feature cache."""
        ...


@runtime_checkable
class AnnotatedSource(Protocol):
    """A source with more than a label for each image."""

    def annotation(self, index: int) -> bytes:
        """Return the annotation of item ``index``, such as its mask as a file."""
        ...


class MinimalSource(Protocol):
    """The required part of :class:`Source`."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> tuple[Item, int | None]:
        """See :meth:`Source.read`."""
        ...

    def name(self, index: int) -> str:
        """See :meth:`Source.name`."""
        ...


def completed(source: MinimalSource, url: str) -> Source:
    """Add the missing attributes of :class:`Source` to a minimal source."""
    return source if isinstance(source, Source) else _Completed(source, url)


class _Completed:
    def __init__(self, source: MinimalSource, url: str) -> None:
        self._source, self.url = source, getattr(source, "url", url)
        labels = getattr(source, "labels", None)
        self.labels: NDArray[np.int64] | None = None if labels is None else np.asarray(labels, dtype=np.int64)
        self.classes: tuple[str, ...] | None = getattr(source, "classes", None)
        if self.labels is not None and self.classes is None:
            self.classes = tuple(map(str, range(int(self.labels.max(initial=-1)) + 1)))
        self.read, self.name = source.read, source.name

    def __len__(self) -> int:
        return len(self._source)

    def fingerprint(self) -> str:
        names = (self.name(index) for index in range(len(self)))
        return hash_lines((*names, *(map(str, self.labels.tolist()) if self.labels is not None else ())))


def split_part(url: str) -> tuple[str, str | None]:
    """Split the part, ``train``, ``val`` or None, off a URL: (``hf:DIR?label=none``, ``val``) of
    ``hf:DIR/val?label=none``."""
    named = _NAMED_PART.fullmatch(url)
    return (named[1] + (named[3] or ""), named[2]) if named else (url, None)


def number_classes(names: Sequence[str]) -> tuple[NDArray[np.int64], list[str]]:
    """Return labels [len(names)], and the class names: the distinct names in sorted order.

    Names are normalized to NFC, as macOS and Linux encode the same name differently.
    """
    composed = [unicodedata.normalize("NFC", name) for name in names]
    classes = sorted(set(composed))
    number = {name: label for label, name in enumerate(classes)}
    return np.array([number[name] for name in composed], dtype=np.int64), classes


def evenly_spaced(count: int, wanted: int) -> list[int]:
    """Return at most ``wanted`` indices evenly spaced over ``range(count)``, the first and the last included."""
    return np.unique(np.linspace(0, count - 1, min(count, wanted)).astype(np.int64)).tolist()


def hash_lines(lines: Iterable[str]) -> str:
    """Return the SHA-256 of text lines, in hexadecimal."""
    digest = hashlib.sha256()
    for line in lines:
        digest.update(line.encode("utf-8", "surrogateescape"))
        digest.update(b"\n")
    return digest.hexdigest()


def identity(source: Source, samples: int = 1000) -> str:
    """Return the number of images and a hash of ``samples`` evenly spaced names and annotations.

    A fast check that detects added and removed images, another order and other annotations, but not changed images. For
    these see :meth:`Source.fingerprint`, which may access every file.
    """
    chosen = evenly_spaced(len(source), samples)
    lines = [source.name(index) for index in chosen]
    if isinstance(source, AnnotatedSource):
        lines += [str(source.classes), *(hashlib.sha256(source.annotation(index)).hexdigest() for index in chosen)]
    digest = hash_lines(lines)
    return f"{len(source)} images, {digest[:12]}"


class Subset:
    """Some items of another source, in a given order, optionally with other labels."""

    def __init__(
        self,
        source: Source,
        indices: NDArray[np.int64],
        relabel: NDArray[np.int64] | None = None,
        classes: tuple[str, ...] | None = None,
    ) -> None:
        """``relabel[old label]`` is the new label, and ``classes`` are the names in the new order; both or neither."""
        self._source = source
        self._indices = indices
        self.url = source.url if len(indices) == len(source) else f"{source.url}[{len(indices)} of {len(source)}]"
        self.classes = source.classes if classes is None else classes
        self.labels = None if source.labels is None else source.labels[indices]
        if relabel is not None and self.labels is not None:
            self.labels = relabel[self.labels]

    def __len__(self) -> int:
        return len(self._indices)

    def read(self, index: int) -> tuple[Item, int | None]:
        item, _ = self._source.read(int(self._indices[index]))
        return item, None if self.labels is None else int(self.labels[index])

    def name(self, index: int) -> str:
        return self._source.name(int(self._indices[index]))

    def fingerprint(self) -> str:
        labels = b"" if self.labels is None else self.labels.tobytes()
        parts = [
            self._source.fingerprint(),
            *(hashlib.sha256(x).hexdigest() for x in (self._indices.tobytes(), labels)),
        ]
        return hash_lines(parts)
