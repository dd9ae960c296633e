"""Conversion of state dict names: exact inverses, compared with timm's own filter for official files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import foreign_checkpoints as files
import pytest
import torch
from test_weights_layouts import assert_same_output
from timm.models.xcit import Xcit, checkpoint_filter_fn
from torch import Tensor, nn

from dino_xcit.models import build_backbone
from dino_xcit.weights import load_backbone
from dino_xcit.weights.names import backbone_names, head_names, to_timm

State = dict[str, Tensor]


def xcit_state() -> State:
    """Return a state dict in which every number is unique, so that a swap is detected."""
    state = build_backbone("xcit_pico_4_p4").state_dict()
    sizes = [value.numel() for value in state.values()]
    pairs = zip(state.items(), torch.arange(sum(sizes)).split(sizes), strict=True)
    return {key: numbers.view_as(value).to(value.dtype, copy=True) for (key, value), numbers in pairs}


def same(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_to_timm_round_trip_is_exact_and_matches_timms_filter() -> None:
    there = to_timm(xcit_state())
    assert not same(there, xcit_state())
    assert same(backbone_names(there), xcit_state())
    model = Xcit(embed_dim=64, depth=4, num_heads=4, tokens_norm=True, num_classes=0)
    assert same(there, checkpoint_filter_fn(xcit_state(), model))
    assert len({value.untyped_storage().data_ptr() for value in there.values()}) == len(there)  # no shared memory


@torch.no_grad()
def test_load_backbone_of_timm_xcit_reproduces_timms_outputs(tmp_path: Path) -> None:
    theirs = files.timm_xcit(classes=7)
    read = load_backbone(files.timm_folder(tmp_path, theirs, files.XCIT_CONFIG))
    assert (read.arch, read.classifiers) == ("xcit_pico_4_p8", ("head",))
    theirs.reset_classifier(0)
    assert_same_output(read, theirs)


@pytest.mark.parametrize(
    "written",
    [lambda key: key.replace("mlp.", "layers."), lambda key: f"module.{key.replace('last_layer', 'prototypes0')}"],
    ids=["lightly", "vissl"],
)
def test_head_names_converts_lightly_and_vissl_names(written: Callable[[str], str]) -> None:
    head = files.head(64)
    assert same(head_names({written(key): value for key, value in head.items()}), head)


def test_head_names_converts_parametrized_weight_norm() -> None:
    newer = nn.utils.parametrizations.weight_norm(nn.Linear(6, 12, bias=False))
    mlp = {key: value for key, value in files.head(64).items() if key.startswith("mlp.")}
    read = head_names(mlp | files.prefixed("last_layer.", newer.state_dict()))
    rows = read["last_layer.weight_g"] * nn.functional.normalize(read["last_layer.weight_v"], dim=1)
    torch.testing.assert_close(rows, newer.weight)
    assert head_names(mlp) == {}
