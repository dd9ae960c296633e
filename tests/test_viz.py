"""python -m eval.viz: attention maps, principal components, and the command."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from eval_fixtures import tiny_checkpoint
from PIL import Image
from sklearn.decomposition import PCA
from timm.models.xcit import Xcit

from dino_xcit.errors import InputError
from dino_xcit.models import build_backbone
from dino_xcit.models.timm_backbone import TimmBackbone
from dino_xcit.models.xcit import ClassAttention, XCiT
from dino_xcit.transform import EvalTransform
from dino_xcit.weights.names import to_timm
from eval import viz
from eval.sheet import draw_sheet, tile


def random_xcit() -> XCiT:
    """A small XCiT whose heads have different, non-uniform attention maps."""
    backbone = build_backbone("xcit_pico_4_p8").eval()
    assert isinstance(backbone, XCiT)
    for block in backbone.cls_attn_blocks:
        torch.nn.init.normal_(block.attn.qkv.weight, std=0.2)
    return backbone


# ---- attention


def test_class_attention_weights_reproduce_module_output() -> None:
    module = ClassAttention(32, 4).double().eval()
    torch.nn.init.normal_(module.qkv.weight, std=0.5)
    torch.nn.init.normal_(module.qkv.bias)
    cls_token, patches = torch.randn(2, 1, 32).double(), torch.randn(2, 15, 32).double()
    weights = viz.class_attention_weights(module, cls_token, patches)
    assert weights.shape == (2, 4, 16)
    tokens = torch.cat((cls_token, patches), dim=1)
    values = torch.nn.functional.linear(tokens, module.qkv.weight[64:], module.qkv.bias[64:])
    mixed = (weights[:, :, None] @ values.unflatten(2, (4, 8)).transpose(1, 2)).transpose(1, 2).flatten(2)
    torch.testing.assert_close(module.proj(mixed), module(cls_token, patches))


@pytest.mark.parametrize("block", [0, 1, -1])
def test_xcit_attention_maps_equal_timm(block: int) -> None:
    """The reference is timm's network with our weights; neither was built for this image size and aspect ratio."""
    ours = random_xcit()
    peer = Xcit(patch_size=8, embed_dim=64, depth=4, num_heads=4, eta=1.0, tokens_norm=True, num_classes=0).eval()
    peer.load_state_dict(to_timm(ours.state_dict()))
    images = torch.randn(2, 3, 40, 64)
    found, expected = (viz.attention_maps(network, images, block) for network in (ours, TimmBackbone(peer)))
    assert found[0].shape == (2, 4, 5, 8)
    assert found[0].std() > 0.005, "maps are uniform, so that the comparison proves nothing"
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(found[0].sum(dim=(2, 3)) + found[1], torch.ones(2, 4))


def test_attention_maps_leave_network_unchanged() -> None:
    images = torch.randn(1, 3, 48, 64)
    for backbone, shape in ((random_xcit(), (1, 4, 6, 8)), (build_backbone("vit_tiny_2_p16").eval(), (1, 3, 3, 4))):
        before = backbone(images).cls_token
        (first, _), (last, itself) = (viz.attention_maps(backbone, images, block) for block in (0, 1))
        assert last.shape == shape
        torch.testing.assert_close(last.sum(dim=(2, 3)) + itself, torch.ones(1, shape[1]))
        assert not torch.allclose(first, last)
        assert torch.equal(backbone(images).cls_token, before)


@pytest.mark.parametrize("name", ["timm:resnet18", "timm:vit_tiny_patch16_224"])
def test_network_without_class_attention_is_refused(name: str) -> None:
    backbone = build_backbone(name).eval()
    backbone.model.cls_token = None
    with pytest.raises(InputError, match="no class attention"):
        viz.attention_maps(backbone, torch.randn(1, 3, 32, 32))


# ---- components


def test_components_equal_scikit_learn_up_to_signs_in_any_patch_order() -> None:
    rng = np.random.default_rng(0)
    features = (rng.normal(size=(500, 12)) * np.arange(12, 0, -1) + 100).astype(np.float32)
    found, shares = viz.principal_components(features)
    peer = PCA(3, svd_solver="full").fit(features)
    expected = peer.transform(features)
    assert found == pytest.approx(expected * np.sign(found[0] * expected[0]), abs=1e-2)
    assert shares == pytest.approx(peer.explained_variance_ratio_, rel=1e-4)
    assert viz.principal_components(features[::-1].copy())[0] == pytest.approx(found[::-1], abs=1e-2)


def test_foreground_is_one_side_of_first_component() -> None:
    objects = np.arange(300) < 100
    features = np.random.default_rng(0).normal(size=(300, 8)).astype(np.float32)
    features[objects] += 20
    assert (viz.foreground(features, 0.5, "above") == objects).all()
    assert (viz.foreground(features, 0.5, "below") == ~objects).all()


