"""Settings of run_extract.py and run_retrieval.py: names, defaults, bounds and help texts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Ge, Le, MinLen

from dino_xcit.bounds import FilePath, Group, IsPath, Positional, Repeatable, Suffix, refuse_changed, shown
from dino_xcit.errors import InputError
from eval.config import BackboneConfig, IsOutput, Pooling

if TYPE_CHECKING:
    from eval.pooling import Descriptor


@dataclass(frozen=True)
class VectorConfig(BackboneConfig):
    """Settings of the vectors, shared by extraction and retrieval."""

    pooling: Annotated[Pooling, Group("vectors")] = "cls"
    """Vector of an image: the class token (cls), the mean or generalised mean (gem) of the patch tokens, or the class
    token concatenated with one of these means."""
    gem_p: float = 3.0
    """Exponent of the generalised mean: 1 is the mean, infinity the maximum."""
    scales: tuple[float, ...] = (1.0,)
    """Image sizes as factors of width and height, such as 1 0.7071 1.4142. The unit vectors of all sizes are
    averaged."""
    whiten: FilePath = ""
    """Whitening to apply: a file written by run_extract.py --learn-whitening."""

    def descriptor(self) -> Descriptor:
        """Build the descriptor from these settings."""
        from eval.pooling import Descriptor

        return Descriptor(self.pooling, self.gem_p, self.scales, self.precision)

    def check(self) -> None:
        """See :meth:`BackboneConfig.check`."""
        super().check()
        self.descriptor().check()


@dataclass(frozen=True)
class ExtractConfig(VectorConfig):
    """Extract vectors of images (--output-dir), search them (--query), or learn a whitening (--learn-whitening)."""

    output_dir: Annotated[FilePath, Group("collection")] = ""
    """Folder of the collection: vectors.npy, paths.txt, index.faiss and metadata.json."""
    normalise: bool = True
    """Scale each vector to unit length, so that inner products are cosine similarities."""
    dtype: Literal["fp32", "fp16"] = "fp32"
    """Type of the stored vectors."""
    index_type: Literal["flat", "hnsw"] = "flat"
    """flat: exact search. hnsw: approximate search in a graph; its recall is measured and written to metadata.json."""
    shard_images: Annotated[int, Ge(1)] = 16384
    """Approximate number of images per shard. A killed run loses at most the current shard."""
    unreadable: Literal["refuse", "skip"] = "refuse"
    """Handling of unreadable images: end the run with the image's name, or skip and list them."""
    overwrite: bool = False
    """Replace another extraction in output_dir."""
    add: bool = False
    """Add the images of data_path to the collection in output_dir; weights and settings must be the same."""
    learn_whitening: Annotated[FilePath, IsOutput, Group("whitening")] = ""
    """Learn PCA whitening from the vectors of the collection --index, and write it to this file."""
    whiten_dim: Annotated[int, Ge(0)] = 0
    """Dimensions after the learned whitening; 0: all."""
    query: Annotated[tuple[str, ...], IsPath, Repeatable, Group("query")] = ()
    """Image files to search for."""
    index: FilePath = ""
    """Folder of the collection to search or to learn whitening from. Default for --query: OUTPUT_DIR."""
    top: Annotated[int, Ge(1)] = 10
    """Number of nearest images to show."""
    sheet: Annotated[FilePath, IsOutput, Suffix(".png")] = ""
    """Draw the queries and their results to this .png file. Default: contact_sheet.png in the folder of the
    collection."""

    def check(self) -> None:
        """See :meth:`BackboneConfig.check`."""
        super().check()
        if not self.learn_whitening:
            refuse_changed(self, ("whiten_dim",), "without --learn-whitening")
        if len(self.scales) > 1 and not self.normalise:
            raise InputError(
                f"scales is {shown(self.scales)}, but averaging over scales needs unit vectors: omit --no-normalise or "
                "give one scale"
            )
        if self.query and not self.learn_whitening:
            refuse_changed(self, _STORED_IN_METADATA, "for --query, which reads them from metadata.json")
        if self.add and self.overwrite:
            raise InputError("both --add and --overwrite are given: omit one of them")
        if (self.learn_whitening and not self.index) or (self.query and not (self.index or self.output_dir)):
            raise InputError("no index given: add --index FOLDER, written by run_extract.py --output-dir FOLDER")
        if not (self.learn_whitening or self.query or self.output_dir):
            raise InputError(
                "no output_dir given: use --output-dir FOLDER for the vectors, or --query IMAGE --index FOLDER"
            )


