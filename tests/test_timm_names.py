"""Official names and timm's: exact inverses, checked against timm's own reading of official files."""

from __future__ import annotations

import pytest
import torch
from timm.models.xcit import Xcit, checkpoint_filter_fn
from torch import Tensor

from dino_xcit.models import build_backbone
from dino_xcit.timm_names import from_timm, to_timm


def xcit_state() -> dict[str, Tensor]:
    """Every number another, so that no two can be exchanged unseen."""
    counter = 0
    state = {}
    for key, value in build_backbone("xcit_pico_4_p4").state_dict().items():
        state[key] = torch.arange(counter, counter + value.numel()).view_as(value).to(value.dtype)
        counter += value.numel()
    return state


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_there_and_back_is_the_same_to_the_last_bit_and_in_the_same_order() -> None:
    state = xcit_state()
    there = to_timm(state)
    assert not same(there, state)
    assert same(from_timm(there), state)
    assert list(from_timm(there)) == list(state)
    assert same(to_timm(from_timm(there)), there)


def test_the_names_are_those_of_timms_class() -> None:
    size = {"embed_dim": 64, "depth": 4, "num_heads": 4, "tokens_norm": True, "num_classes": 0, "patch_size": 8}
    expected = Xcit(**size).state_dict()
    ours = to_timm(build_backbone("xcit_pico_4_p8").state_dict())
    assert {key: value.shape for key, value in ours.items()} == {key: value.shape for key, value in expected.items()}


def test_timms_own_filter_makes_the_same_of_an_official_file() -> None:
    model = Xcit(embed_dim=64, depth=4, num_heads=4, tokens_norm=True, num_classes=0)
    assert same(to_timm(xcit_state()), checkpoint_filter_fn(xcit_state(), model))


def test_the_parts_share_no_memory() -> None:
    there = to_timm(xcit_state())
    storages = [value.untyped_storage().data_ptr() for value in there.values()]
    assert len(set(storages)) == len(storages)


@pytest.mark.parametrize("change", [to_timm, from_timm])
def test_a_key_of_another_network_stays_as_it_is(change: object) -> None:
    state = {
        "pos_embed": torch.zeros(1, 5, 4),  # a vision transformer's
        "blocks.0.attn.qkv.weight": torch.zeros(12, 4),
        "blocks_token_only.0.attn.q.weight": torch.zeros(4, 4),  # CaiT's
        "head.weight": torch.zeros(10, 4),
    }
    assert same(change(state), state)  # type: ignore[operator]


def test_what_cannot_be_renamed_stays_for_the_loader_to_name() -> None:
    attention = "cls_attn_blocks.0.attn."
    whole = {f"{attention}{part}.weight": torch.zeros(4, 4) for part in "qkv"}
    lacking = {key: value for key, value in whole.items() if ".k." not in key}
    unequal = whole | {f"{attention}v.weight": torch.zeros(5, 4)}
    numbers = {key: torch.tensor(1.0) for key in whole}
    taken = whole | {f"{attention}qkv.weight": torch.ones(12, 4)}
    twice = {"pos_embed.token_projection.bias": torch.zeros(4), "pos_embeder.token_projection.bias": torch.ones(4)}
    for state in (lacking, unequal, numbers, taken, twice):
        assert same(from_timm(state), state)
    uneven = {f"{attention}qkv.weight": torch.zeros(13, 4)}
    number = {f"{attention}qkv.bias": torch.tensor(1.0)}
    for state in (uneven, number, taken, twice):
        assert same(to_timm(state), state)