def test_non_finite_features_are_refused() -> None:
    with pytest.raises(InputError, match="not finite"):
        viz.principal_components(np.full((9, 8), np.nan, dtype=np.float32))


# ---- the command


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory, photo: Image.Image) -> Path:
    """A checkpoint, with two photographs in the same folder."""
    folder = tmp_path_factory.mktemp("viz")
    photo.save(folder / "wide.jpg")
    photo.resize((50, 120)).save(folder / "a [tall] name that is longer than its picture is wide.png")
    return tiny_checkpoint(folder, "nowhere")


@pytest.mark.parametrize(("words", "columns", "printed"), [
    ("attention", 6, "created the folder"), ("pca", 1, "992 of 992 patches"),
    ("pca --foreground below --threshold 0.7", 1, ""),
])  # fmt: skip
def test_command_writes_sheet_of_two_images(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: str, columns: int, printed: str
) -> None:
    """Attention has six columns: image, four heads and their mean. PCA has 16 x 23 and 16 x 39 patches of 4 pixels."""
    out = tmp_path / "new" / "picture.png"
    images = [str(path) for path in sorted(weights.parent.glob("*.[jp][pn]g"))]
    viz.main([*words.split(), "--weights", str(weights), "--size", "64", "--out", str(out), "--images", *images])
    with Image.open(out) as sheet:
        assert columns * viz.CELL < sheet.width < (columns + 1) * viz.CELL
    assert printed in capsys.readouterr().out
    assert [path.name for path in out.parent.iterdir()] == ["picture.png"]


def test_load_image_keeps_aspect_ratio_and_limits_pixels(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wide = str(weights.parent / "wide.jpg")
    assert [viz.load_image(wide, size, 1, EvalTransform())[1].shape[1:] for size in (45, 0)] == [(45, 65), (90, 130)]
    assert viz.load_image(wide, 0, 16, EvalTransform())[1].shape == (3, 96, 128)
    monkeypatch.setattr(viz, "MAX_PIXELS", 130 * 90 - 1)
    with pytest.raises(InputError, match="130 x 90 pixels"):
        viz.load_image(wide, 0, 1, EvalTransform())


@pytest.mark.parametrize(("typed", "words"), [
    ("attention photo.jpg", "weights"), ("attention --weights W", "no images given: add files"),
    ("P --weights W", "what"),
    ("attention --weights W none.jpg", r"none\.jpg"), ("attention --weights W .", "no image in"),
    ("attention --weights W W", "not an image"), ("attention --weights W P --size 7", "size is 7"),
    ("attention --weights W P --out a.jpg", "out is a.jpg"), ("attention --weights W P --out W/a.png", "be written"),
    ("attention --weights W P --block -3", "block is -3"), ("attention --weights W P --foreground above", "foreground"),
    ("attention --weights W" + 101 * " P", "101 images"), ("pca --weights W P --block 0", "block is 0"),
    ("pca --weights W P --size 16 --foreground above --threshold 0.999", "too few"),
])  # fmt: skip
def test_invalid_commands_are_refused_without_output(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, typed: str, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    meant = {"W": str(weights), "P": str(weights.parent / "wide.jpg"), "W/a.png": str(weights / "a.png")}
    with pytest.raises(InputError, match=words):
        viz.main([meant.get(word, word) for word in typed.split()])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("what", ["attention", "pca"])
def test_vision_transformer_accepts_images_of_any_shape(what: str, tmp_path: Path) -> None:
    """The network accepts multiples of its patch size only, so that 480 x 721 pixels become 480 x 720."""
    Image.effect_noise((91, 60), 60).convert("RGB").save(tmp_path / "odd.png")
    torch.save(build_backbone("timm:vit_tiny_patch16_224").model.state_dict(), tmp_path / "vit.pth")
    words = f"{what} {tmp_path}/odd.png --weights {tmp_path}/vit.pth --arch timm:vit_tiny_patch16_224 --size 0"
    viz.main([*words.split(), "--out", str(tmp_path / "picture.png")])
    assert (tmp_path / "picture.png").is_file()


def test_folder_is_replaced_by_its_images(weights: Path) -> None:
    wide = str(weights.parent / "wide.jpg")
    assert viz.image_files([wide, str(weights.parent)])[::2] == (wide, wide)


def test_captions_have_letters_beyond_ascii() -> None:
    """Composed and decomposed letters look the same, and unlike the box of a missing glyph."""
    plain, composed, split, missing = (
        np.asarray(draw_sheet([[tile(Image.new("RGB", (8, 8)), "", f"{name}.jpg")]]))
        for name in ("a", "\u00e4", "a\u0308", "\ue000")
    )
    assert (composed == split).all()
    assert (composed != plain).any()
    assert (composed != missing).any()
