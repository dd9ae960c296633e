"""The model card of ``--to hf``: README.md, which says what the files say and nothing more."""

from __future__ import annotations

import dataclasses
import html
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import dino_xcit
from dino_xcit.config import RESUME_SAFE_FIELDS, PretrainConfig
from dino_xcit.errors import InputError, one_line, printable
from dino_xcit.export.comparison import Difference
from dino_xcit.export.provenance import shown_place
from dino_xcit.models.xcit import XCIT_SIZES, XCiT
from dino_xcit.runtime import atomic
from dino_xcit.weights import NETWORKS, LoadedBackbone
from dino_xcit.weights.stored_network import Layout

Card = dict[str, Any]
"""A result file of the evaluators (eval/results.py)."""

CARD, CURVES = "README.md", "curves.png"
"""What it writes."""
MOST_BYTES = 16 << 20
"""Of a result file (a megabyte where it says image by image what was right), and of curves.png."""
MOST_RECORDS = 60
"""Lines of the table from one result file."""
MOST_DEEP = 6
"""Names within names in a result file."""

_NOT_THE_RECIPE = (RESUME_SAFE_FIELDS - {"batch_size_per_gpu", "accumulation_steps"}) | {"arch", "data_path"}
_FRONT_MATTER = """\
---
library_name: timm
pipeline_tag: image-feature-extraction
tags:
- image-feature-extraction
- timm
{tags}---
"""


def read_card(path: Path, weights_hash: str) -> Card:
    """A result file that was measured with these weights.

    Raises:
        InputError: it cannot be read, is no result file, or measured other weights.
    """
    try:
        if not path.is_file():
            raise InputError(f"there is no file {path}: --card takes files that --json of run_knn.py and others wrote")
        if path.stat().st_size > MOST_BYTES:
            raise InputError(f"{path} has {path.stat().st_size:,} bytes: --card takes result files, which are small")
        card = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is no JSON ({one_line(error)}): --card takes files that --json wrote") from error
    parts = ("protocol", "weights", "data", "transform")
    if not isinstance(card, dict) or not all(isinstance(card.get(part), dict) for part in parts):
        raise InputError(f"{path} is no result file of the evaluators: expected {', '.join(parts)} in it")
    if card["weights"].get("hash") != weights_hash:
        found = printable(str(card["weights"].get("hash"))[:12])
        raise InputError(
            f"{path} measured other weights ({found}, not {weights_hash[:12]}): measure these with --json, or leave "
            "the card out"
        )
    return card


def write(
    loaded: LoadedBackbone, cards: Sequence[Card], compared: Sequence[Difference], origin: str, folder: Path
) -> None:
    """README.md, and curves.png if it lies beside the checkpoint.

    Args:
        cards: what :func:`read_card` gave.
        compared: how far timm's features are from ours, on the images of ``origin``.
    """
    curves = loaded.path.parent / CURVES
    has_curves = curves.is_file() and curves.stat().st_size <= MOST_BYTES
    if has_curves:
        with open(curves, "rb") as original:
            atomic.write(folder / CURVES, lambda copy: shutil.copyfileobj(original, copy))
    sections = [
        _head(loaded),
        _training(loaded, has_curves),
        _preparation(loaded),
        *([_evaluation(cards)] if cards else []),
        _use(loaded, compared, origin),
    ]
    content = "\n".join(sections).encode("utf-8", "backslashreplace")
    atomic.write(folder / CARD, lambda file: file.write(content))


