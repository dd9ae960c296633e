"""Drop path: which branches it drops, and where it applies."""

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
    return Batch([torch.empty(0), torch.empty(0)], [2, 4], epoch=epoch, indices=torch.tensor(indices))


@pytest.mark.parametrize("rate", [0.05, 0.5, 0.9])
def test_share_of_dropped_branches_equals_rate(rate: float) -> None:
    scales = residual_scales(torch.arange(4000), 36, rate)
    assert scales.shape == (36, 4000, 1, 1)
    dropped = scales == 0
    assert torch.equal(scales[~dropped], torch.full_like(scales[~dropped], 1 / (1 - rate)))
    # In total, per branch, and per 400 keys: within five std of a binomial distribution.
    for part in (dropped, *dropped.unbind(0), *dropped.flatten(1).split(400, dim=1)):
        assert abs(int(part.sum()) - rate * part.numel()) < 5 * math.sqrt(rate * (1 - rate) * part.numel())


def test_branches_and_neighbouring_keys_drop_independently() -> None:
    dropped = (residual_scales(torch.arange(40_000), 12, 0.5)[..., 0, 0] == 0).double()
    correlation = torch.corrcoef(dropped) - torch.eye(12)
    assert float(correlation.abs().max()) < 5 / math.sqrt(40_000)
    for shift in (1, 2, 64):
        pair = torch.stack([dropped[:, :-shift].flatten(), dropped[:, shift:].flatten()])
        assert abs(float(torch.corrcoef(pair)[0, 1])) < 5 / math.sqrt(pair.shape[1])


def test_dropped_branches_depend_on_key_only() -> None:
    keys = torch.randint(1 << 62, (50,))
    order = torch.randperm(50)
    scales = residual_scales(keys, 9, 0.4)
    assert torch.equal(residual_scales(keys[order], 9, 0.4), scales[:, order])
    assert torch.equal(residual_scales(keys[7:8], 9, 0.4), scales[:, 7:8])


def test_keys_are_unique_per_epoch_image_and_view() -> None:
    """Image 5 of epoch 0 must not drop the branches of image 4 of epoch 1."""
    keys = torch.cat([key for epoch in range(8) for key in drop_path_keys(batch_of(list(range(256)), epoch), seed=0)])
    assert len(keys.unique()) == len(keys) == 8 * 256 * 6


def test_keys_do_not_depend_on_position_in_batch() -> None:
    together, alone = (drop_path_keys(batch_of(indices, epoch=2), seed=7) for indices in ([3, 8, 5, 40], [5]))
    assert [key.shape for key in together] == [(8,), (16,)]
    for group, single in zip(together, alone, strict=True):
        assert torch.equal(group.view(-1, 4)[:, 2], single)


@pytest.mark.parametrize("other", [{"seed": 1}, {"epoch": 1}])
def test_other_seed_or_epoch_drops_branches_independently(other: dict[str, int]) -> None:
    def dropped(seed: int = 0, epoch: int = 0) -> Tensor:
        keys = torch.cat(drop_path_keys(batch_of(list(range(500)), epoch), seed))
        return residual_scales(keys, 12, 0.5).flatten() == 0

    agreement = float((dropped() == dropped(**other)).double().mean())
    assert agreement == pytest.approx(0.5, abs=0.02)


def frozen_statistics(model: nn.Module) -> nn.Module:
    """Set train mode, but BatchNorm to eval mode: it must not mix the samples of a batch."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return model


def test_kept_branches_are_scaled_and_dropped_branches_are_absent() -> None:
    """The reference is the block written out, with the scales of its branches in the order XCA, LPI, MLP."""
    model = frozen_statistics(build_backbone("xcit_pico_4_p4", drop_path_rate=0.4))
    keys = torch.arange(8)
    scales = residual_scales(keys, 12, 0.4).view(4, 3, 8, 1, 1)
    images = torch.randn(8, 3, 12, 20)
    with torch.no_grad():
        x, grid = model.patch_embed(images)  # type: ignore[operator]
        x = x + model.pos_embeder(grid)  # type: ignore[operator]
        for block, (xca, lpi, mlp) in zip(model.blocks, scales, strict=True):  # type: ignore[arg-type]
            x = x + xca * block.gamma1 * block.attn(block.norm1(x))  # type: ignore[operator,union-attr]
            x = x + lpi * block.gamma3 * block.local_mp(block.norm3(x), ((len(x), grid),))  # type: ignore[operator,union-attr]
            x = x + mlp * block.gamma2 * block.mlp(block.norm2(x))  # type: ignore[operator,union-attr]
        output = model(images, drop_path_keys=keys)
    torch.testing.assert_close(output.patch_tokens, x, rtol=1e-5, atol=1e-5)


def test_class_attention_has_no_drop_path() -> None:
    """At a rate of nearly 1 all branches of XCA blocks are dropped, but the class token still attends to patches."""
    model = frozen_statistics(build_backbone("xcit_pico_4_p4", drop_path_rate=0.999999))
    images, keys = torch.randn(4, 3, 16, 16), torch.arange(4)
    with torch.no_grad():
        stem, grid = model.patch_embed(images)  # type: ignore[operator]
        output = model(images, drop_path_keys=keys)
        assert torch.equal(output.patch_tokens, stem + model.pos_embeder(grid))  # type: ignore[operator]
    assert float(output.cls_token.std(dim=0).mean()) > 1e-3


def test_eval_mode_and_zero_rate_drop_nothing() -> None:
    dropping, plain = build_backbone("xcit_pico_4_p4", drop_path_rate=0.5), build_backbone("xcit_pico_4_p4")
    images = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        for model in (dropping.eval(), plain.train()):
            assert torch.equal(model(images).cls_token, model(images, drop_path_keys=torch.arange(3)).cls_token)


def test_teacher_has_no_drop_path() -> None:
    config = tiny_config(drop_path_rate=0.9)
    method = build_state(config, CPU).method
    (batch,) = next(steps(config, 0, 1))
    crops, keys = [crop.float() / 255 for crop in batch.crops], drop_path_keys(batch, 0)
    student, teacher = method.student, method.teacher
    assert torch.equal(teacher(crops, keys).logits, teacher(crops).logits)
    assert not torch.equal(student(crops, keys).logits, teacher(crops).logits)
