"""python -m eval.attention and python -m eval.pca: the weights are the network's own, and pictures show them."""

from __future__ import annotations

import types
from pathlib import Path

import numpy as np
import pytest
import torch
from eval_fixtures import tiny_checkpoint
from PIL import Image
from sklearn.decomposition import PCA
from timm.models.cait import ClassAttn

from dino_xcit.errors import InputError
from dino_xcit.models import build_backbone
from dino_xcit.models.xcit import ClassAttention, XCiT
from dino_xcit.transform import EvalTransform
from eval import attention, pca
from eval.attention import attention_maps, class_attention_weights, overlay
from eval.pca import as_colours, foreground, principal_components
from eval.photographs import CELL, fit, photographs


def random_attention(dim: int = 32, heads: int = 4) -> ClassAttention:
    module = ClassAttention(dim, heads).double().eval()
    torch.nn.init.normal_(module.qkv.weight, std=0.5)
    torch.nn.init.normal_(module.qkv.bias)
    return module


def random_xcit() -> XCiT:
    """A small XCiT whose heads do look somewhere, and in different places."""
    backbone = build_backbone("xcit_pico_4_p8").eval()
    assert isinstance(backbone, XCiT)
    for block in backbone.cls_attn_blocks:
        torch.nn.init.normal_(block.attn.qkv.weight, std=0.2)
    return backbone


# ---- the weights


def test_the_weights_give_the_modules_own_output() -> None:
    module = random_attention()
    cls_token, patches = torch.randn(2, 1, 32).double(), torch.randn(2, 15, 32).double()
    weights = class_attention_weights(module, cls_token, patches)
    assert weights.shape == (2, 4, 16)
    values = torch.nn.functional.linear(
        torch.cat((cls_token, patches), dim=1), module.qkv.weight[64:], module.qkv.bias[64:]
    )
    mixed = (weights[:, :, None] @ values.unflatten(2, (4, 8)).transpose(1, 2)).transpose(1, 2).flatten(2)
    torch.testing.assert_close(module.proj(mixed), module(cls_token, patches))


def test_the_weights_are_those_that_timm_computes() -> None:
    module = random_attention()
    peer = ClassAttn(32, 4, qkv_bias=True).double().eval()
    weights, biases = module.qkv.weight.chunk(3), module.qkv.bias.chunk(3)
    for part, weight, bias in zip((peer.q, peer.k, peer.v), weights, biases, strict=True):
        part.load_state_dict({"weight": weight, "bias": bias})
    peer.fused_attn = False
    seen: list[torch.Tensor] = []
    peer.attn_drop.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    tokens = torch.randn(3, 10, 32).double()
    peer(tokens)
    torch.testing.assert_close(class_attention_weights(module, tokens[:, :1], tokens[:, 1:]), seen[0][:, :, 0])


