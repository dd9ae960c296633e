"""XCiT against timm's, with weights that timm's own filter converts from the official names.

Comparisons are in float64, so that a tolerance of 1e-5 measures mathematics and not the order of float32 sums. Random
values are added to all parameters and running statistics, as LayerScale of 1e-5 or biases of zero would hide errors.
The largest sizes would take minutes, so both models have fewer XCA blocks. All blocks are alike, and another test
compares names and shapes at full depth.
"""

from __future__ import annotations

import dataclasses
import math
import re

import pytest
import timm
import torch
from timm.models.xcit import checkpoint_filter_fn
from torch import Tensor, nn

from dino_xcit.models import XCiT, build_backbone
from dino_xcit.models.xcit import XCIT_SIZES

SIZES = ("nano_12", "tiny_12", "tiny_24", "small_12", "small_24", "medium_24", "large_24")
TOLERANCE = 1e-5
SLOW = pytest.mark.slow


def ours_and_timms(name: str, depth: int | None = None) -> tuple[XCiT, nn.Module]:
    """Return both networks with the same random float64 weights; timm's loads them strictly through its own filter."""
    size_name, _, patch = name.rpartition("_p")
    size = XCIT_SIZES[size_name]
    size = dataclasses.replace(size, depth=depth or size.depth)
    ours = XCiT(size, int(patch)).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        for key, parameter in ours.named_parameters():
            if "gamma" in key:
                parameter.copy_(torch.rand(parameter.shape, generator=generator, dtype=torch.float64) + 0.5)
        for key, buffer in ours.named_buffers():
            if key.endswith("running_mean"):
                buffer.copy_(0.2 * torch.randn(buffer.shape, generator=generator, dtype=torch.float64))
            elif key.endswith("running_var"):
                buffer.copy_(torch.rand(buffer.shape, generator=generator, dtype=torch.float64) + 0.5)
    theirs = timm.create_model(f"{name}_224", num_classes=0, depth=size.depth).double()
    state = {key: value.clone() for key, value in ours.state_dict().items()}
    theirs.load_state_dict(checkpoint_filter_fn(state, theirs), strict=True)
    return ours, theirs


def error(a: Tensor, b: Tensor, floor: float = 0.0) -> float:
    """Return |a - b| / |b|; ``floor`` is the minimum of |b|, for tensors that are zero up to rounding."""
    a, b = a.detach(), b.detach()
    return float((a - b).norm() / max(float(b.norm()), floor))