def _head(loaded: LoadedBackbone) -> str:
    parameters = sum(parameter.numel() for parameter in loaded.backbone.parameters())
    facts: list[tuple[str, object]] = [("architecture", loaded.arch)]
    if isinstance(loaded.backbone, XCiT):
        size = XCIT_SIZES[loaded.arch.rpartition("_p")[0]]
        facts += [
            ("patch", f"{loaded.backbone.patch_size} pixels"),
            ("blocks", f"{size.depth}, and {size.class_blocks} of class attention"),
            ("heads", size.heads),
        ]
    facts += [
        ("features", loaded.backbone.embed_dim),
        ("parameters", f"{parameters:,}"),
        ("network", loaded.network),
        ("SHA-256 of the weights", loaded.hash),
        ("exported by", f"dino_xcit {dino_xcit.__version__} from {loaded.path.name}"),
    ]
    papers, tags = [], ""
    if isinstance(loaded.backbone, XCiT):
        papers.append("[XCiT](https://arxiv.org/abs/2106.09681)")
        tags += "- xcit\n"
    if _is_dinos(loaded):
        papers.append("[DINO](https://arxiv.org/abs/2104.14294)")
        tags += "- dino\n"
    if loaded.network in NETWORKS or _is_dinos(loaded):  # of a file with one network nobody knows
        tags += "- self-supervised-learning\n"
    named = f" ({', '.join(papers)})" if papers else ""
    lines = [
        _FRONT_MATTER.format(tags=tags),
        f"# {_text(loaded.arch)}\n",
        f"An image encoder{named}: from an image to a vector of {loaded.backbone.embed_dim} features.\n",
        *_table(("", ""), [(name, value) for name, value in facts]),
    ]
    return "\n".join(lines) + "\n"


def _is_dinos(loaded: LoadedBackbone) -> bool:
    """Whether the file shows that DINO trained it: by its layout, or by the settings of a backbone alone.

    Others have a student and a teacher too: MoCo, BYOL in lightly's or solo-learn's files, DINOv2; and iBOT has DINO's
    layout and settings, and a share of patches to hide.
    """
    is_ibot = "pred_ratio" in loaded.training or "masked_embed" in loaded.left_aside
    return (loaded.layout == Layout.DINO or "teacher_temp" in loaded.training) and not is_ibot


def _training(loaded: LoadedBackbone, has_curves: bool) -> str:
    lines = ["## Training\n"]
    lines.append(f"Data: {_text(shown_place(loaded.data))}.\n" if loaded.data else "The file does not say on what.\n")
    recipe = list(_recipe(loaded.training))
    if recipe:
        named = loaded.training.get("recipe")
        of = f" of the recipe {_text(named)}" if named and isinstance(named, str) else ""
        lines.append(f"Stored settings{of} that differ from run_pretrain.py's defaults:\n")
        lines += _table(("setting", "value", "default"), recipe)
    elif loaded.training:
        lines.append("The stored settings are run_pretrain.py's defaults.")
    else:
        lines.append("The file holds no settings of its training.")
    if has_curves:
        lines.append("\n![Metrics of the run](curves.png)")
    return "\n".join(lines) + "\n"


def _recipe(training: Mapping[str, Any]) -> Iterator[tuple[str, object, object]]:
    for field in dataclasses.fields(PretrainConfig):
        if field.name in _NOT_THE_RECIPE or field.name not in training:
            continue
        stored, default = training[field.name], field.default
        values, defaults = _plain(stored), _plain(default)
        if values is not None and values != defaults:
            yield field.name, _shown(stored), _shown(default)


def _preparation(loaded: LoadedBackbone) -> str:
    transform = loaded.transform
    before = ""
    if not loaded.transform_from:
        before = (
            "The file does not say how images are prepared; assumed here and in config.json is "
            f"{loaded.transform_guess}: "
        )
    elif loaded.transform_exception:
        before = f"The weights' own way{_text(loaded.transform_exception)}. "
    return (
        f"## Images\n\n{before}"
        f"Shorter side to {transform.resize} pixels ({transform.interpolation}), centre crop of {transform.crop}, "
        f"mean {_shown(transform.mean)}, deviation {_shown(transform.std)}. config.json says the same to timm.\n"
    )


