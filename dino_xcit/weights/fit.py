"""Whether a file's weights are those of an architecture: every key, every shape; exceptions by name alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from dino_xcit.errors import InputError
from dino_xcit.weights.names import with_batch_counts
from dino_xcit.weights.printing import first, shown

_CLASSIFIERS = ("head.", "fc.", "head_dist.", "classifier.")
"""What stands on a supervised backbone: no part of it, where the architecture has nothing of that name."""
_OF_TRAINING = (
    "mask_token", "masked_embed",  # what stands for hidden patches: DINOv2, MAE; iBOT's students
    "decoder_embed.", "decoder_pos_embed", "decoder_blocks.", "decoder_norm.", "decoder_pred.",  # MAE's decoder
    "pooler.",  # transformers' layer on the class token, which no feature of DINO's has been through
)  # fmt: skip
"""What is used while training alone, or stands beside the features: no part of a backbone either."""


@dataclass(frozen=True)
class Allowed:
    """Keys that may be missing or left over, by their exact names or by a beginning and ``*``."""

    missing: Sequence[str] = ()
    unexpected: Sequence[str] = ()

    def check(self) -> None:
        """Refuse what would allow everything.

        Raises:
            InputError: an empty name, or ``*`` without anything before it.
        """
        for name, patterns in (("allow_missing", self.missing), ("allow_unexpected", self.unexpected)):
            for pattern in patterns:
                if not pattern.strip("*") or "*" in pattern[:-1]:
                    raise InputError(
                        f"{name} has {pattern!r}, expected names of keys, such as norm.bias, or their beginning and *, "
                        "such as head.*"
                    )


@dataclass(frozen=True)
class Fit:
    """What to load, under the architecture's own names."""

    state: dict[str, Tensor]
    classifiers: tuple[str, ...]
    """Classifiers that were left aside: ``head``, ``fc``."""
    of_training: tuple[str, ...]
    """Other parts of no use to a frozen backbone that were left aside: ``mask_token``, ``decoder_blocks``."""
    allowed: tuple[str, ...]
    """``missing KEY`` or ``unexpected KEY`` for each exception that was made."""


def fit(
    state: Mapping[str, Tensor], own: Mapping[str, Tensor], arch: str, where: str, allowed: Allowed, like: str
) -> Fit:
    """Compare a file's weights with an architecture's.

    Args:
        state: a backbone's weights, under the names of :func:`dino_xcit.weights.names.backbone_names`.
        own: the architecture's state dict, for its names, shapes and kinds of numbers.
        where: the file, for messages.
        like: the architecture that the weights look like, or an empty string.

    Raises:
        InputError: keys are missing, left over, of another shape or kind; the first few are named.
    """
    wrapper = "model." if own and all(key.startswith("model.") for key in own) else ""
    wanted = {key.removeprefix(wrapper): value for key, value in own.items()}
    given = with_batch_counts(state, wanted)
    on_top = {key for key in given.keys() - wanted.keys() if key.startswith(_CLASSIFIERS)}
    of_training = {key for key in given.keys() - wanted.keys() if _of_training(key)}
    missing = sorted(wanted.keys() - given.keys())
    left_over = sorted(given.keys() - wanted.keys() - on_top - of_training)
    both = sorted(wanted.keys() & given.keys())
    problems = {
        "lacks": [key for key in missing if not _matches(key, allowed.missing)],
        "has besides": [key for key in left_over if not _matches(key, allowed.unexpected)],
        "has in another shape": [key for key in both if wanted[key].shape != given[key].shape],
        "has as whole numbers": [
            key for key in both if wanted[key].is_floating_point() and not given[key].is_floating_point()
        ],
    }
    sentences = [f"it {kind} {first(keys, 4)}" for kind, keys in problems.items() if keys]
    if sentences:
        looks = f", it looks like {like}" if like and like != arch else ""
        raise InputError(
            f"{where} does not fit {arch}{looks}: {'; '.join(sentences)} (--arch names another architecture; "
            "--allow-missing KEY and --allow-unexpected KEY let single keys pass)"
        )
    return Fit(
        state={wrapper + key: given[key] for key in both},
        classifiers=_first_words(given, on_top),
        of_training=_first_words(given, of_training),
        allowed=(*(f"missing {shown([key])}" for key in missing), *(f"unexpected {shown([key])}" for key in left_over)),
    )


def _of_training(key: str) -> bool:
    return any(key.startswith(name) if name.endswith(".") else key == name for name in _OF_TRAINING)


def _first_words(given: Mapping[str, Tensor], keys: set[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(key.partition(".")[0] for key in given if key in keys))


def _matches(key: str, patterns: Sequence[str]) -> bool:
    return any(key.startswith(word[:-1]) if word.endswith("*") else key == word for word in patterns)