def projection(shape: torch.Size, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_same_forward_and_gradients(ours: XCiT, theirs: nn.Module, images: Tensor) -> None:
    seen: list[Tensor] = []  # tokens after timm's last XCA block
    theirs.blocks[-1].register_forward_hook(lambda _module, _inputs, output: seen.append(output))  # type: ignore[union-attr,operator,index]
    inputs = [images.clone().requires_grad_() for _ in range(2)]
    output = ours(inputs[0])
    cls_token = theirs.forward_head(theirs.forward_features(inputs[1]), pre_logits=True)  # type: ignore[operator]
    assert error(output.cls_token, cls_token) < TOLERANCE
    assert error(output.patch_tokens, seen[0]) < TOLERANCE
    assert output.grid == tuple(math.ceil(side / ours.patch_size) for side in images.shape[2:])

    on_cls, on_patches = projection(cls_token.shape, 2), projection(seen[0].shape, 3)
    ours.zero_grad()
    theirs.zero_grad()
    ((output.cls_token * on_cls).sum() + (output.patch_tokens * on_patches).mean()).backward()
    ((cls_token * on_cls).sum() + (seen[0] * on_patches).mean()).backward()
    assert error(*(x.grad for x in inputs)) < TOLERANCE

    # The filter renames and splits gradients in the same way as weights.
    gradients = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
    assert len(gradients) == len(list(ours.parameters()))
    mapped = checkpoint_filter_fn(gradients, theirs)
    expected = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    assert mapped.keys() == expected.keys()
    # The key bias of class attention has zero gradient in exact arithmetic: softmax is invariant to it.
    floor = 1e-8 * max(float(gradient.norm()) for gradient in expected.values())
    wrong = {name: error(mapped[name], expected[name], floor) for name in expected}
    assert {name: value for name, value in wrong.items() if not value < TOLERANCE} == {}

    # BatchNorm has the same running statistics after the forward pass.
    state = checkpoint_filter_fn(dict(ours.state_dict()), theirs)
    for name, buffer in theirs.named_buffers():
        torch.testing.assert_close(state[name], buffer, rtol=TOLERANCE, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "depth", "height", "width"),
    [
        # Two blocks of each family: at this depth tiny_24 equals tiny_12, and small_24 equals small_12.
        *((f"xcit_{size}_p16", 2, 75, 109) for size in ("nano_12", "tiny_12", "small_12")),
        *((f"xcit_{size}_p8", 2, 51, 37) for size in ("nano_12", "tiny_12")),
        *(pytest.param(f"xcit_{size}_p16", 2, 75, 109, marks=SLOW) for size in ("medium_24", "large_24")),
        *(pytest.param(f"xcit_{size}_p8", 2, 51, 37, marks=SLOW) for size in ("small_12", "medium_24", "large_24")),
        # Training resolution.
        ("xcit_nano_12_p16", 1, 224, 224),
        *(pytest.param(name, 1, 224, 224, marks=SLOW) for name in ("xcit_nano_12_p8", "xcit_small_12_p16")),
        # Full depth.
        ("xcit_nano_12_p16", None, 64, 80),
        pytest.param("xcit_tiny_24_p16", None, 64, 80, marks=SLOW),
    ],
)
def test_forward_gradients_and_statistics_match_timm(name: str, depth: int | None, height: int, width: int) -> None:
    ours, theirs = ours_and_timms(name, depth)
    for train in (True, False):
        images = projection(torch.Size((2, 3, height, width)), 4)
        assert_same_forward_and_gradients(ours.train(train), theirs.train(train), images)


@pytest.mark.parametrize("name", ["xcit_nano_12_p16", "xcit_tiny_12_p16"])  # without and with tokens_norm
def test_class_attention_block_returns_same_patch_tokens_as_timm(name: str) -> None:
    """The next block normalises the patch tokens, so a wrong scale would show only in the tokens themselves."""
    ours, theirs = ours_and_timms(name, depth=1)
    tokens = projection(torch.Size((2, 10, ours.embed_dim)), 8)
    for block, expected in zip(ours.cls_attn_blocks, theirs.cls_attn_blocks, strict=True):  # type: ignore[arg-type]
        cls_token, patches = block(tokens[:, :1], tokens[:, 1:], (), last=False)
        assert error(torch.cat((cls_token, patches), dim=1), expected(tokens)) < TOLERANCE
        alone, same = block(tokens[:, :1], tokens[:, 1:], (), last=True)
        assert torch.equal(alone, cls_token)
        assert torch.equal(same, tokens[:, 1:])


@pytest.mark.parametrize("name", [*(f"xcit_{size}_p16" for size in SIZES), "xcit_nano_12_p8"])
def test_names_and_shapes_at_full_depth_match_timm(name: str) -> None:
    with torch.device("meta"):
        ours = build_backbone(name)
        theirs = timm.create_model(f"{name}_224", num_classes=0)
    mapped = checkpoint_filter_fn(dict(ours.state_dict()), theirs)
    assert {k: v.shape for k, v in mapped.items()} == {k: v.shape for k, v in theirs.state_dict().items()}


@pytest.mark.parametrize("patch", [4, 8, 16])
def test_gradient_of_single_image_equals_finite_differences(patch: int) -> None:
    """With one image the strides of the batch of tokens are ambiguous. PyTorch 2.15's BatchNorm then gives timm's XCiT
    a wrong gradient on the CPU, so the reference is the forward pass itself."""
    model = build_backbone(f"xcit_pico_4_p{patch}").double()
    images, direction = projection(torch.Size((1, 3, 75, 61)), 4), projection(torch.Size((1, 3, 75, 61)), 5)
    direction /= direction.norm()
    for train in (True, False):
        model.train(train)

        def value(x: Tensor) -> Tensor:
            output = model(x)
            outputs = ((output.patch_tokens, 6), (output.cls_token, 7))
            return torch.stack([(tokens * projection(tokens.shape, seed)).sum() for tokens, seed in outputs]).sum()

        inputs = images.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(value(inputs), inputs)
        with torch.no_grad():
            numerical = (value(images + 1e-5 * direction) - value(images - 1e-5 * direction)) / 2e-5
        assert float((gradient * direction).sum()) == pytest.approx(float(numerical), rel=1e-5)


