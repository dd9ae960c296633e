"""Which columns of a Parquet file hold the images, their names and their labels, and what the labels are called."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dino_xcit.errors import InputError, near_matches

if TYPE_CHECKING:
    import pyarrow as pa

IMAGE_NAMES = ("image", "img", "jpg", "jpeg", "png", "webp", "bytes", "image_bytes", "picture", "photo")
"""Preferred where several columns hold bytes."""
LABEL_NAMES = ("label", "labels", "fine_label", "class", "target", "cls")
"""Looked for in this order of which two at once are an error, but for CIFAR-100's ``fine_label``."""
NONE = "none"
"""``?label=none``: no labels, whatever there is."""


@dataclass(frozen=True)
class Columns:
    """The choice, as Parquet's own paths, which join the fields of a structure by dots."""

    image: str
    names: str | None
    """The column with the images' own paths."""
    label: str | None
    text_label: bool
    """Labels are words, not numbers."""
    classes: tuple[str, ...] | None
    """What the hub's metadata call the label's numbers."""


def choose(schema: pa.Schema, image: str, label: str, path: str) -> Columns:
    """Choose columns.

    Args:
        schema: of the file.
        image, label: what the URL asks for; empty: by :data:`IMAGE_NAMES`, :data:`LABEL_NAMES` and the types.
        path: the file, for errors.

    Raises:
        InputError: no such column, or several that could be meant.
    """
    images = {field.name: field.type for field in schema if _holds_bytes(field.type)}
    if image and image not in images:
        raise InputError(
            f"column {image!r} of {path} {'is none' if image not in schema.names else 'holds no bytes'}"
            f"{near_matches(image, images)}; it has {_listed(schema)}"
        )
    known = [name for name in images if name.lower() in IMAGE_NAMES]
    candidates = [image] if image else list(images) if len(images) == 1 else known
    if len(candidates) != 1:
        found = f"no column of {path} holds" if not images else f"it is not clear which column of {path} holds"
        example = next(iter(images), "NAME")
        raise InputError(
            f"{found} encoded images: it has {_listed(schema)}; expected one of type binary, or a structure with a "
            f"field 'bytes'" + (f": say which by adding ?image={example} to the URL" if images else "")
        )
    chosen = candidates[0]
    chosen_label = _label(schema, label, path)
    kind = images[chosen]
    bytes_path, names = chosen, None
    if _is_structure(kind):
        bytes_path = f"{chosen}.bytes"
        names = f"{chosen}.path" if kind.get_field_index("path") >= 0 and _is_text(kind.field("path").type) else None
    return Columns(
        image=bytes_path,
        names=names,
        label=chosen_label,
        text_label=chosen_label is not None and _is_text(schema.field(chosen_label).type),
        classes=_hub_classes(schema, chosen_label),
    )


def _label(schema: pa.Schema, wanted: str, path: str) -> str | None:
    if wanted == NONE:
        return None
    labels = [field.name for field in schema if _is_text(field.type) or _is_whole_number(field.type)]
    if wanted:
        if wanted not in labels:
            raise InputError(
                f"column {wanted!r} of {path} "
                f"{'is none' if wanted not in schema.names else 'holds neither whole numbers nor words'}"
                f"{near_matches(wanted, labels)}; it has {_listed(schema)}"
            )
        return wanted
    found = [name for name in LABEL_NAMES if name in labels]
    if len(found) > 1:
        raise InputError(
            f"it is not clear which column of {path} holds the labels, {' or '.join(found)}: say which by adding "
            f"?label={found[0]} to the URL, or ?label={NONE}"
        )
    return found[0] if found else None


def _hub_classes(schema: pa.Schema, label: str | None) -> tuple[str, ...] | None:
    """The class names that the Hugging Face hub keeps in the schema's metadata, as JSON."""
    text = (schema.metadata or {}).get(b"huggingface")
    if label is None or text is None:
        return None
    try:
        names = json.loads(text)["info"]["features"][label]["names"]
    except (ValueError, LookupError, TypeError, RecursionError):  # no such metadata, or of another kind
        return None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names) or not names:
        return None
    return tuple(names)


def _holds_bytes(kind: pa.DataType) -> bool:
    if _is_structure(kind):
        return kind.get_field_index("bytes") >= 0 and _is_binary(kind.field("bytes").type)
    return _is_binary(kind)


def _is_structure(kind: pa.DataType) -> bool:
    from pyarrow import types

    return bool(types.is_struct(kind))


def _is_binary(kind: pa.DataType) -> bool:
    from pyarrow import types

    return bool(types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind))


def _is_text(kind: pa.DataType) -> bool:
    from pyarrow import types

    if types.is_dictionary(kind):
        kind = kind.value_type
    return bool(types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind))


def _is_whole_number(kind: pa.DataType) -> bool:
    from pyarrow import types

    return bool(types.is_integer(kind))


def _listed(schema: pa.Schema) -> str:
    """Columns and their types, for a person; of many the first."""
    shown = [f"{field.name} ({str(field.type)[:60]})" for field in list(schema)[:20]]
    return ("the columns " + ", ".join(shown) if shown else "no columns") + (" ..." if len(schema) > 20 else "")
