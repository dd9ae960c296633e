"""Stochastic depth: what it drops, and where it acts."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_run import CPU, steps, tiny_config
from torch import Tensor, nn

from dino_xcit.data.loader import Batch
from dino_xcit.methods.student_teacher import drop_path_keys
from dino_xcit.models import build_backbone
from dino_xcit.models.droppath import residual_scales
from dino_xcit.train import build_state


def batch_of(indices: list[int], epoch: int = 0) -> Batch:
    return Batch([torch.empty(0), torch.empty(0)], [2, 4], epoch, torch.tensor(indices))


@pytest.mark.parametrize("rate", [0.05, 0.5, 0.9])
def test_the_share_of_dropped_branches_is_the_rate(rate: float) -> None:
    scales = residual_scales(torch.arange(4000), 36, rate)
    assert scales.shape == (36, 4000, 1, 1)
    dropped = scales == 0
    assert torch.equal(scales[~dropped], torch.full_like(scales[~dropped], 1 / (1 - rate)))
    # In all, for each branch, and for each run of keys: within five deviations of a binomial.
    for part in (dropped, *dropped.unbind(0), *dropped.flatten(1).split(400, dim=1)):
        assert abs(int(part.sum()) - rate * part.numel()) < 5 * math.sqrt(rate * (1 - rate) * part.numel())


def test_branches_and_neighbouring_keys_drop_independently() -> None:
    dropped = (residual_scales(torch.arange(40_000), 12, 0.5)[..., 0, 0] == 0).double()
    correlation = torch.corrcoef(dropped) - torch.eye(12)
    assert float(correlation.abs().max()) < 5 / math.sqrt(40_000)
    for shift in (1, 2, 64):
        pair = torch.stack([dropped[:, :-shift].flatten(), dropped[:, shift:].flatten()])
        assert abs(float(torch.corrcoef(pair)[0, 1])) < 5 / math.sqrt(pair.shape[1])


def test_what_is_dropped_depends_on_the_key_alone() -> None:
    keys = torch.randint(1 << 62, (50,))
    order = torch.randperm(50)
    scales = residual_scales(keys, 9, 0.4)
    assert torch.equal(residual_scales(keys[order], 9, 0.4), scales[:, order])
    assert torch.equal(residual_scales(keys[7:8], 9, 0.4), scales[:, 7:8])


def test_every_epoch_image_and_view_has_a_key_of_its_own() -> None:
    """Image 5 of epoch 0 must not drop the branches of image 4 of epoch 1."""
    keys = torch.cat([key for epoch in range(8) for key in drop_path_keys(batch_of(list(range(256)), epoch), seed=0)])
    assert len(keys.unique()) == len(keys) == 8 * 256 * 6


def test_keys_follow_the_image_and_not_its_place_in_the_batch() -> None:
    together, alone = (drop_path_keys(batch_of(indices, epoch=2), seed=7) for indices in ([3, 8, 5, 40], [5]))
    assert [key.shape for key in together] == [(8,), (16,)]
    for group, single in zip(together, alone, strict=True):
        assert torch.equal(group.view(-1, 4)[:, 2], single)


@pytest.mark.parametrize("other", [{"seed": 1}, {"epoch": 1}])
def test_another_seed_or_epoch_drops_others(other: dict[str, int]) -> None:
    def dropped(seed: int = 0, epoch: int = 0) -> Tensor:
        keys = torch.cat(drop_path_keys(batch_of(list(range(500)), epoch), seed))
        return residual_scales(keys, 12, 0.5).flatten() == 0

    agreement = float((dropped() == dropped(**other)).double().mean())
    assert agreement == pytest.approx(0.5, abs=0.02)


def frozen_statistics(model: nn.Module) -> nn.Module:
    """Train mode, but BatchNorm does not mix the samples of a batch."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return model


def test_each_kept_branch_is_scaled_and_each_dropped_branch_is_absent() -> None:
    """The block written out by hand, with the scales of its three branches in the order XCA, LPI, MLP."""
    model = frozen_statistics(build_backbone("xcit_pico_4_p4", drop_path_rate=0.4))
    keys = torch.arange(8)
    scales = residual_scales(keys, 12, 0.4).view(4, 3, 8, 1, 1)
    images = torch.randn(8, 3, 12, 20)
    with torch.no_grad():
        x, grid = model.patch_embed(images)  # type: ignore[operator]
        x = x + model.pos_embeder(grid)  # type: ignore[operator]
        for block, (xca, lpi, mlp) in zip(model.blocks, scales, strict=True):  # type: ignore[arg-type]
            x = x + xca * block.gamma1 * block.attn(block.norm1(x))  # type: ignore[operator,union-attr]
            x = x + lpi * block.gamma3 * block.local_mp(block.norm3(x), grid)  # type: ignore[operator,union-attr]
            x = x + mlp * block.gamma2 * block.mlp(block.norm2(x))  # type: ignore[operator,union-attr]
        output = model(images, drop_path_keys=keys)
    torch.testing.assert_close(output.patch_tokens, x, rtol=1e-5, atol=1e-5)


def test_class_attention_has_no_drop_path() -> None:
    """At a rate of nearly one every XCA branch is gone, but the class token still gathers from the patches."""
    model = frozen_statistics(build_backbone("xcit_pico_4_p4", drop_path_rate=0.999999))
    images, keys = torch.randn(4, 3, 16, 16), torch.arange(4)
    with torch.no_grad():
        stem, grid = model.patch_embed(images)  # type: ignore[operator]
        output = model(images, drop_path_keys=keys)
        assert torch.equal(output.patch_tokens, stem + model.pos_embeder(grid))  # type: ignore[operator]
    assert float(output.cls_token.std(dim=0).mean()) > 1e-3


def test_eval_mode_and_a_rate_of_zero_drop_nothing() -> None:
    dropping, plain = build_backbone("xcit_pico_4_p4", drop_path_rate=0.5), build_backbone("xcit_pico_4_p4")
    images = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        for model in (dropping.eval(), plain.train()):
            assert torch.equal(model(images).cls_token, model(images, drop_path_keys=torch.arange(3)).cls_token)


def test_the_teacher_has_no_drop_path() -> None:
    config = tiny_config(drop_path_rate=0.9)
    method = build_state(config, CPU).method
    (batch,) = next(steps(config, 0, 1))
    crops, keys = [crop.float() / 255 for crop in batch.crops], drop_path_keys(batch, 0)
    student, teacher = method.student, method.teacher
    assert torch.equal(teacher(crops, keys).logits, teacher(crops).logits)
    assert not torch.equal(student(crops, keys).logits, teacher(crops).logits)