@pytest.mark.parametrize(
    ("name", "eta"),
    [("xcit_nano_12_p16", 1.0), ("xcit_tiny_24_p16", 1e-5)],
)
def test_initial_weights_follow_official_initialisation(name: str, eta: float) -> None:
    model = build_backbone(name)
    for key, parameter in model.requires_grad_(False).named_parameters():
        if "gamma" in key:
            assert (parameter == eta).all(), key
        elif key.endswith("temperature"):
            assert (parameter == 1).all(), key
        elif re.search(r"(qkv|proj|fc1|fc2)\.weight$", key) and "patch_embed" not in key:
            assert float(parameter.std()) == pytest.approx(0.02, rel=0.05), key
            # share within one std: 68.3% for a normal, 57.7% for PyTorch's default uniform distribution
            assert float((parameter.abs() < 0.02).float().mean()) == pytest.approx(0.683, abs=0.02), key
        elif re.search(r"(qkv|attn\.proj|fc1|fc2)\.bias$", key):
            assert (parameter == 0).all(), key
    assert 0.01 < float(model.get_parameter("cls_token").std()) < 0.03
    bound = 1 / math.sqrt(9)  # PyTorch's default for a depthwise 3x3 convolution: uniform, fan-in 9
    assert 0.9 * bound < float(model.get_parameter("blocks.0.local_mp.conv1.weight").abs().max()) <= bound


@pytest.mark.parametrize("patch", [4, 8, 16])
@pytest.mark.parametrize("sides", [(1, 1), (7, 61), (33, 16)])
def test_grid_is_rounded_up_for_any_height_and_width(patch: int, sides: tuple[int, int]) -> None:
    model = build_backbone(f"xcit_pico_4_p{patch}").eval()
    with torch.no_grad():
        output = model(torch.randn(2, 3, *sides))
    height, width = (math.ceil(side / patch) for side in sides)
    assert output.grid == (height, width)
    assert output.patch_tokens.shape == (2, height * width, 64)
    assert bool(torch.isfinite(output.cls_token).all())


def test_layers_returns_blocks_in_requested_order() -> None:
    model = build_backbone("xcit_pico_4_p4").eval()
    seen: list[Tensor] = []
    for block in model.blocks:  # type: ignore[union-attr]
        block.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    output = model(torch.randn(2, 3, 20, 24), layers=(2, -1, 0, 2))
    for got, index in zip(output.layers, (2, 3, 0, 2), strict=True):
        assert torch.equal(got, seen[index])
    assert torch.equal(output.patch_tokens, seen[-1])
    with pytest.raises(IndexError):
        model(torch.randn(1, 3, 8, 8), layers=(4,))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_backbone_in_low_precision_stays_close_to_float32(dtype: torch.dtype) -> None:
    model = build_backbone("xcit_pico_4_p8").eval()
    images = torch.randn(2, 3, 40, 24)
    with torch.no_grad():
        expected = model(images).cls_token
        found = model.to(dtype)(images.to(dtype)).cls_token
    assert found.dtype is dtype
    assert error(found.float(), expected) < 0.1


def test_unknown_arch_and_invalid_drop_path_rate_are_refused() -> None:
    for name in ("xcit_smal_12_p16", "xcit_small_12", "xcit_small_12_p32"):
        with pytest.raises(ValueError, match=r"unknown arch.*xcit_small_12_p16"):
            build_backbone(name)
    for rate in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match="drop_path_rate"):
            build_backbone("xcit_pico_4_p4", drop_path_rate=rate)
