"""Images in Hugging Face datasets: ``hf:NAME_OR_DIR`` and ``parquet:PATTERN``.

The datasets library keeps an Arrow copy of the data and maps it into memory. Images stay encoded, and random access
reads the bytes of one image only. One process writes the copy while the others wait.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard
from urllib.parse import unquote

import fsspec
import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from dino_xcit.data import storage
from dino_xcit.data.decode import UndecodableImage
from dino_xcit.data.index import cache_folder
from dino_xcit.data.source import MAX_CLASSES, Item, evenly_spaced, hash_lines, number_classes, split_part
from dino_xcit.data.storage import expand
from dino_xcit.errors import InputError, near_matches, one_line
from dino_xcit.runtime import distributed
from dino_xcit.runtime import logging as log
from dino_xcit.runtime.logging import counted

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa

IMAGE_NAMES = ("image", "img", "jpg", "jpeg", "png", "webp", "bytes", "image_bytes", "picture", "photo")
"""Names of image columns of type bytes, used if no column has the type Image."""
LABEL_NAMES = ("label", "labels", "fine_label", "class", "target", "cls")
"""Names of label columns of integers or strings, used if no column has the type ClassLabel."""
VAL = ("val", "validation", "test")
"""Names of the validation part, in order of preference."""

_QUERY = re.compile(r"\?((?:image|label)=[^&?]*(?:&(?:image|label)=[^&?]*)*)$")


class HFSource:
    """The rows of a :class:`datasets.Dataset`."""

    def __init__(self, url: str, dataset: datasets.Dataset, image: str, label: str | None) -> None:
        """``image`` and ``label`` are column names.

        Raises:
            InputError: Only some rows have a label, or a label is out of range.
        """
        import datasets

        self.url, self._image = url, image
        self.labels, self.classes = (None, None) if label is None else _labels(dataset, label, url)
        self.label_problem = ""
        """Why expected labels are missing; else empty."""
        if self.labels is None:
            columns = [label] if label else [name for name in dataset.features if name.lower() in LABEL_NAMES]
            kinds = ", ".join(f"{name} ({_type_name(dataset.features[name])})" for name in columns)
            self.label_problem = f"its column {kinds} has no class numbers or names" if kinds else ""
        if isinstance(dataset.features[image], datasets.Image):
            dataset = dataset.cast_column(image, datasets.Image(decode=False))
        self._dataset = dataset.select_columns(image)

    def __len__(self) -> int:
        return len(self._dataset)

    def name(self, index: int) -> str:
        """Return a name such as ``00000017/cat.jpg``: the row, and the file name of the image if it has one."""
        row = range(len(self))[index]
        path = self._part("path")
        own = None if path is None else path[row].as_py()
        return f"{row:08d}/{os.path.basename(own)}" if own else f"{row:08d}"

    def read(self, index: int) -> tuple[Item, int | None]:
        """Read item ``index``.

        Raises:
            UndecodableImage: The row has no image.
            InputError: The row names a file that cannot be read.
        """
        value = self._dataset[range(len(self))[index]][self._image]
        if isinstance(value, dict):
            path, value = value.get("path"), value["bytes"]
            if value is None and _is_place(path):
                value = storage.read_file(path, storage.MAX_IMAGE_BYTES)
        if value is None:
            cause = "the row has no image"
            raise UndecodableImage(f"{self.name(index)} cannot be read: {cause}; remove the row", cause)
        return value, None if self.labels is None else int(self.labels[index])

    def fingerprint(self) -> str:
        """Hash sizes, names, labels, the bytes of 64 images, and the sizes and times of files that rows name."""
        import pyarrow.compute as pc

        names, lengths = self._part("path"), pc.binary_length(self._part("bytes"))
        sizes = [np.asarray(pc.fill_null(lengths, -1), dtype=np.int64)]
        if self.labels is not None:
            sizes.append(self.labels)
        some = evenly_spaced(len(self), 64)
        images = (self._dataset[row][self._image] for row in some)
        contents = (image["bytes"] if isinstance(image, dict) else image for image in images)
        digests = [hashlib.sha256(content or b"").hexdigest() for content in (*(s.tobytes() for s in sizes), *contents)]
        if names is None:
            return hash_lines(digests)
        states = map(storage.state, filter(_is_place, names.filter(pc.is_null(lengths)).to_pylist()))
        return hash_lines([*digests, *(name or "" for name in names.to_pylist()), *states])

    def _part(self, field: str) -> pa.ChunkedArray | None:
        """Return a field of the image column, or the column itself if it is not a struct."""
        import pyarrow as pa
        import pyarrow.compute as pc

        column = self._dataset.data.column(self._image)
        if not pa.types.is_struct(column.type):
            return column if field == "bytes" else None
        return pc.struct_field(column, field) if column.type.get_field_index(field) >= 0 else None


def _is_place(path: str | None) -> TypeGuard[str]:
    """Whether the path of an image is a location, as in folders opened by the library, and not only a name.

    Relative paths are names. Chained file systems of fsspec are refused, as some execute code.
    """
    return path is not None and (os.path.isabs(path) or storage.is_remote(path)) and "::" not in path


def open_hf(name: str, part: str | None = None) -> HFSource:
    """Open a data set of the Hugging Face hub, or a folder written by ``save_to_disk``.

    Args:
        name: ``ORG/NAME``, ``ORG/NAME/CONFIG``, or a folder. A trailing ``/train`` or ``/val`` selects the part, and
            ``?image=COLUMN&label=COLUMN`` the columns (``label=none``: no labels). Cached data sets need no network.
        part: ``train`` or ``val`` (``validation``, ``test``); None: ``train``.

    Raises:
        InputError: The package is missing, the data set or part does not exist, or the columns are ambiguous.
    """
    datasets = _import_datasets()
    name, image, label = _split_query(name)
    name, named = split_part(name)
    part = named or part
    url = f"hf:{name}"
    folder = Path(name).expanduser()

    def load() -> Any:
        if any((folder / file).is_file() for file in ("dataset_dict.json", "state.json")):
            return datasets.load_from_disk(str(folder))
        if folder.is_dir():
            return datasets.load_dataset(str(folder))
        return datasets.load_dataset(*([name] if name.count("/") < 2 else name.rsplit("/", 1)))

    found = _explaining(url, "check the name and the network", load)
    if isinstance(found, datasets.Dataset):
        found = {"train": found}
    wanted = VAL if part == "val" else ("train",)
    split = next((name for name in wanted if name in found), None)
    if split is None:
        raise InputError(f"{url} has the parts {', '.join(found)}, expected {' or '.join(wanted)}")
    return _source(f"{url}/{'val' if part == 'val' else 'train'}", found[split], image, label)


def open_parquet(pattern: str, part: str | None = None) -> HFSource:
    """Open Parquet files. The first call copies them to Arrow.

    Args:
        pattern: Pattern of files (see :func:`dino_xcit.data.storage.expand`), or a folder. In the folder, or in its
            sub-folder ``data``, file names begin with the part, as in repositories of the hub. ``?image=COLUMN`` and
            ``?label=COLUMN`` as for :func:`open_hf`.
        part: ``train`` or ``val``, for folders; None: ``train``.

    Raises:
        InputError: The package is missing, a file is missing or damaged, the disk has no room for the copy, or the
            columns are ambiguous.
    """
    datasets = _import_datasets()
    pattern, image, label = _split_query(pattern)
    pattern = _of_part(pattern, part)
    url, paths = f"parquet:{pattern}", expand(pattern)
    cache = cache_folder() / "arrow"

    def load() -> Any:
        local = _downloaded(paths, cache) if storage.is_remote(pattern) else paths
        builder = datasets.load_dataset_builder("parquet", data_files={"train": local}, cache_dir=str(cache))
        if os.environ.get("LOCAL_RANK", "0") == "0" and not os.path.isdir(builder.cache_dir):
            _announce_copy(url, paths, Path(builder.cache_dir))
        builder.download_and_prepare(verification_mode="no_checks")  # under the library's lock
        return builder.as_dataset(split="train")

    return _source(url, _explaining(url, "expected Parquet files of one data set", load), image, label)


def is_folder_of_parquet(pattern: str) -> bool:
    """Whether a pattern is a folder, which may have several parts."""
    pattern = _split_query(pattern)[0]
    return not any(letter in pattern for letter in "*?[{") and storage.is_folder(pattern)


def _import_datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise InputError(
            f"hf: and parquet: need the package datasets ({error}): pip install 'dino-xcit[hf]'"
        ) from error
    if not distributed.is_main():
        datasets.disable_progress_bars()
    return datasets


def _split_query(address: str) -> tuple[str, str, str]:
    """Split ``?image=...&label=...`` off an address: (address, image column or "", label column or "")."""
    query = _QUERY.search(address)
    if query is None:
        return address, "", ""
    chosen = dict(pair.partition("=")[::2] for pair in query[1].split("&"))
    return address[: query.start()], unquote(chosen.get("image", "")), unquote(chosen.get("label", ""))


def _of_part(pattern: str, part: str | None) -> str:
    """Turn a folder into the pattern of the files of a part, or of all files if no file name begins with a part."""
    if not is_folder_of_parquet(pattern):
        return pattern
    wanted = VAL if part == "val" else ("train",)
    for prefix in wanted if part == "val" else (*wanted, ""):
        for place in (pattern.rstrip("/"), f"{pattern.rstrip('/')}/data"):
            try:
                found = expand(f"{place}/{prefix}*.parquet")
            except InputError:
                continue
            if prefix or not any(path.rpartition("/")[2].startswith(("train", *VAL)) for path in found):
                return f"{place}/{prefix}*.parquet"
    raise InputError(
        f"no Parquet file in {pattern} or its folder 'data' has a name that begins with {' or '.join(wanted)}: give "
        f"a pattern of files, such as parquet:{pattern.rstrip('/')}/NAME-*.parquet"
    )


def _downloaded(paths: list[str], cache: Path) -> list[str]:
    """Download remote files that are new or have changed, and return the paths of the copies."""
    folder = cache / "downloads"
    folder.mkdir(parents=True, exist_ok=True)
    options = {"cache_storage": str(folder), "check_files": True}
    with FileLock(folder / ".lock"):  # one process downloads, the others use its files
        return fsspec.open_local([f"filecache::{path}" for path in paths], filecache=options)


def _announce_copy(url: str, paths: list[str], place: Path) -> None:
    size = sum(size for size, _ in storage.stamps(paths))
    place.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(place.parent).free
    if size > free:
        raise InputError(
            f"copying {url} to Arrow takes about {size / 1e9:.1f} GB, but {place.parent} has {free / 1e9:.1f} GB free: "
            "set DINO_XCIT_CACHE to a folder on a larger disk"
        )
    log.info(f"copying {counted(len(paths), 'file')} of {size / 1e9:.2g} GB to Arrow in {place}, once")


def _explaining(url: str, remedy: str, load: Callable[[], Any]) -> Any:
    """Return ``load()``, with any exception of the library as an InputError."""
    try:
        return load()
    except InputError:
        raise
    except Exception as error:
        cause = error.__cause__ or error  # the library's outer error names its operation, not the fault
        raise InputError(f"cannot read {url}: {one_line(cause) or type(cause).__name__}; {remedy}") from error


def _source(url: str, dataset: Any, image: str, label: str) -> HFSource:
    if not len(dataset):
        raise InputError(f"no image in {url}: it has no rows")
    return HFSource(url, dataset, _image_column(dataset, image, url), _label_column(dataset, label, url))


def _image_column(dataset: Any, wanted: str, url: str) -> str:
    import datasets

    def holds_bytes(feature: Any) -> bool:
        kind = feature.get("bytes") if isinstance(feature, dict) else feature
        return getattr(kind, "dtype", "") in ("binary", "large_binary")

    typed = [name for name, feature in dataset.features.items() if isinstance(feature, datasets.Image)]
    binary = [name for name, feature in dataset.features.items() if holds_bytes(feature)]
    known = binary if len(binary) == 1 else [name for name in binary if name.lower() in IMAGE_NAMES]
    return _only(dataset, wanted, typed + binary, typed or known, "image", url) or ""


def _label_column(dataset: Any, wanted: str, url: str) -> str | None:
    import datasets

    if wanted == "none":
        return None
    typed = [name for name, feature in dataset.features.items() if isinstance(feature, datasets.ClassLabel)]
    plain = [
        name
        for name, feature in dataset.features.items()
        if isinstance(feature, datasets.Value) and re.fullmatch(r"u?int\d+|(large_)?string", feature.dtype)
    ]
    known = [name for name in plain if name.lower() in LABEL_NAMES]
    return _only(dataset, wanted, typed + plain, typed or known, "label", url)


def _only(dataset: Any, wanted: str, possible: list[str], candidates: list[str], kind: str, url: str) -> str | None:
    """Return the requested column, or the only candidate; None if there is no label column."""
    columns = ", ".join(f"{name} ({_type_name(feature)})" for name, feature in list(dataset.features.items())[:20])
    if wanted:
        if wanted not in possible:
            raise InputError(
                f"column {wanted!r} of {url} has no {kind}s{near_matches(wanted, possible)}; the columns are {columns}"
            )
        return wanted
    if len(candidates) == 1 or (not candidates and kind == "label"):
        return candidates[0] if candidates else None
    found = (
        f"{url} has several {kind} columns: {' and '.join(candidates)}" if candidates else f"{url} has no image column"
    )
    remedy = f"choose one with ?{kind}={candidates[0] if candidates else 'NAME'}" + ", or ?label=none" * (
        kind == "label"
    )
    raise InputError(f"{found}; the columns are {columns}; {remedy}")


def _type_name(feature: Any) -> str:
    return str(getattr(feature, "dtype", None) or type(feature).__name__)[:60]


def _labels(dataset: Any, column: str, url: str) -> tuple[NDArray[np.int64] | None, tuple[str, ...] | None]:
    """Return labels [rows] and class names; None and None if no row has a label."""
    import pyarrow as pa
    import pyarrow.compute as pc

    values, feature = dataset.data.column(column), dataset.features[column]
    if feature.dtype.endswith("string"):
        distinct = [value for value in values.unique().to_pylist() if value is not None]
        numbers, classes = number_classes(distinct)
        places = np.asarray(pc.fill_null(pc.index_in(values, pa.array(distinct, values.type)), -1), dtype=np.int64)
        labels = np.append(numbers, -1)[places]
    else:
        labels = np.asarray(pc.fill_null(values.cast(pa.int64()), -1), dtype=np.int64)
    missing, last = int((labels < 0).sum()), int(labels.max())
    if missing == len(labels):  # the hub publishes unlabelled test parts this way
        return None, None
    if missing:
        raise InputError(
            f"{missing:,} of the {len(labels):,} rows of {url} have no label in column {column!r}: expected a label in "
            "every row or in none; add ?label=none to ignore the labels"
        )
    if not feature.dtype.endswith("string"):
        names = getattr(feature, "names", None)
        highest = (len(names) if names else MAX_CLASSES) - 1
        if last > highest:
            raise InputError(f"column {column!r} of {url} has the label {last}, expected at most {highest:,}")
        classes = names or list(map(str, range(last + 1)))
    return labels, tuple(classes)
