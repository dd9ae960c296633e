"""Input features of linear heads: pooled backbone outputs, and rows of a file on disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_run import CPU
from torch import Tensor

from dino_xcit.errors import InputError
from dino_xcit.models import build_backbone
from eval.config import blocks_of
from eval.linear.pooled import PooledBackbone, Rows
from eval.linear.sgd import moments


def images(size: int = 32) -> Tensor:
    return torch.randn(2, 3, size, size)


@torch.no_grad()
def test_xcit_row_is_class_token_and_mean_patch_tokens_of_last_blocks() -> None:
    backbone = build_backbone("xcit_pico_4_p4").eval()
    pooled = PooledBackbone(backbone, ("cls+mean", "last3"), 32, CPU).eval()
    assert pooled.columns == {"cls": slice(0, 64), "cls+mean": slice(0, 128), "last3": slice(0, 256)}
    x = images()
    out = backbone(x, layers=(-1, -2, -3))
    wanted = torch.cat([out.cls_token, *(tokens.mean(dim=1) for tokens in out.layers)], dim=1)
    assert torch.allclose(pooled(x).cls_token, wanted, atol=1e-6)
    assert torch.allclose(pooled(x).cls_token[:, 64:128], out.patch_tokens.mean(dim=1), atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("arch", ["timm:vit_tiny_patch16_224", "vit_tiny_5_p8_ls_reg4"])
def test_vit_features_match_dino_and_dinov2(arch: str) -> None:
    """The expected features use the final norm on the class tokens of the last blocks and on the last patch tokens."""
    backbone = build_backbone(arch).eval()
    for name, value in backbone.named_parameters():
        value.add_(0.3 * torch.rand_like(value) if "gamma" in name else 0.01)
    model, x = backbone.model, images()
    tokens, by_block = model.norm_pre(model._pos_embed(model.patch_embed(x))), []
    for block in model.blocks:
        tokens = block(tokens)
        by_block.append(model.norm(tokens))
    mean = by_block[-1][:, model.num_prefix_tokens :].mean(dim=1)
    classes = [normed[:, 0] for normed in reversed(by_block)]
    wanted = {
        "cls": classes[:1], "cls+mean": [mean, classes[0]], "last4": classes[:4], "last2+mean": [mean, *classes[:2]],
    }  # fmt: skip
    assert not torch.allclose(classes[0], classes[1], atol=1e-2)
    for asked in (tuple(wanted), *((name,) for name in wanted), ("last2+mean", "last4")):
        pooled = PooledBackbone(backbone, asked, 32, CPU).eval()
        row = pooled(x).cls_token
        for name in {"cls", *asked}:
            expected = torch.cat(wanted[name], dim=1)
            torch.testing.assert_close(row[:, pooled.columns[name]], expected, rtol=1e-5, atol=1e-5)


def test_identity_distinguishes_vit_rows_with_and_without_mean() -> None:
    backbone = build_backbone("vit_tiny_5_p8").eval()
    rows = [("last4",), ("last3",), ("last4+mean",), ("cls+mean",), ("last4", "cls+mean")]
    said = [PooledBackbone(backbone, choices, 32, CPU).identity for choices in rows]
    assert said[2] == said[4]
    assert len(set(said)) == 4
    assert all(said)


@torch.no_grad()
def test_class_token_choice_is_bitwise_the_backbone_output() -> None:
    backbone = build_backbone("xcit_pico_4_p4").eval()
    pooled = PooledBackbone(backbone, ("cls",), 32, CPU)
    x = images()
    assert torch.equal(pooled(x).cls_token, backbone(x).cls_token)
    assert pooled.identity == ""


def test_invalid_or_unsupported_feature_choice_is_refused() -> None:
    assert [blocks_of(name) for name in ("cls", "cls+mean", "last1", "last12")] == [0, 1, 1, 12]
    for wrong in ("mean", "last", "last0", "last100", "last4+cls", "last4+mean+mean"):
        with pytest.raises(InputError, match="expected cls"):
            blocks_of(wrong)
    for choices, said in ((("last2", "last5"), "needs 5 blocks"), (("last2+mean",), "no class tokens")):
        with pytest.raises(InputError, match=said):
            PooledBackbone(build_backbone("xcit_pico_4_p4").eval(), choices, 32, CPU)


def test_rows_select_rows_and_columns_of_a_memory_mapped_file(tmp_path: Path) -> None:
    matrix = np.random.default_rng(0).normal(size=(40, 130)).astype(np.float32)
    np.save(tmp_path / "m.npy", matrix)
    chosen = np.array([3, 30, 7])
    seen = Rows(np.load(tmp_path / "m.npy", mmap_mode="r"), slice(20, 120), chosen)
    assert (len(seen), seen.width) == (3, 100)
    assert (seen[1:9] == matrix[[30, 7], 20:120]).all()
    assert (seen.some(np.array([2]))[:] == matrix[[7], 20:120]).all()
    mean, variance = moments(seen)
    assert mean == pytest.approx(matrix[chosen, 20:120].astype(np.float64).mean(axis=0), abs=1e-15)
    assert variance == pytest.approx(matrix[chosen, 20:120].astype(np.float64).var(axis=0), abs=1e-15)