def _evaluation(cards: Sequence[Card]) -> str:
    lines = ["## Evaluation\n", "Accuracies in percent; in brackets, the interval that the protocol names.\n"]
    rows: list[tuple[object, ...]] = []
    for number, card in enumerate(cards, start=1):
        records = list(_records(card.get("results"), ()))
        for where, figures in records[:MOST_RECORDS]:
            rows.append((number, card.get("measure"), where, figures))
        if len(records) > MOST_RECORDS:
            rows.append((number, card.get("measure"), f"and {len(records) - MOST_RECORDS} more in the file", ""))
    lines += _table(("protocol", "measure", "of", "figures"), rows)
    for number, card in enumerate(cards, start=1):
        lines.append(f"\nProtocol {number}:\n")
        lines += _table(("", ""), list(_protocol(card)))
    return "\n".join(lines) + "\n"


def _records(value: object, path: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """Each mapping of a result that holds numbers: where it stands, and its values by name."""
    if isinstance(value, list):
        for inner in value:
            if isinstance(inner, Mapping):
                yield from _records(inner, path)
    if not isinstance(value, Mapping) or len(path) > MOST_DEEP:
        return
    shown = []
    for name, inner in value.items():
        if isinstance(inner, (bool, int, float, str)):
            interval = value.get(f"{name}_interval")
            shown.append(f"{name} {_shown(inner)}" + (f" {_interval(interval)}" if interval else ""))
    if any(isinstance(inner, (int, float)) for inner in value.values()):
        yield " / ".join(path), ", ".join(shown)
    for name, inner in value.items():
        yield from _records(inner, (*path, str(name)[:80]))


def _interval(value: object) -> str:
    numbers = _plain(value)
    return f"[{', '.join(map(_shown, numbers))}]" if isinstance(numbers, list) and len(numbers) == 2 else ""


def _protocol(card: Card) -> Iterator[tuple[str, object]]:
    for name, value in card["protocol"].items():
        if _plain(value) is not None:
            yield str(name), _shown(value)
    for part, data in card["data"].items():
        if isinstance(data, Mapping):
            place = shown_place(str(data.get("url"))[:500])
            fingerprint = str(data.get("fingerprint"))[:12]
            yield f"{part} images", f"{_shown(data.get('images'))} of {place}, fingerprint {fingerprint}"
    yield "weights", str(card["weights"]["hash"])[:12]
    yield "transform", _named(card["transform"])
    for name in ("device", "date"):
        if isinstance(card.get(name), str):
            yield name, card[name]
    if isinstance(card.get("versions"), Mapping):
        yield "versions", _named(card["versions"])


def _use(loaded: LoadedBackbone, compared: Sequence[Difference], origin: str) -> str:
    greatest = max(difference.relative for difference in compared)
    sizes = ", ".join(f"{difference.size[0]} x {difference.size[1]}" for difference in compared)
    return f"""## Use

```python
import timm

model = timm.create_model("hf-hub:USER/NAME", pretrained=True).eval()  # or "local-dir:FOLDER"
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
features = model(transform(image)[None])  # [1, {loaded.backbone.embed_dim}]
```

When it was exported, timm's features were compared with the original network's on {_text(origin)}, at
{sizes} pixels (height x width): the greatest difference was {greatest:.1e} of
the greatest value.
"""


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    return lines + [f"| {' | '.join(_text(cell) for cell in row)} |" for row in rows]


def _plain(value: object) -> object:
    """Numbers, words, and short lists of them; None for anything else."""
    if isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)) and len(value) <= 32:
        return list(value) if all(isinstance(inner, (bool, int, float, str)) for inner in value) else None
    return None


def _shown(value: object) -> str:
    if isinstance(value, (list, tuple)):
        return " ".join(_shown(inner) for inner in value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _named(values: Mapping[str, object]) -> str:
    return ", ".join(f"{name} {_shown(value)}" for name, value in values.items() if _plain(value) is not None)


def _text(value: object) -> str:
    """A text of a file as one cell: nothing in it is Markdown or HTML."""
    line = html.escape(printable(" ".join(str(value)[:400].split())), quote=False)
    for letter in "\\`*_[]|#":
        line = line.replace(letter, f"\\{letter}")
    return line
