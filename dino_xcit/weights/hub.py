"""Files from the Hugging Face hub, where timm's weights lie too: downloaded once, kept by huggingface_hub."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from dino_xcit.errors import InputError, one_line

HUB, TIMM = "hf-hub:", "timm:"


def is_remote(spec: str) -> bool:
    """Whether weights are named by a hub's or timm's name rather than by a path."""
    return spec.startswith((HUB, TIMM))


def download(repository: str, names: Sequence[str], optional: bool = False) -> Path | None:
    """The first of the files that the repository has, from this machine if it was fetched before.

    Args:
        repository: ``ORG/NAME``, or ``ORG/NAME@REVISION``.
        names: files in it.
        optional: whether the repository may have none of them; then None comes back.

    Raises:
        InputError: no network, no such repository, or none of the files.
    """
    from huggingface_hub import _CACHED_NO_EXIST, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    where, _, revision = repository.partition("@")
    quiet = logging.getLogger("huggingface_hub")
    level = quiet.level
    quiet.setLevel(logging.ERROR)  # each of its five attempts would be a line; the sentence below says what matters
    try:
        for name in names:
            try:
                return Path(hf_hub_download(where, name, revision=revision or None))
            except LocalEntryNotFoundError as error:
                # Without a network, what an earlier look found to be absent is known to be.
                if optional and try_to_load_from_cache(where, name, revision=revision or None) is _CACHED_NO_EXIST:
                    continue
                raise InputError(
                    f"cannot fetch {name} of {where} from the Hugging Face hub, and it is not on this machine: "
                    f"{one_line(error.__cause__ or error)}; mend the network (or unset HF_HUB_OFFLINE), or download "
                    "the file elsewhere and give its path"
                ) from error
            except EntryNotFoundError:
                continue
    except GatedRepoError as error:
        raise InputError(f"the repository {where} asks for permission: get it there, then run hf auth login") from error
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        raise InputError(
            f"the Hugging Face hub has no repository {repository}: expected hf-hub:ORG/NAME, such as "
            "hf-hub:timm/xcit_small_12_p16_224.fb_in1k"
        ) from error
    except (OSError, RuntimeError, ValueError) as error:  # the network's other ways to fail
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"cannot fetch {' or '.join(names)} of {where} from the Hugging Face hub: {one_line(error)}; try again, or "
            "download the file elsewhere and give its path"
        ) from error
    finally:
        quiet.setLevel(level)
    if optional:
        return None
    raise InputError(
        f"the repository {where} has no {' and no '.join(names)}: fetch the file that has its weights and give its path"
    )