_STORED_IN_METADATA = (
    "pooling", "gem_p", "scales", "whiten", "normalise", "dtype", "index_type", "eval_crop", "eval_resize", "add",
    "overwrite", "data_path", "shard_images", "unreadable", "precision",
)  # fmt: skip
"""Settings of run_extract.py that --query reads from the collection's metadata.json or does not use."""


_PROTOCOLS_OF = {
    ("ground_truth", "queries"): ("oxford", "paris"),
    ("distractors",): ("oxford", "paris", "copydays"),
    ("ks",): ("folder",),
    ("first", "second", "threshold", "most_pairs", "csv", "sheet"): ("duplicates",),
}
"""Settings of run_retrieval.py that only some protocols accept."""


@dataclass(frozen=True)
class RetrievalConfig(VectorConfig):
    """Evaluate image retrieval. DATA_PATH is the folder of the benchmark as published (oxford, paris, copydays) or
    the labelled images (folder)."""

    protocol: Annotated[
        Literal["", "oxford", "paris", "copydays", "folder", "duplicates"], Positional, Group("evaluation")
    ] = ""
    """Protocol, also accepted as the first word of the command line. oxford, paris: Revisited Oxford and Paris.
    copydays: copy detection on Copydays. folder: leave-one-out among labelled images. duplicates: near duplicates
    between or within sets."""
    fit: Literal["auto", "centre", "whole", "square"] = "auto"
    """How images are resized. centre: the checkpoint's transform. whole: keep the aspect ratio, reduce the longer side
    to image_size. square: resize to image_size x image_size. auto: whole for oxford and paris, square for copydays,
    else centre."""
    image_size: Annotated[int, Ge(0)] = 0
    """Size in pixels for --fit whole and square (alias: --imsize); 0: 224 for whole, 320 for square, as in DINO's
    scripts."""
    ground_truth: FilePath = ""
    """For oxford and paris: the ground truth. Default: DATA_PATH/gnd_roxford5k.pkl or gnd_rparis6k.pkl."""
    queries: Literal["box", "whole"] = "box"
    """For oxford and paris: crop queries to their box, as the benchmark defines, or use the whole image, as DINO's
    script does."""
    distractors: str = ""
    """For oxford, paris and copydays: additional images without a match, in any form that --data-path accepts, such as
    the million distractors of Revisited Oxford and Paris."""
    ks: Annotated[tuple[int, ...], Ge(1), MinLen(1)] = (1, 2, 4, 8)
    """For folder: values of k for recall@k."""
    first: str = ""
    """For duplicates: the first set, such as the training images."""
    second: str = ""
    """For duplicates: the second set, such as the test images. Default: search for pairs within FIRST."""
    threshold: Annotated[float, Ge(-1), Le(1)] = 0.95
    """For duplicates: minimum cosine similarity of a pair."""
    most_pairs: Annotated[int, Ge(1)] = 1_000_000
    """For duplicates: maximum number of pairs; more are an error."""
    csv: Annotated[FilePath, IsOutput] = ""
    """For duplicates: write the pairs to this .csv file."""
    sheet: Annotated[FilePath, IsOutput, Suffix(".png")] = ""
    """For duplicates: draw the most similar pairs to this .png file."""

    def fitted(self) -> str:
        """Resolve ``fit``: ``centre``, ``whole`` or ``square``."""
        usual = {"oxford": "whole", "paris": "whole", "copydays": "square"}.get(self.protocol, "centre")
        return usual if self.fit == "auto" else self.fit

    def check(self) -> None:
        """See :meth:`BackboneConfig.check`."""
        super().check()
        if not self.protocol:
            raise InputError(
                "no protocol given: expected oxford, paris, copydays, folder or duplicates, such as python "
                "run_retrieval.py oxford --weights FILE --data-path DIR"
            )
        if self.protocol == "duplicates" and (self.data_path or not self.first):
            raise InputError(
                f"data_path is {shown(self.data_path)} and first is {shown(self.first)}: duplicates expects --first "
                "DIR --second DIR, or only --first DIR for pairs within one set"
            )
        for names, protocols in _PROTOCOLS_OF.items():
            if self.protocol not in protocols:
                refuse_changed(self, names, f"for {self.protocol} (only for {', '.join(protocols)})")
        unused = ("image_size",) if self.fitted() == "centre" else ("eval_resize", "eval_crop")
        refuse_changed(self, unused, f"where fit is {self.fitted()}")
        if self.protocol in ("oxford", "paris", "copydays") and not self.data_path:
            raise InputError(f"no data_path given: {self.protocol} needs --data-path DIR, the folder of its images")