@pytest.mark.parametrize("block", [0, 1, -1])
def test_an_xcits_maps_are_those_of_the_same_network_in_timm(block: int) -> None:
    """Built by timm, with our weights under its names; a size and aspect that neither was made for."""
    from timm.models.xcit import Xcit

    from dino_xcit.models.timm_backbone import TimmBackbone
    from dino_xcit.weights.names import to_timm

    ours = random_xcit()
    peer = Xcit(patch_size=8, embed_dim=64, depth=4, num_heads=4, eta=1.0, tokens_norm=True, num_classes=0).eval()
    peer.load_state_dict(to_timm(ours.state_dict()))
    images = torch.randn(2, 3, 40, 64)
    found = attention_maps(ours, images, block)
    expected = attention_maps(TimmBackbone(peer), images, block)
    assert found.patches.shape == (2, 4, 5, 8)
    assert found.patches.std() > 0.005, "uniform maps would agree whatever the code does"
    torch.testing.assert_close(found.patches, expected.patches, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(found.itself, expected.itself, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(found.patches.sum(dim=(2, 3)) + found.itself, torch.ones(2, 4))


def test_blocks_are_told_apart_and_looking_changes_nothing() -> None:
    backbone = random_xcit()
    images = torch.randn(1, 3, 32, 48)
    before = backbone(images).cls_token
    first, last = (attention_maps(backbone, images, block).patches for block in (0, 1))
    assert not torch.allclose(first, last)
    assert torch.equal(attention_maps(backbone, images).patches, last)
    assert torch.equal(backbone(images).cls_token, before)
    assert not backbone.cls_attn_blocks[1].attn._forward_pre_hooks


def test_a_map_points_at_the_patch_that_the_class_token_looks_at() -> None:
    """Keys made of one feature: the patch that has most of it gets the weight, at its own place in the grid."""
    module = random_attention()
    with torch.no_grad():
        module.qkv.weight.zero_()
        module.qkv.bias.zero_()
        module.qkv.weight[32:64, 0] = 1.0  # every key: the token's first feature
        module.qkv.bias[:32] = 10.0
    patches = torch.zeros(1, 12, 32).double()
    patches[0, 7, 0] = 3.0
    weights = class_attention_weights(module, torch.zeros(1, 1, 32).double(), patches)
    assert (weights[0].argmax(dim=-1) == 8).all()


def test_a_vision_transformers_maps_are_its_class_tokens_rows() -> None:
    backbone = build_backbone("timm:vit_tiny_patch16_224").eval()
    images = torch.randn(1, 3, 48, 64)
    maps = attention_maps(backbone, images)
    assert maps.patches.shape == (1, 3, 3, 4)
    torch.testing.assert_close(maps.patches.sum(dim=(2, 3)) + maps.itself, torch.ones(1, 3))


@pytest.mark.parametrize("name", ["timm:resnet18", "timm:vit_small_patch16_224.not_cls", "timm:convnext_atto"])
def test_a_network_without_class_attention_is_refused(name: str) -> None:
    backbone = build_backbone(name.removesuffix(".not_cls")).eval()
    if name.endswith(".not_cls"):
        backbone.model.cls_token = None
    with pytest.raises(InputError, match=r"no attention of a class token .* eval.pca draws"):
        attention_maps(backbone, torch.randn(1, 3, 64, 64))


def test_a_block_that_does_not_exist_is_refused() -> None:
    for block in (2, -3):
        with pytest.raises(InputError, match=f"block is {block}, but there are 2 blocks"):
            attention_maps(random_xcit(), torch.randn(1, 3, 32, 32), block)


def test_the_overlay_is_brightest_where_the_weight_is_greatest() -> None:
    weights = np.full((3, 4), 0.01, dtype=np.float32)
    weights[2, 1] = 0.5
    pixels = np.asarray(overlay(Image.new("RGB", (80, 60), (90, 90, 90)), weights)).sum(axis=2)
    row, column = np.unravel_index(pixels.argmax(), pixels.shape)
    assert (row // 20, column // 20) == (2, 1)
    assert pixels[5, 70] < pixels.max() / 3


# ---- components


def test_components_are_scikit_learns_up_to_sign() -> None:
    rng = np.random.default_rng(0)
    features = (rng.normal(size=(500, 12)) * np.arange(12, 0, -1) + 100).astype(np.float32)
    found, shares = principal_components(features)
    peer = PCA(3, svd_solver="full").fit(features)
    expected = peer.transform(features)
    for column in range(3):
        sign = np.sign(found[0, column] * expected[0, column])
        assert found[:, column] == pytest.approx(sign * expected[:, column], abs=1e-2)
    assert shares == pytest.approx(peer.explained_variance_ratio_, rel=1e-4)


def test_the_sign_of_a_component_does_not_depend_on_the_order_of_the_patches() -> None:
    features = np.random.default_rng(0).normal(size=(200, 8)).astype(np.float32)
    assert principal_components(features[::-1].copy())[0] == pytest.approx(
        principal_components(features)[0][::-1], abs=1e-4
    )


def test_the_foreground_is_one_side_of_the_first_component() -> None:
    rng = np.random.default_rng(0)
    objects = np.arange(300) < 100
    features = rng.normal(size=(300, 8)).astype(np.float32)
    features[objects] += 20
    above, below = (foreground(features, 0.5, above=side) for side in (True, False))
    assert (above == objects).all()
    assert (below == ~objects).all()


def test_colours_span_all_bytes_and_one_outlier_does_not_take_them() -> None:
    projected = np.random.default_rng(0).normal(size=(1000, 3)).astype(np.float32)
    projected[0] = 1000
    colours = as_colours(projected)
    assert (colours.min(axis=0) == 0).all()
    assert (colours.max(axis=0) == 255).all()
    assert (np.std(colours, axis=0) > 50).all()


def test_too_few_or_broken_patches_are_refused() -> None:
    with pytest.raises(InputError, match="3 patches of 8 features are too few"):
        principal_components(np.zeros((3, 8), dtype=np.float32))
    with pytest.raises(InputError, match="not finite"):
        principal_components(np.full((9, 8), np.nan, dtype=np.float32))


# ---- the commands


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory, photo: Image.Image) -> Path:
    """A checkpoint, with two photographs beside it."""
    folder = tmp_path_factory.mktemp("look")
    photo.save(folder / "wide.jpg")
    photo.resize((50, 120)).save(folder / "a [tall] name that is longer than its picture is wide.png")
    return tiny_checkpoint(folder, "nowhere")


def test_attention_draws_a_row_an_image_and_a_column_a_head(weights: Path, tmp_path: Path) -> None:
    images = [str(path) for path in sorted(weights.parent.glob("*.[jp][pn]g"))]
    out = tmp_path / "new" / "maps.png"
    attention.main(["--weights", str(weights), *images, "--size", "64", "--out", str(out)])
    with Image.open(out) as sheet:
        assert sheet.width == 2 * 20 + 6 * CELL + 5 * 10, "the image, four heads, their mean"
        assert sheet.height == 2 * 20 + CELL + round(CELL * 64 / 92) + 2 * 40 + 10
    assert [path.name for path in out.parent.iterdir()] == ["maps.png"]


def test_pca_draws_all_images_together(weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = [str(path) for path in sorted(weights.parent.glob("*.[jp][pn]g"))]
    for words in ((), ("--foreground", "below", "--threshold", "0.7")):
        out = tmp_path / "pca.png"
        pca.main(["--weights", str(weights), *images, "--size", "64", "--out", str(out), *words])
        assert out.is_file()
        said = capsys.readouterr().out
        assert ("992 of 992 patches" in said) == (not words), "16 x 23 and 16 x 39 patches of 4 pixels"
        assert "of 992 patches" in said


def test_photographs_keep_their_aspect_at_any_size(weights: Path) -> None:
    wide = str(weights.parent / "wide.jpg")
    (small,) = photographs([wide], 45, EvalTransform())
    (whole,) = photographs([wide], 0, EvalTransform())
    assert small.image.size == (65, 45)
    assert whole.image.size == (130, 90)
    assert small.pixels(EvalTransform()).shape == (1, 3, 45, 65)
    assert fit(whole.image).size == (CELL, round(CELL * 90 / 130))


MISTAKES: list[tuple[types.ModuleType, list[str], str]] = [
    (attention, ["photo.jpg"], "no weights given"),
    (attention, ["--weights", "W"], "images is empty"),
    (attention, ["--weights", "W", "none.jpg"], "cannot read the image none.jpg: No such file"),
    (attention, ["--weights", "W", "."], r"\. is a folder, expected image files"),
    (attention, ["--weights", "W", "W"], "cannot be read: not an image in a known format"),
    (attention, ["--weights", "W", "P", "--size", "7"], "size is 7"),
    (attention, ["--weights", "W", "P", "--out", "a.jpg"], "out is a.jpg"),
    (attention, ["--weights", "W", "P", "--out", "P/a.png"], "cannot write"),
    (attention, ["--weights", "W", "P", "--block", "5"], "block is 5"),
    (attention, ["--weights", "W", "P", "--json", "a.json"], "json is a.json"),
    (attention, ["--weights", "W", *["P"] * 101], "101 images given, expected at most 100"),
    (pca, ["--weights", "W", "P", "--threshold", "0.4"], "threshold is 0.4"),
    (pca, ["--weights", "W", "P", "--threshold", "1"], "threshold is 1"),
    (pca, ["--weights", "W", "P", "--size", "16", "--foreground", "above", "--threshold", "0.999"], "are too few"),
]


@pytest.mark.parametrize(("module", "words", "sentence"), MISTAKES)
def test_mistakes_are_sentences(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    module: types.ModuleType, words: list[str], sentence: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    meant = {"W": str(weights), "P": str(weights.parent / "wide.jpg"), "P/a.png": str(weights / "a.png")}
    with pytest.raises(InputError, match=sentence):
        module.main([meant.get(word, word) for word in words])
    assert not list(tmp_path.iterdir())


def test_a_very_long_image_is_refused_before_it_takes_memory(tmp_path: Path) -> None:
    Image.new("RGB", (60_000, 2)).save(tmp_path / "line.png")
    with pytest.raises(
        InputError, match=r"would have 480 x 14400000 pixels, .*: give a smaller --size, such as --size 45,"
    ):
        list(photographs([str(tmp_path / "line.png")], 480, EvalTransform()))
    Image.new("RGB", (300_000, 1)).save(tmp_path / "line.png")  # of no --size at all
    with pytest.raises(InputError, match=r"in all: cut the image, which is 300,000 times as long as wide"):
        list(photographs([str(tmp_path / "line.png")], 16, EvalTransform()))


@pytest.mark.parametrize("module", [attention, pca])
def test_too_little_memory_is_a_sentence_about_this_photograph(
    weights: Path, monkeypatch: pytest.MonkeyPatch, module: types.ModuleType
) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

    monkeypatch.setattr("dino_xcit.models.xcit.XCiT.forward", full)
    with pytest.raises(
        InputError, match=r"out of memory for wide\.jpg of 92 x 64 pixels: give a smaller --size, such as --size 32"
    ):
        module.main(["--weights", str(weights), str(weights.parent / "wide.jpg"), "--size", "64"])


def test_images_as_they_are_have_a_limit_too(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eval.photographs.MOST_PIXELS", 130 * 90 - 1)
    with pytest.raises(
        InputError,
        match=r"would have 90 x 130 pixels, expected at most 11,699 in all: give a smaller --size, such as --size 88",
    ):
        list(photographs([str(weights.parent / "wide.jpg")], 0, EvalTransform()))
    assert list(photographs([str(weights.parent / "wide.jpg")], 88, EvalTransform()))  # the advice helps


@pytest.mark.parametrize("words", [(), ("--size", "0")])
def test_a_vision_transformer_takes_photographs_of_any_shape(tmp_path: Path, words: tuple[str, ...]) -> None:
    """It takes multiples of its patch only: 480 x 721 became 480 x 720."""
    Image.effect_noise((451, 300), 60).convert("RGB").save(tmp_path / "odd.png")
    backbone = build_backbone("timm:vit_tiny_patch16_224")
    torch.save(backbone.model.state_dict(), tmp_path / "vit.pth")
    for module in (attention, pca):
        out = tmp_path / "out.png"
        given = ["--weights", str(tmp_path / "vit.pth"), "--arch", "timm:vit_tiny_patch16_224"]
        module.main([*given, str(tmp_path / "odd.png"), "--out", str(out), *words])
        assert out.is_file()
        out.unlink()
