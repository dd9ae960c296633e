"""XCiT against timm's, with weights that timm's own filter remaps from the official names.

Comparisons are in float64, so that a tolerance of 1e-5 measures mathematics and not the order of float32 sums, and
with random values added to every parameter and running statistic, so that LayerScale at 1e-5 or a bias at zero hides
nothing. Where the largest sizes would take minutes the number of XCA blocks is cut in both models: all blocks are
alike, and that the full depth has the right blocks is tested by their names and shapes.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping

import pytest
import timm
import torch
from timm.models.xcit import checkpoint_filter_fn
from torch import Tensor, nn

from dino_xcit.models import XCiT, backbone_names, build_backbone
from dino_xcit.models.xcit import LPI, XCIT_SIZES

OFFICIAL = [
    f"xcit_{size}_p{patch}"
    for size in ("nano_12", "tiny_12", "tiny_24", "small_12", "small_24", "medium_24", "large_24")
    for patch in (16, 8)
]
TOLERANCE = 1e-5


def ours_and_timms(name: str, depth: int | None = None) -> tuple[XCiT, nn.Module]:
    """Both networks with the same random float64 weights; timm's loads them strictly through its own filter."""
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
    load_into_timm(theirs, ours.state_dict())
    return ours, theirs


def load_into_timm(theirs: nn.Module, state: Mapping[str, Tensor]) -> None:
    theirs.load_state_dict(checkpoint_filter_fn({k: v.clone() for k, v in state.items()}, theirs), strict=True)


def last_xca_block_of(theirs: nn.Module) -> list[Tensor]:
    """A list that receives the tokens of timm's last XCA block on each forward pass."""
    seen: list[Tensor] = []
    theirs.blocks[-1].register_forward_hook(lambda _module, _inputs, output: seen.append(output))  # type: ignore[union-attr,operator,index]
    return seen


def error(a: Tensor, b: Tensor, floor: float = 0.0) -> float:
    """|a - b| / |b|, with a floor under |b| for tensors that are zero but for rounding."""
    a, b = a.detach(), b.detach()
    return float((a - b).norm() / max(float(b.norm()), floor))


