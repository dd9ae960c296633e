"""Every setting of run_extract.py and run_retrieval.py, with its default: the only place that has them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Ge, Le, MinLen

from dino_xcit.bounds import FilePath, Group, IsPath, Positional, Repeatable, refuse_changed, shown
from dino_xcit.errors import InputError
from eval.config import BackboneConfig, IsOutput, Pooling

if TYPE_CHECKING:
    from eval.pooling import Descriptor


@dataclass(frozen=True)
class VectorConfig(BackboneConfig):
    """How an image's vector is made: what extraction and retrieval share."""

    pooling: Annotated[Pooling, Group("vectors")] = "cls"
    """What an image's vector is: the class token, the mean or generalised mean (gem) of the patch tokens, or class
    token and one of these means one behind the other."""
    gem_p: float = 3.0
    """Exponent of the generalised mean: 1 is the mean, the greater the nearer to the maximum."""
    scales: tuple[float, ...] = (1.0,)
    """Sizes at which an image is looked at, as factors on its sides, such as 1 0.7071 1.4142; the vectors of length 1
    are averaged."""
    whiten: FilePath = ""
    """Whitening to apply: a file that run_extract.py --learn-whitening wrote."""

    def descriptor(self) -> Descriptor:
        """How an image's vector is made."""
        from eval.pooling import Descriptor

        return Descriptor(self.pooling, self.gem_p, self.scales)

    def check(self) -> None:
        """See :meth:`BackboneConfig.check`."""
        super().check()
        self.descriptor().check()


@dataclass(frozen=True)
class ExtractConfig(VectorConfig):
    """Settings of run_extract.py: write vectors (--output-dir), look images up in some written before (--query), or
    learn a whitening from some (--learn-whitening)."""

    output_dir: Annotated[FilePath, Group("collection")] = ""
    """Folder for vectors.npy, paths.txt, index.faiss and card.json."""
    normalise: bool = True
    """Scale each vector to length 1, so that inner products are cosine similarities."""
    dtype: Literal["fp32", "fp16"] = "fp32"
    """Numbers in which vectors are kept; fp16 halves the folder."""
    index_type: Literal["flat", "hnsw", "ivfpq"] = "flat"
    """flat: exact search. hnsw (a graph) and ivfpq (codes, half a byte for two numbers) look at a part of the vectors;
    their recall is measured and written into the card."""
    shard_images: Annotated[int, Ge(1)] = 16384
    """About how many images make a part of the work: a kill costs at most the part under way."""
    unreadable: Literal["refuse", "skip"] = "refuse"
    """What becomes of an image that cannot be read: the run ends and names it, or it is left out and listed."""
    overwrite: bool = False
    """Replace another extraction in output_dir."""
    add: bool = False
    """Add the images of data_path to the extraction in output_dir, which has to have the same weights and settings."""
    learn_whitening: Annotated[FilePath, IsOutput, Group("whitening")] = ""
    """File to write: PCA whitening of the vectors in INDEX."""
    whiten_dim: Annotated[int, Ge(0)] = 0
    """Dimensions that learned whitening keeps; 0: all that the vectors have."""
    query: Annotated[tuple[str, ...], IsPath, Repeatable, Group("query")] = ()
    """Image files to look up."""
    index: FilePath = ""
    """Folder that an earlier run wrote, to look them up in. Default: OUTPUT_DIR."""
    top: Annotated[int, Ge(1)] = 10
    """How many of the nearest images to show."""
    sheet: Annotated[FilePath, IsOutput] = ""
    """Picture of the query and the images found. Default: contact_sheet.png in the index folder, of the last query."""

    def check(self) -> None:
        """See :meth:`BackboneConfig.check`."""
        super().check()
        if not self.learn_whitening:
            refuse_changed(self, ("whiten_dim",), "without --learn-whitening")
        if len(self.scales) > 1 and not self.normalise:
            raise InputError(
                f"scales is {shown(self.scales)}, whose vectors are averaged at length 1: leave out --no-normalise, "
                "or give one scale"
            )
        if self.query and not self.learn_whitening:
            refuse_changed(self, _OF_THE_CARD, "for --query, which reads the collection's card")
        if self.add and self.overwrite:
            raise InputError("both --add and --overwrite are given: one keeps what is there, the other replaces it")
        if (self.learn_whitening and not self.index) or (self.query and not (self.index or self.output_dir)):
            raise InputError("no index given: use --index FOLDER, one that run_extract.py --output-dir wrote")
        if not (self.learn_whitening or self.query or self.output_dir):
            raise InputError(
                "no output_dir given: use --output-dir FOLDER for the vectors, or --query IMAGE --index FOLDER"
            )


