"""Image descriptors: each pooling against its formula, scales, widths, and invalid settings."""

from __future__ import annotations

from typing import Any, get_args

import numpy as np
import pytest
import torch
from eval_fixtures import unit
from torch import Tensor, nn

from dino_xcit.errors import InputError
from dino_xcit.models import BackboneOutput, build_backbone
from eval.pooling import CLASS_TOKEN, Descriptor, Pooling, gem, patch_size_of, rescaled


@pytest.fixture(scope="module")
def backbone() -> nn.Module:
    torch.manual_seed(0)
    return build_backbone("xcit_pico_4_p4").eval()


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(3, 3, 28, 36, generator=torch.Generator().manual_seed(1))


@torch.inference_mode()
def vectors(backbone: nn.Module, images: Tensor, **settings: Any) -> Any:
    return Descriptor(**settings)(backbone, images).numpy()


@torch.inference_mode()
def test_pooling_matches_its_formula(backbone: nn.Module, images: Tensor) -> None:
    out = backbone(images)
    cls_token, tokens = out.cls_token.double().numpy(), out.patch_tokens.double().numpy()
    assert (vectors(backbone, images) == out.cls_token.numpy()).all()
    assert vectors(backbone, images, pooling="mean") == pytest.approx(tokens.mean(axis=1), abs=1e-6)
    for p in (1.0, 3.0, 7.5):
        expected = (np.maximum(tokens, 1e-6) ** p).mean(axis=1) ** (1 / p)
        assert vectors(backbone, images, pooling="gem", gem_p=p) == pytest.approx(expected, rel=1e-4)
    gem4 = (np.maximum(tokens, 1e-6) ** 4).mean(axis=1) ** (1 / 4)
    for pooled, mean in (("cls+mean", tokens.mean(axis=1)), ("cls+gem", gem4)):
        both = np.concatenate([unit(cls_token), unit(mean)], axis=1)
        assert vectors(backbone, images, pooling=pooled, gem_p=4.0) == pytest.approx(both, abs=1e-5)


def test_gem_matches_its_formula_without_float32_overflow() -> None:
    tokens = torch.tensor([[[1.0, 2e15], [3.0, 4e15], [-5.0, 0.0]]])
    found = gem(tokens, 3.0)
    assert found[0, 0].item() == pytest.approx((28 / 3) ** (1 / 3))
    assert found[0, 1].item() == pytest.approx((72 / 3) ** (1 / 3) * 1e15)
    assert gem(tokens, 100.0)[0, 0].item() == pytest.approx(3, rel=0.02)
    assert gem(torch.full((1, 4, 2), -1.0), 3.0) == pytest.approx(np.full((1, 2), 1e-6))


@torch.inference_mode()
def test_multi_scale_vector_is_mean_of_normalised_vectors(backbone: nn.Module, images: Tensor) -> None:
    scales = (1.0, 0.7071, 1.4142)
    singly = [vectors(backbone, images, pooling="gem", scales=(scale,)) for scale in scales]
    expected = unit(sum(unit(one) for one in singly))
    found = vectors(backbone, images, pooling="gem", scales=scales)
    assert found == pytest.approx(expected, abs=1e-6)
    assert not np.allclose(found, unit(singly[0]), atol=1e-4), "the other scales have no effect"


@torch.inference_mode()
def test_rescaled_rounds_sides_to_whole_patches_and_keeps_scale_one() -> None:
    images = torch.rand(1, 3, 224, 100)
    sizes = [rescaled(images, scale, 16).shape[2:] for scale in (0.7071, 0.01)]
    assert sizes == [(160, 64), (16, 16)], "a side is not rounded to whole patches, at least one"
    assert rescaled(images, 0.7071, 1).shape[2:] == (158, 71)
    assert rescaled(images, 1.0, 16) is images


def test_patch_size_of_returns_patch_size_of_each_backbone() -> None:
    names = ("xcit_pico_4_p4", "timm:vit_tiny_patch16_224", "timm:resnet18")
    assert [patch_size_of(build_backbone(name)) for name in names] == [4, 16, 1]


def test_descriptor_width_equals_vector_width(backbone: nn.Module, images: Tensor) -> None:
    for pooling in get_args(Pooling):
        assert Descriptor(pooling).width(64) == vectors(backbone, images, pooling=pooling).shape[1]


def test_descriptor_round_trips_through_dict() -> None:
    for descriptor in (CLASS_TOKEN, Descriptor("gem", 4.5, (0.5, 1.0)), Descriptor("cls+gem", 4.0)):
        assert Descriptor.from_dict(descriptor.to_dict()) == descriptor
    assert "gem_p" not in CLASS_TOKEN.to_dict(), "an unused exponent is stored"


@pytest.mark.parametrize(("field", "value"), [
    ("pooling", "max"), ("pooling", ["cls"]), ("scales", (9.0,)), ("scales", ()), ("scales", (1.0, -1.0)),
    ("scales", (1.0, float("inf"))), ("scales", (1.0, 1.0)), ("gem_p", 0.0), ("gem_p", 101.0), ("gem_p", float("nan")),
])  # fmt: skip
def test_invalid_descriptor_setting_is_refused(field: str, value: Any) -> None:
    with pytest.raises(InputError, match=field):
        Descriptor(**{field: value}).check()
    with pytest.raises(InputError, match=field):
        Descriptor.from_dict({"pooling": "gem", "scales": [1.0]} | {field: value})


@pytest.mark.parametrize("values", [{}, {"pooling": "cls"}, {"pooling": "cls", "scales": 3}, {"scales": ["x"]}, []])
def test_malformed_stored_descriptor_is_refused(values: Any) -> None:
    with pytest.raises(InputError, match="stored descriptor"):
        Descriptor.from_dict(values)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_precision_is_used_and_stored(precision: Any) -> None:
    seen: list[torch.dtype] = []

    class Watched(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(3, 4)

        def forward(self, images: torch.Tensor) -> BackboneOutput:
            tokens = self.layer(images.mean(dim=(2, 3)))
            seen.append(tokens.dtype)
            return BackboneOutput(tokens, tokens[:, None], (1, 1))

    descriptor = Descriptor(precision=precision)
    assert descriptor(Watched(), torch.randn(2, 3, 8, 8)).dtype is torch.float32
    assert seen == [torch.bfloat16 if precision == "bf16" else torch.float16]
    assert Descriptor.from_dict(descriptor.to_dict()) == descriptor
    assert "precision" not in Descriptor().to_dict()
    assert precision in descriptor.describe()