def projection(shape: torch.Size, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_same_forward_and_gradients(
    ours: XCiT, theirs: nn.Module, seen: list[Tensor], images: Tensor, train: bool
) -> None:
    ours.train(train)
    theirs.train(train)
    seen.clear()
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
    assert inputs[0].grad is not None
    assert inputs[1].grad is not None
    assert error(inputs[0].grad, inputs[1].grad) < TOLERANCE

    # The filter that renames and splits weights renames and splits their gradients.
    gradients = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
    assert len(gradients) == len(list(ours.parameters()))
    mapped = checkpoint_filter_fn(gradients, theirs)
    expected = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    assert mapped.keys() == expected.keys()
    # The bias of a class attention's keys has no gradient in exact arithmetic: softmax does not see it.
    floor = 1e-8 * max(float(gradient.norm()) for gradient in expected.values())
    wrong = {name: error(mapped[name], expected[name], floor) for name in expected}
    assert {name: value for name, value in wrong.items() if value >= TOLERANCE} == {}

    # BatchNorm: the same running statistics afterwards, changed in train mode only.
    state = checkpoint_filter_fn(dict(ours.state_dict()), theirs)
    for name, buffer in theirs.named_buffers():
        torch.testing.assert_close(state[name], buffer, rtol=TOLERANCE, atol=1e-9)


@pytest.mark.parametrize("name", [name for name in OFFICIAL if not name.startswith(("xcit_tiny_24", "xcit_small_24"))])
def test_every_family_equals_timms_in_forward_gradients_and_statistics(name: str) -> None:
    """Two XCA blocks of each family (with those, tiny_24 is tiny_12, and small_24 small_12)."""
    ours, theirs = ours_and_timms(name, depth=2)
    seen = last_xca_block_of(theirs)
    uneven = (75, 109) if name.endswith("p16") else (51, 37)
    wide_stem = name in ("xcit_medium_24_p8", "xcit_large_24_p8")  # many seconds at 96 pixels
    for train in (True, False):
        for sides in (uneven,) if wide_stem else (uneven, (96, 96)):
            assert_same_forward_and_gradients(ours, theirs, seen, projection(torch.Size((2, 3, *sides)), 4), train)


@pytest.mark.parametrize(
    "name",
    [
        *(f"xcit_{size}_p16" for size in ("nano_12", "tiny_12", "small_12", "medium_24", "large_24")),
        *(f"xcit_{size}_p8" for size in ("nano_12", "tiny_12", "small_12")),
    ],
)
def test_at_224_pixels_equals_timms(name: str) -> None:
    """One XCA block: the size of the grid matters here, not the depth."""
    ours, theirs = ours_and_timms(name, depth=1)
    seen = last_xca_block_of(theirs)
    for train in (True, False):
        assert_same_forward_and_gradients(ours, theirs, seen, projection(torch.Size((2, 3, 224, 224)), 4), train)


@pytest.mark.parametrize("name", ["xcit_nano_12_p16", "xcit_tiny_12_p8", "xcit_tiny_24_p16"])
def test_at_full_depth_equals_timms(name: str) -> None:
    ours, theirs = ours_and_timms(name)
    seen = last_xca_block_of(theirs)
    for train in (True, False):
        assert_same_forward_and_gradients(ours, theirs, seen, projection(torch.Size((2, 3, 64, 80)), 4), train)


@pytest.mark.parametrize("name", ["xcit_nano_12_p16", "xcit_tiny_12_p16"])
def test_class_attention_hands_on_the_patch_tokens_as_timms_does(name: str) -> None:
    """The next block's norm hides from the class token how long they are, but a reader of them sees it."""
    ours, theirs = ours_and_timms(name, depth=1)
    tokens = projection(torch.Size((2, 10, ours.embed_dim)), 8)
    for block, expected in zip(ours.cls_attn_blocks, theirs.cls_attn_blocks, strict=True):  # type: ignore[arg-type]
        cls_token, patches = block(tokens[:, :1], tokens[:, 1:], last=False)
        assert error(torch.cat((cls_token, patches), dim=1), expected(tokens)) < TOLERANCE
        alone, same = block(tokens[:, :1], tokens[:, 1:], last=True)
        assert torch.equal(alone, cls_token)
        assert torch.equal(same, tokens[:, 1:])


@pytest.mark.parametrize("name", OFFICIAL)
def test_names_and_shapes_at_full_depth_are_those_that_timms_filter_expects(name: str) -> None:
    with torch.device("meta"):
        ours = build_backbone(name)
        theirs = timm.create_model(f"{name}_224", num_classes=0)
    mapped = checkpoint_filter_fn(dict(ours.state_dict()), theirs)
    assert {k: v.shape for k, v in mapped.items()} == {k: v.shape for k, v in theirs.state_dict().items()}


@pytest.mark.parametrize("patch", [4, 8, 16])
def test_the_gradient_of_a_single_image_is_that_of_numerical_differences(patch: int) -> None:
    """With one image the strides of a batch of tokens are ambiguous, and PyTorch 2.15's BatchNorm then gives timm's
    XCiT a wrong gradient on CPUs, so here the oracle is the forward pass itself."""
    model = build_backbone(f"xcit_pico_4_p{patch}").double()
    images, direction = projection(torch.Size((1, 3, 75, 61)), 4), projection(torch.Size((1, 3, 75, 61)), 5)
    direction /= direction.norm()
    for train in (True, False):
        model.train(train)

        def value(x: Tensor) -> Tensor:
            output = model(x)
            on_patches = projection(output.patch_tokens.shape, 6)
            return (output.cls_token * projection(output.cls_token.shape, 7)).sum() + (
                output.patch_tokens * on_patches
            ).sum()

        inputs = images.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(value(inputs), inputs)
        with torch.no_grad():
            numerical = (value(images + 1e-5 * direction) - value(images - 1e-5 * direction)) / 2e-5
        assert float((gradient * direction).sum()) == pytest.approx(float(numerical), rel=1e-5)


@pytest.mark.parametrize(
    ("size", "millions"),
    [("nano_12", "3.05"), ("tiny_12", "6.72"), ("tiny_24", "12.12"), ("small_12", "26.25"), ("small_24", "47.67"),
     ("medium_24", "84.40"), ("large_24", "189.10")],
)  # fmt: skip
def test_parameter_counts_are_those_of_the_paper(size: str, millions: str) -> None:
    with torch.device("meta"):
        model = build_backbone(f"xcit_{size}_p16")
    classifier = 1000 * int(model.embed_dim) + 1000  # type: ignore[arg-type]
    assert f"{(sum(p.numel() for p in model.parameters()) + classifier) / 1e6:.2f}" == millions


def test_small_12_p16_has_the_official_entries() -> None:
    with torch.device("meta"):
        model = build_backbone("xcit_small_12_p16")
    assert sum(p.numel() for p in model.parameters()) == 25_868_304
    state = model.state_dict()
    assert len(state) == 381
    affine, norm = ("weight", "bias"), ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    stem = [f"patch_embed.proj.{i}.0.weight" for i in (0, 2, 4, 6)]
    stem += [f"patch_embed.proj.{i}.1.{leaf}" for i in (0, 2, 4, 6) for leaf in norm]
    linear = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    xca = [f"{layer}.{leaf}" for layer in (*linear, "norm3", "local_mp.conv1", "local_mp.conv2") for leaf in affine]
    xca += [f"local_mp.bn.{leaf}" for leaf in norm] + ["attn.temperature", "gamma1", "gamma2", "gamma3"]
    cls_attn = [f"{layer}.{leaf}" for layer in linear for leaf in affine] + ["gamma1", "gamma2"]
    expected = ["cls_token", *stem, "norm.weight", "norm.bias"]
    expected += ["pos_embeder.token_projection.weight", "pos_embeder.token_projection.bias"]
    expected += [f"blocks.{i}.{key}" for i in range(12) for key in xca]
    expected += [f"cls_attn_blocks.{i}.{key}" for i in range(2) for key in cls_attn]
    assert sorted(state) == sorted(expected)


@pytest.mark.parametrize(
    ("name", "eta"),
    [("xcit_nano_12_p16", 1.0), ("xcit_tiny_12_p8", 1.0), ("xcit_tiny_24_p16", 1e-5), ("xcit_pico_4_p4", 1.0)],
)
def test_fresh_weights_follow_the_official_initialisation(name: str, eta: float) -> None:
    model = build_backbone(name)
    for key, parameter in model.requires_grad_(False).named_parameters():
        if "gamma" in key:
            assert (parameter == eta).all(), key
        elif key.endswith("temperature"):
            assert (parameter == 1).all(), key
        elif re.search(r"(qkv|proj|fc1|fc2)\.weight$", key) and "patch_embed" not in key:
            assert float(parameter.std()) == pytest.approx(0.02, rel=0.05), key
            # a normal has 68.3% within one deviation, PyTorch's default uniform 57.7%
            assert float((parameter.abs() < 0.02).float().mean()) == pytest.approx(0.683, abs=0.02), key
        elif re.search(r"(qkv|attn\.proj|fc1|fc2)\.bias$", key):
            assert (parameter == 0).all(), key
    assert 0.01 < float(model.get_parameter("cls_token").std()) < 0.03
    bound = 1 / math.sqrt(9)  # PyTorch's default for a depthwise 3x3 convolution: uniform, fan-in 9
    assert 0.9 * bound < float(model.get_parameter("blocks.0.local_mp.conv1.weight").abs().max()) <= bound


def test_every_name_has_patches_of_4_8_and_16() -> None:
    names = backbone_names()
    assert set(OFFICIAL) < set(names)
    assert {name for name in names if name.endswith("_p4")} == {re.sub(r"_p\d+$", "_p4", name) for name in names}


@pytest.mark.parametrize("patch", [4, 8, 16])
@pytest.mark.parametrize("sides", [(1, 1), (7, 61), (33, 16), (5, 4), (48, 17)])
def test_any_height_and_width_gives_a_grid_rounded_up(patch: int, sides: tuple[int, int]) -> None:
    model = build_backbone(f"xcit_pico_4_p{patch}").eval()
    with torch.no_grad():
        output = model(torch.randn(2, 3, *sides))
    height, width = (math.ceil(side / patch) for side in sides)
    assert output.grid == (height, width)
    assert output.cls_token.shape == (2, 64)
    assert output.patch_tokens.shape == (2, height * width, 64)
    assert bool(torch.isfinite(output.cls_token).all())


def test_tokens_lie_row_by_row() -> None:
    """Where the grid says row i // w, column i % w: a change at the bottom right moves the last token most."""
    model = build_backbone("xcit_pico_4_p4").eval()
    images = torch.zeros(1, 3, 16, 40)
    changed = images.clone()
    changed[:, :, 12:, :4] = 3.0  # the bottom left patch: row 3, column 0
    with torch.no_grad():
        stem, grid = model.patch_embed(images)  # type: ignore[operator]
        moved, _ = model.patch_embed(changed)  # type: ignore[operator]
    assert grid == (4, 10)
    assert int((moved - stem).norm(dim=-1)[0].argmax()) == 3 * 10


def test_layers_returns_the_blocks_in_the_order_asked_for() -> None:
    model = build_backbone("xcit_pico_4_p4").eval()
    seen: list[Tensor] = []
    for block in model.blocks:  # type: ignore[union-attr]
        block.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    output = model(torch.randn(2, 3, 20, 24), layers=(2, -1, 0, 2))
    assert len(output.layers) == 4
    for got, index in zip(output.layers, (2, 3, 0, 2), strict=True):
        assert torch.equal(got, seen[index])
    assert torch.equal(output.patch_tokens, seen[-1])
    with pytest.raises(IndexError):
        model(torch.randn(1, 3, 8, 8), layers=(4,))


def test_local_patch_interaction_sees_the_tokens_without_a_copy() -> None:
    model = build_backbone("xcit_pico_4_p4")
    tokens: list[Tensor] = []
    images: list[Tensor] = []
    for module in model.modules():
        if isinstance(module, LPI):
            module.register_forward_pre_hook(lambda _module, inputs: tokens.append(inputs[0]))
            module.conv1.register_forward_pre_hook(lambda _module, inputs: images.append(inputs[0]))
    model(torch.randn(2, 3, 28, 44))
    assert len(tokens) == len(images) == 4
    for given, image in zip(tokens, images, strict=True):
        assert image.shape == (2, 64, 7, 11)
        assert image.is_contiguous(memory_format=torch.channels_last)
        assert image.data_ptr() == given.data_ptr()
        assert image.untyped_storage().data_ptr() == given.untyped_storage().data_ptr()


def test_the_output_of_local_patch_interaction_is_contiguous_tokens() -> None:
    """So that the residual that follows reads memory in order."""
    lpi = LPI(32)
    out = lpi(torch.randn(2, 35, 32), (5, 7))
    assert out.shape == (2, 35, 32)
    assert out.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_backbone_in_low_precision_throughout_still_runs(dtype: torch.dtype) -> None:
    model = build_backbone("xcit_pico_4_p8").eval()
    images = torch.randn(2, 3, 40, 24)
    with torch.no_grad():
        expected = model(images).cls_token
        found = model.to(dtype)(images.to(dtype)).cls_token
    assert found.dtype is dtype
    assert error(found.float(), expected) < 0.1


def test_unknown_names_are_refused_with_near_matches() -> None:
    with pytest.raises(ValueError, match="xcit_small_12_p16"):
        build_backbone("xcit_smal_12_p16")
    for name in ("xcit_small_12", "xcit_small_12_p32", "xcit_medium_12_p16", "resnet50", ""):
        with pytest.raises(ValueError, match="unknown arch"):
            build_backbone(name)
    for rate in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match="drop_path_rate"):
            build_backbone("xcit_pico_4_p4", drop_path_rate=rate)