_OF_THE_CARD = (
    "pooling", "gem_p", "scales", "whiten", "normalise", "dtype", "index_type", "eval_crop", "eval_resize", "add",
    "overwrite", "data_path", "shard_images", "unreadable",
)  # fmt: skip
"""run_extract.py's settings that mean nothing for --query: the collection's card says how vectors are made."""


_OF_PROTOCOLS = {
    ("ground_truth", "queries"): ("oxford", "paris"),
    ("distractors",): ("oxford", "paris", "copydays"),
    ("ks",): ("folder",),
    ("first", "second", "threshold", "most_pairs", "csv", "sheet"): ("duplicates",),
}
"""run_retrieval.py's settings of some protocols: for others they are a mistake."""


@dataclass(frozen=True)
class RetrievalConfig(VectorConfig):
    """Settings of run_retrieval.py. DATA_PATH is the folder of the benchmark (oxford, paris, copydays: as published)
    or the labelled images (folder)."""

    protocol: Annotated[
        Literal["", "oxford", "paris", "copydays", "folder", "duplicates"], Positional, Group("evaluation")
    ] = ""
    """What to measure; the first word of the command line does as well. oxford, paris: Revisited Oxford and Paris.
    copydays: copies find their original. folder: leave-one-out among labelled images. duplicates: what two sets
    share."""
    fit: Literal["auto", "centre", "whole", "square"] = "auto"
    """How an image is fitted. centre: as the checkpoint says. whole: in its proportions, the longer side reduced to
    image_size. square: squeezed to image_size. auto: whole for oxford and paris, square for copydays, else centre."""
    image_size: Annotated[int, Ge(0)] = 0
    """Pixels for whole and square (--imsize is the same); 0: 224 for whole, 320 for square, as in DINO's scripts."""
    ground_truth: FilePath = ""
    """For oxford and paris: the file that says what is right, where not DATA_PATH/gnd_roxford5k.pkl and the like."""
    queries: Literal["box", "whole"] = "box"
    """For oxford and paris: queries cut to their box, as the benchmark says, or whole, as DINO's script has them."""
    distractors: str = ""
    """For oxford, paris and copydays: more images that are right for no query, whatever --data-path takes; such as the
    million of Revisited Oxford and Paris."""
    ks: Annotated[tuple[int, ...], Ge(1), MinLen(1)] = (1, 2, 4, 8)
    """For folder: recall at each of these."""
    first: str = ""
    """For duplicates: one set, such as the training images."""
    second: str = ""
    """For duplicates: the other set, such as the test images. Without it: pairs within FIRST."""
    threshold: Annotated[float, Ge(-1), Le(1)] = 0.95
    """For duplicates: cosine similarity from which two images count as a pair."""
    most_pairs: Annotated[int, Ge(1)] = 1_000_000
    """For duplicates: more pairs than this end the run."""
    csv: Annotated[FilePath, IsOutput] = ""
    """For duplicates: write the pairs to this file."""
    sheet: Annotated[FilePath, IsOutput] = ""
    """For duplicates: draw the most similar pairs into this PNG."""

    def fitted(self) -> str:
        """How an image is fitted: ``centre``, ``whole`` or ``square``."""
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
                f"data_path is {shown(self.data_path)} and first is {shown(self.first)}: duplicates takes --first DIR "
                "--second DIR, or --first DIR alone for pairs within it"
            )
        for names, protocols in _OF_PROTOCOLS.items():
            if self.protocol not in protocols:
                refuse_changed(self, names, f"for {self.protocol} (only for {', '.join(protocols)})")
        unused = ("image_size",) if self.fitted() == "centre" else ("eval_resize", "eval_crop")
        refuse_changed(self, unused, f"where fit is {self.fitted()}")
        if self.protocol in ("oxford", "paris", "copydays") and not self.data_path:
            raise InputError(f"no data_path given: {self.protocol} needs --data-path DIR, the folder of its images")
