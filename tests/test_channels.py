"""Images of other than three channels: decoding, augmentation, training, and all that follows from the checkpoint."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from coco_fixtures import TINY, make_coco
from mask_fixtures import shapes
from numpy.typing import NDArray
from PIL import Image
from run_here import Here, on_two_ranks
from torch import nn

import run_detect
import run_extract
import run_finetune
import run_knn
import run_linear
import run_pretrain
import run_retrieval
import run_segment
from dino_xcit import export
from dino_xcit.augment import MultiCropAugmentation
from dino_xcit.config import PretrainConfig
from dino_xcit.data import UndecodableImage, check, open_source, pack
from dino_xcit.data.decode import decode, decode_image, picture_of, read_image
from dino_xcit.data.measure import choose_white_level, measure_channels
from dino_xcit.errors import InputError
from dino_xcit.models import build_backbone
from dino_xcit.models.channels import adapted, first_convolution
from dino_xcit.recipes import parse_pretrain
from dino_xcit.transform import EvalTransform, PixelFormat, normalise
from dino_xcit.weights import load_backbone
from eval import viz
from run_pretrain import pretrain, with_statistics

FIVE = PixelFormat(5)
SETTINGS: dict[str, Any] = {
    "arch": "xcit_pico_4_p8", "global_crops_size": 16, "local_crops_size": 8, "local_crops_number": 1, "out_dim": 32,
    "head_hidden_dim": 16, "head_bottleneck_dim": 8, "batch_size_per_gpu": 8, "epochs": 2, "warmup_epochs": 0,
    "freeze_last_layer": 0, "num_workers": 0, "device": "cpu",
}  # fmt: skip


def npy(pixels: NDArray[Any]) -> bytes:
    file = io.BytesIO()
    np.save(file, pixels)
    return file.getvalue()


def png(pixels: NDArray[Any]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def tiff(pixels: NDArray[Any], **how: Any) -> bytes:
    file = io.BytesIO()
    pytest.importorskip("tifffile").imwrite(file, pixels, photometric="minisblack", **how)
    return file.getvalue()


def bands(channels: int, dtype: Any = np.uint16, seed: int = 0) -> NDArray[Any]:
    return np.random.default_rng(seed).integers(0, np.iinfo(dtype).max, (20, 30, channels), dtype=dtype, endpoint=True)


# ---- decoding


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize(
    "encode",
    [
        npy,
        lambda pixels: npy(pixels.transpose(2, 0, 1)),
        lambda pixels: tiff(pixels, planarconfig="contig"),
        lambda pixels: tiff(pixels.transpose(2, 0, 1)),
        lambda pixels: npy(pixels.astype(pixels.dtype.newbyteorder(">"))),
    ],
    ids=["npy", "npy, channels first", "tiff", "tiff, planes", "big-endian"],
)
def test_integers_are_decoded_without_loss(encode: Callable[[NDArray[Any]], bytes], dtype: Any) -> None:
    pixels = bands(5, dtype)
    found = decode_image(encode(pixels), "a", FIVE)
    assert isinstance(found, np.ndarray)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(np.rint(found * np.iinfo(dtype).max), pixels)


def test_16_bit_png_is_decoded_without_loss_up_to_the_white_level() -> None:
    pixels = bands(1)[..., 0]
    found = decode_image(png(pixels), "a", PixelFormat(1, white_level=4095))
    np.testing.assert_array_equal(np.rint(np.asarray(found)[..., 0] * 4095), np.minimum(pixels, 4095))


def test_colour_png_with_alpha_keeps_16_bits_and_its_shape() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (9, 4, 4), dtype=np.uint8)
    found = np.asarray(decode_image(png(pixels), "a", PixelFormat(4)))
    np.testing.assert_array_equal(np.rint(found * 255), pixels)
    palette = io.BytesIO()
    Image.fromarray(pixels[..., :3]).quantize(8).save(palette, "PNG")
    with pytest.raises(UndecodableImage, match="numbers of a palette"):
        decode_image(palette.getvalue(), "a", PixelFormat(1))


def test_large_tiles_are_refused_before_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    data = tiff(bands(5), planarconfig="contig", tile=(64, 64))
    assert np.asarray(decode_image(data, "a", FIVE)).shape == (20, 30, 5)
    monkeypatch.setattr("dino_xcit.data.channels.MAX_VALUES", 64 * 64 - 1)
    with pytest.raises(UndecodableImage, match="too many values: 4,096"):
        decode_image(data, "a", FIVE)


def test_floats_need_a_range_and_nan_is_black() -> None:
    pixels = np.array([[[-1.0], [0.0], [1.5], [9.0], [np.nan]]], dtype=np.float32)
    found = decode_image(npy(pixels), "a", PixelFormat(1, value_range=(0.0, 3.0)))
    np.testing.assert_array_equal(np.asarray(found)[0, :, 0], np.float32([0, 0, 0.5, 1, 0]))
    with pytest.raises(UndecodableImage, match="its pixels are float32, with an unknown range: set --value-range"):
        decode_image(npy(pixels), "a", PixelFormat(1))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (npy(bands(4)), r"field.npy cannot be read: its pixels have the shape \(20, 30, 4\), expected 5 channels"),
        (npy(bands(5))[:-7], "EOF: reading array data"),
        (npy(bands(5)[:, :5].transpose(2, 0, 1)[:, :, :5]), "unknown which are the channels"),
        (npy(bands(1)[:5, :, 0]), r"the shape \(5, 30\), expected 5 channels"),
        (npy(bands(5)[:0]), r"its pixels have the shape \(0, 30, 5\)"),
        (b"\xff\xd8\xff", "expected PNG, TIFF or NPY"),
        (b"", "empty file"),
        (npy(np.array([[[{}]]], dtype=object)), "Object arrays cannot be loaded"),
        (npy(bands(5).astype(np.complex64)), "complex64, expected numbers"),
        (b"\x93NUMPY\x01\x00v\x00{'descr': '<u2', 'fortran_order': False, 'shape': (99999, 99999, 5), }", "too many"),
    ],
    ids=["other number", "truncated", "ambiguous", "flat", "nothing", "jpeg", "empty", "pickle", "complex", "huge"],
)
def test_unreadable_images_are_named(data: bytes, words: str) -> None:
    if b"99999" in data:
        data = data.ljust(127) + b"\n"
    with pytest.raises(UndecodableImage, match=words):
        decode_image(data, "field.npy", FIVE)


def test_arrays_are_images_only_where_there_are_no_others(tmp_path: Path) -> None:
    for name in ("a.npy", "b.npy"):
        (tmp_path / name).write_bytes(npy(bands(5)))
    assert len(open_source(str(tmp_path))) == 2
    with pytest.raises(UndecodableImage, match="an array, which only networks trained with --channels N read"):
        read_image(open_source(str(tmp_path)), 0)
    archive = tmp_path / "set.tar"
    with tarfile.open(archive, "w") as tar:
        tar.add(tmp_path / "a.npy", "0.npy")
        tar.add(tmp_path / "b.npy", "1.npy")
    assert np.shape(read_image(open_source(f"tar:{archive}"), 1, FIVE)) == (20, 30, 5)
    (tmp_path / "c.png").write_bytes(png(bands(3, np.uint8)))
    source = open_source(str(tmp_path))
    assert [Path(source.name(index)).name for index in range(len(source))] == ["c.png"]


@pytest.mark.parametrize("format", ["list", "hf"])
def test_lists_and_hugging_face_datasets_keep_16_bits(tmp_path: Path, format: str) -> None:
    pixels = bands(1)[..., 0]
    (tmp_path / "a.png").write_bytes(png(pixels))
    url = str(tmp_path / "all.txt")
    Path(url).write_text(f"{tmp_path / 'a.png'}\n")
    if format == "hf":
        datasets = pytest.importorskip("datasets")
        rows = datasets.Dataset.from_dict({"image": [{"bytes": png(pixels), "path": None}]})
        rows.cast_column("image", datasets.Image()).save_to_disk(str(tmp_path / "hf"))
        url = f"hf:{tmp_path / 'hf'}"
    found = np.asarray(read_image(open_source(url), 0, PixelFormat(1)))
    np.testing.assert_array_equal(np.rint(found[..., 0] * 65535), pixels)


# ---- transforms


def test_evaluation_transform_resizes_crops_and_normalises() -> None:
    transform = EvalTransform(16, 12, mean=(0.5,) * 5, std=(0.25,) * 5, value_range=(0.0, 3.0))
    assert EvalTransform.from_dict(json.loads(json.dumps(transform.to_dict()))) == transform
    image = np.asarray(decode_image(npy(bands(5)), "a", FIVE))
    found = transform(image)
    expected = nn.functional.interpolate(
        torch.from_numpy(image).permute(2, 0, 1)[None], (16, 24), mode="bicubic", antialias=True
    )
    torch.testing.assert_close(found, expected.clamp(0, 1)[0, :, 2:14, 6:18])
    torch.testing.assert_close(normalise(found[None], transform.mean, transform.std)[0], (found - 0.5) / 0.25)


@pytest.mark.parametrize("turned", [False, True])
def test_only_the_centre_of_a_long_image_is_resized(turned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    transform, image = EvalTransform(16, 12), np.tile(np.asarray(decode_image(npy(bands(5)), "a", FIVE)), (1, 20, 1))
    image = image.transpose(1, 0, 2) if turned else image
    short = transform(image)
    monkeypatch.setattr("dino_xcit.transform.MAX_ASPECT", 100)
    torch.testing.assert_close(short, transform(image), atol=1e-5, rtol=0)


def views_of(image: NDArray[Any], **settings: Any) -> list[torch.Tensor]:
    plain: dict[str, Any] = {
        "global_crops_scale": (1.0, 1.0), "crop_ratio": (1.0, 1.0), "local_crops_number": 0, "global_crops_size": 20,
        "flip": 0.0, "jitter": 0.0, "global_blur": (0.0, 0.0), "solarize": 0.0, "channel_gain": 0.0,
        "channel_drop": 0.0,
    }  # fmt: skip
    return MultiCropAugmentation(channels=image.shape[2], **plain | settings)(image, seed=3)


def test_augmentation_changes_each_channel_by_itself() -> None:
    image = bands(5)[:, :20].astype(np.float32) / 65535
    own = torch.from_numpy(image).permute(2, 0, 1)
    for view in views_of(image):
        torch.testing.assert_close(view, own, rtol=0, atol=1e-6)
    assert torch.equal(views_of(image, flip=1.0)[0], views_of(image)[0].flip(2))
    torch.testing.assert_close(views_of(image, solarize=1.0)[1], torch.where(own < 0.5, own, 1 - own))
    gains = (views_of(image, channel_gain=0.2)[0].sum(dim=(1, 2)) / own.sum(dim=(1, 2))).tolist()
    assert len({round(gain, 3) for gain in gains}) == 5
    assert all(0.75 < gain < 1.2 for gain in gains)
    dropped = views_of(image, channel_drop=1.0)[0]
    assert sorted((dropped - own).abs().sum(dim=(1, 2)).gt(1).tolist()) == [False] * 4 + [True]
    assert float(dropped.sum(dim=(1, 2)).min()) == 0
    blurred = views_of(image, global_blur=(1.0, 1.0), blur_radius=(1.5, 1.5))[0]
    torch.testing.assert_close(blurred.mean(dim=(1, 2)), own.mean(dim=(1, 2)), rtol=0.1, atol=0)
    assert float(blurred.std()) < 0.9 * float(own.std())
    jittered = views_of(image, jitter=1.0, brightness=0.0, contrast=0.4)[0]
    torch.testing.assert_close(jittered.mean(dim=(1, 2)), own.mean(dim=(1, 2)), rtol=0.02, atol=0)
    assert not torch.allclose(jittered, own, atol=0.01)


def test_shared_memory_counts_the_bytes_of_all_channels() -> None:
    assert (PixelFormat().rgb_side(224), FIVE.rgb_side(224)) == (224, 579)
    assert pytest.approx(4 * 5 * 224**2, rel=0.01) == 3 * 579**2


def test_the_only_channel_is_never_dropped() -> None:
    image = bands(1)[:, :20].astype(np.float32) / 65535
    assert float(views_of(image, channel_drop=1.0)[0].sum()) > 0


def test_further_numbers_leave_the_other_parameters() -> None:
    other = MultiCropAugmentation(channels=5)
    plain = MultiCropAugmentation(saturation=0, hue=0, gray=0)
    np.testing.assert_array_equal(other.draw_rows(30, 20, 1, 2, 3)[:, :16], plain.draw_rows(30, 20, 1, 2, 3))


def test_pictures_show_three_channels() -> None:
    image = np.asarray(decode_image(npy(bands(5)), "a", FIVE))
    assert (picture_of(image, FIVE).mode, picture_of(image[..., :1], PixelFormat(1)).size) == ("RGB", (30, 20))
    for format, chosen in ((FIVE, [0, 1, 2]), (replace(FIVE, show_channels=(4, 1, 0)), [4, 1, 0])):
        found = np.asarray(picture_of(image, format)).astype(np.float32) / 255
        np.testing.assert_allclose(found, image[..., chosen] / image[..., chosen].max(), atol=1 / 255)


def test_white_level_is_measured_over_all_channels(tmp_path: Path) -> None:
    (tmp_path / "a.npy").write_bytes(npy(bands(5) >> 4))
    assert choose_white_level(open_source(str(tmp_path)), 0, channels=5) == 4095


# ---- networks


@pytest.mark.parametrize("arch", ["xcit_pico_4_p8", "vit_tiny_12_p16", "timm:resnet18"])
def test_backbones_take_any_number_of_channels(arch: str) -> None:
    backbone = build_backbone(arch, channels=13).eval()
    assert backbone(torch.randn(2, 13, 32, 32)).cls_token.isfinite().all()


def test_adapted_weights_give_equal_channels_the_same_features() -> None:
    weight, grey = torch.randn(8, 3, 3, 3), torch.randn(2, 1, 9, 9)
    for channels in (1, 5):
        found = nn.functional.conv2d(grey.repeat(1, channels, 1, 1), adapted(weight, channels))
        torch.testing.assert_close(found, nn.functional.conv2d(grey.repeat(1, 3, 1, 1), weight), rtol=1e-4, atol=1e-4)


def test_backbone_without_a_first_convolution_is_refused() -> None:
    with pytest.raises(InputError, match="the backbone's first layer is a Linear: expected --channels 3"):
        first_convolution(nn.Sequential(nn.Linear(3, 3)))


# ---- runs


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of arrays with five channels; the class decides which channel is bright."""
    folder = tmp_path_factory.mktemp("five")
    for part, count in (("train", 16), ("val", 6)):
        for number in range(count):
            label, pixels = number % 2, bands(5, seed=number) // 4
            pixels[..., label] += 40_000
            path = folder / part / f"class{label}" / f"{number}.npy"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(npy(pixels))
    return folder


def flags_of(images: Path, folder: Path) -> dict[str, Any]:
    held_out = {"knn_every": 1, "knn_holdout": 4}
    return {"data_path": str(images / "train"), "output_dir": str(folder), "channels": 5, **held_out, **SETTINGS}


@pytest.fixture(scope="module")
def run(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of five channels."""
    folder = tmp_path_factory.mktemp("run")
    pretrain(**flags_of(images, folder), show_channels=(4, 1, 0))
    return folder


def test_run_stores_channels_with_measured_mean_and_std(images: Path, run: Path) -> None:
    loaded = load_backbone(run / "checkpoint.pth")
    mean, std = measure_channels(open_source(str(images / "train")), FIVE)
    assert (loaded.transform.mean, loaded.transform.std, loaded.transform.show_channels) == (mean, std, (4, 1, 0))
    pixels = np.stack([np.load(path) for path in (images / "train").rglob("*.npy")]) / 65535
    np.testing.assert_allclose(mean, pixels.mean(axis=(0, 1, 2)), atol=1e-4)
    np.testing.assert_allclose(std, pixels.std(axis=(0, 1, 2)), atol=1e-4)
    assert first_convolution(loaded.backbone)[1].in_channels == 5
    assert (run / "report.html").exists()


def test_backbone_without_mean_and_std_is_refused(run: Path) -> None:
    with pytest.raises(InputError, match=r"backbone.pth is for images of 5 channels, but has no mean .* checkpoint"):
        load_backbone(run / "backbone.pth")


def test_constant_channels_give_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pixels = bands(5)
    pixels[..., [1, 3]] = 7
    (tmp_path / "a.npy").write_bytes(npy(pixels))
    measure_channels(open_source(str(tmp_path)), FIVE)
    assert "channel 1, 3; check --value-range and --white-level" in "".join(capsys.readouterr())


def test_recipes_leave_mean_and_std_to_be_measured(images: Path) -> None:
    flags = ["--recipe", "sample", "--data-path", str(images), "--channels", "5"]
    assert len(parse_pretrain(flags).config.mean) == 3  # not given: with_statistics measures it


def test_arrays_beside_images_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.npy").write_bytes(npy(bands(5)))
    (tmp_path / "b.png").write_bytes(png(bands(1)[..., 0]))
    assert len(open_source(str(tmp_path))) == 1
    assert "skipped 1 .npy" in "".join(capsys.readouterr())


def test_arrays_of_another_type_are_not_embedded(images: Path, run: Path, tmp_path: Path) -> None:
    loaded, pixels = load_backbone(run / "checkpoint.pth"), np.load(images / "val" / "class0" / "0.npy")
    np.testing.assert_array_equal(loaded.embed([pixels.astype(">u2")]), loaded.embed([pixels]))
    with pytest.raises(UndecodableImage, match=r"images\[0\] cannot be read: its pixels have the shape \(20, 30, 4\)"):
        loaded.embed([pixels[..., :4]])
    with pytest.raises(UndecodableImage, match=r"its pixels are uint16 of the shape \(20, 30, 5\), expected uint8"):
        decode(pixels, "a")


@pytest.mark.process
def test_two_ranks_train_with_the_same_mean_and_std(images: Path, run: Path, tmp_path: Path) -> None:
    settings = flags_of(images, tmp_path / "run") | {"batch_size_per_gpu": 4, "epochs": 1, "white_level": "auto"}
    on_two_ranks(run_pretrain, tmp_path, *(f"--{name}={value}" for name, value in settings.items()))
    one, two = (load_backbone(folder / "checkpoint.pth").transform for folder in (run, tmp_path / "run"))
    assert two == replace(one, show_channels=())


def test_given_mean_is_kept_and_std_is_measured(images: Path) -> None:
    source, config = open_source(str(images / "train")), PretrainConfig(channels=5, mean=(0.5,) * 5)
    found = with_statistics(config, source, {})
    assert (found.mean, len(found.std)) == ((0.5,) * 5, 5)
    assert with_statistics(config, source, {"std": [0.25] * 5}).std == (0.25,) * 5, "a resumed run's"


def test_interrupted_run_resumes_bit_for_bit(images: Path, run: Path, tmp_path: Path) -> None:
    pretrain(**flags_of(images, tmp_path), max_steps=3)
    pretrain(**flags_of(images, tmp_path))
    hashes = [load_backbone(folder / "checkpoint.pth").hash for folder in (run, tmp_path)]
    assert hashes[0] == hashes[1]


def test_evaluators_follow_the_checkpoint(images: Path, run: Path, tmp_path: Path, here: Here) -> None:
    weights = ["--weights", run / "checkpoint.pth", "--device", "cpu", "--num-workers", "0"]
    data = ["--data-path", images]
    assert here(run_knn, *weights, *data, "--no-cache", "--ks", "3", "--baselines").code == 0
    for how in (["--no-cache", "--features", "cls", "last2"], ["--cached"]):
        out = ["--epochs", "1", "--batch-size-per-gpu", "8", "--output-dir", tmp_path / how[0]]
        assert here(run_linear, *weights, *data, *how, *out).code == 0
    vectors, query, found = tmp_path / "vectors", images / "val" / "class0" / "0.npy", tmp_path / "query.json"
    assert here(run_extract, *weights, "--data-path", images / "val", "--output-dir", vectors).code == 0
    assert here(run_extract, "--index", vectors, "--query", query, "--device", "cpu", "--json", found).code == 0
    first = json.loads(found.read_text())["results"][0]
    assert first["path"].endswith("class0/0.npy")
    assert first["score"] == pytest.approx(1, abs=1e-4)
    loaded = load_backbone(run / "checkpoint.pth")
    by_file, by_array = loaded.embed([query]), loaded.embed(np.load(query))
    assert by_file.shape == (1, 64)
    np.testing.assert_array_equal(by_file, by_array)


def test_packed_images_of_five_channels_are_the_same(images: Path, tmp_path: Path) -> None:
    broken = tmp_path / "in" / "b.npy"
    broken.parent.mkdir()
    broken.write_bytes(npy(bands(2)))
    (tmp_path / "in" / "a.npy").write_bytes(npy(bands(5)))
    assert pack.main([str(tmp_path / "in"), str(tmp_path / "out"), "--channels", "5", "--workers", "0"]) == 0
    packed = open_source(f"tar:{tmp_path}/out/shard-*.tar")
    assert [packed.read(0)[0], len(packed)] == [npy(bands(5)), 1]
    assert "expected 5 channels" in (tmp_path / "out" / "unreadable.jsonl").read_text()
    with pytest.raises(InputError, match="max_side is 64, which has no effect with 5 channels"):
        pack.main([str(images), str(tmp_path / "small"), "--channels", "5", "--max-side", "64"])


def test_data_check_prints_mean_and_std_of_each_channel(
    images: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "two.npy").write_bytes(npy(bands(2)))
    assert check.main([str(images), "--part", "train", "--channels", "5", "--workers", "0"]) == 0
    transform, found = load_backbone(run / "checkpoint.pth").transform, capsys.readouterr().out
    for name, values in (("mean", transform.mean), ("std", transform.std)):
        numbers = " ".join(map("{:.4f}".format, values))
        assert f"{name} of each channel on a sample, from 0 (black) to 1 (white): {numbers}" in found
    assert "16 NPY; " in found
    assert check.main([str(tmp_path), "--channels", "5", "--workers", "0"]) == 1
    assert "(20, 30, 2), expected 5 channels" in capsys.readouterr().out


@pytest.mark.parametrize("target", ["safetensors", "torch-export"])
def test_exports_follow_the_checkpoint(target: str, images: Path, run: Path, tmp_path: Path) -> None:
    out = tmp_path / {"safetensors": "five.safetensors", "torch-export": "five.pt2"}[target]
    export.main(["--weights", str(run / "checkpoint.pth"), "--to", target, "--out", str(out)])
    own = ["--images", str(images), "--overwrite"]
    export.main(["--weights", str(run / "checkpoint.pth"), "--to", target, "--out", str(out), *own])
    loaded, query = load_backbone(run / "checkpoint.pth"), images / "val" / "class0" / "0.npy"
    if target == "safetensors":
        again = load_backbone(out)
        assert (again.transform, again.hash) == (loaded.transform, loaded.hash)
        torch.testing.assert_close(again.embed([query]), loaded.embed([query]))
    with pytest.raises(InputError, match="is for images of 5 channels, which timm's transforms cannot read"):
        export.main(["--weights", str(run / "checkpoint.pth"), "--to", "timm", "--out", str(tmp_path / "timm")])


@pytest.mark.parametrize("kind", ["attention", "pca"])
def test_attention_and_pca_follow_the_checkpoint(kind: str, images: Path, run: Path, tmp_path: Path) -> None:
    out = tmp_path / "picture.png"
    flags = ["--weights", str(run / "checkpoint.pth"), "--size", "32", "--device", "cpu", "--out", str(out)]
    viz.main([kind, str(images / "val"), *flags])
    with Image.open(out) as sheet:
        assert sheet.width > 2 * viz.CELL


def to_five_channels(folder: Path) -> None:
    """Replace image files below a folder by arrays of five channels: red, green, blue, red, green."""
    for path in sorted([*folder.rglob("*.png"), *folder.rglob("*.jpg")]):
        path.with_suffix(".npy").write_bytes(npy(np.asarray(Image.open(path))[..., [0, 1, 2, 0, 1]]))
        path.unlink()


def test_finetuning_follows_the_checkpoint(images: Path, run: Path, tmp_path: Path, here: Here) -> None:
    flags = ["--weights", run / "checkpoint.pth", "--device", "cpu", "--num-workers", "0", "--output-dir", tmp_path]
    small = ["--batch-size-per-gpu", "8", "--epochs", "1", "--warmup-epochs", "0"]
    done = here(run_finetune, *flags, *small, "--data-path", images)
    assert done.code == 0, done.err
    assert first_convolution(load_backbone(tmp_path / "checkpoint.pth").backbone)[1].in_channels == 5


def test_segmentation_follows_the_checkpoint(run: Path, tmp_path: Path, here: Here) -> None:
    data, out = shapes(tmp_path / "data", train=4, val=2, side=48), tmp_path / "out"
    to_five_channels(data / "images")
    flags = ["--weights", run / "checkpoint.pth", "--device", "cpu", "--num-workers", "0", "--output-dir", out]
    small = ["--recipe", "own-data", "--short-side", 48, "--crop-size", 48, "--batch-size-per-gpu", 4, "--epochs", 1]
    done = here(run_segment, *flags, *small, "--head-width", 8, "--fpn-width", 8, "--data-path", data)
    assert done.code == 0, done.err
    done = here(run_segment, "--predict", data / "images" / "val", "--weights", out / "checkpoint.pth", *flags[2:4])
    assert done.code == 0, done.err
    assert len(list((out / "predictions" / "masks").iterdir())) == 2


def test_detection_follows_the_checkpoint(run: Path, tmp_path: Path, here: Here) -> None:
    coco, out = make_coco(tmp_path / "coco"), tmp_path / "out"
    to_five_channels(coco)
    for file in (coco / "annotations").iterdir():
        file.write_text(file.read_text().replace(".png", ".npy"))
    weights = ["--weights", run / "checkpoint.pth", "--arch", ""]
    done = here(run_detect, *TINY, *weights, "--data-path", coco, "--output-dir", out, "--max-steps", "1")
    assert done.code == 0, done.err
    done = here(run_detect, "--predict", coco / "val2017", "--weights", out / "checkpoint.pth", "--device", "cpu")
    assert done.code == 0, done.err
    assert (out / "predictions" / "detections.png").exists()


def test_benchmarks_of_rgb_images_refuse_the_checkpoint(images: Path, run: Path, here: Here) -> None:
    words = "is for images of 5 channels, but only RGB images are supported here: give weights for 3 channels"
    flags = ["--weights", run / "checkpoint.pth", "--data-path", images, "--device", "cpu"]
    here(run_retrieval, "folder", *flags).assert_refused(words)


def test_16_bit_grey_images_train_resume_bit_for_bit_and_are_measured(tmp_path: Path, here: Here) -> None:
    for part, count in (("train", 16), ("val", 6)):
        for number in range(count):
            path = tmp_path / "grey" / part / f"class{number % 2}" / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(png(bands(1, seed=number)[..., 0] >> (number % 2)))
    whole, parts = (flags_of(tmp_path / "grey", tmp_path / name) | {"channels": 1} for name in ("whole", "parts"))
    pretrain(**whole)
    pretrain(**parts, max_steps=3)
    pretrain(**parts)
    one, other = (load_backbone(tmp_path / name / "checkpoint.pth") for name in ("whole", "parts"))
    assert one.hash == other.hash
    flags = ["--weights", one.path, "--data-path", tmp_path / "grey", "--device", "cpu", "--num-workers", "0"]
    assert here(run_knn, *flags, "--no-cache", "--ks", "3", "--json", tmp_path / "knn.json").code == 0
    assert json.loads((tmp_path / "knn.json").read_text())["results"][0]["top1"] > 50


def test_16_bit_grey_images_train_from_weights_for_rgb(tmp_path: Path, images: Path) -> None:
    rgb = tmp_path / "rgb"
    for number in range(8):
        path = tmp_path / "grey" / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(png(bands(1, seed=number)[..., 0]))
    settings = SETTINGS | {"epochs": 1, "report_pictures": False}
    pretrain(data_path=str(tmp_path / "grey"), output_dir=str(rgb), **settings)
    weights = str(rgb / "checkpoint.pth")
    out = tmp_path / "out"
    pretrain(data_path=str(tmp_path / "grey"), output_dir=str(out), channels=1, init_weights=weights, **settings)
    loaded = load_backbone(out / "checkpoint.pth")
    assert first_convolution(loaded.backbone)[1].in_channels == len(loaded.transform.mean) == 1


def test_float_images_of_two_channels_train_in_workers(tmp_path: Path) -> None:
    for number in range(8):
        path = tmp_path / "images" / f"{number}.npy"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(npy(bands(2, seed=number).astype(np.float32) / 30_000))
    settings = SETTINGS | {"epochs": 1, "num_workers": 1, "channel_gain": 0.0, "value_range": (0.0, 2.0)}
    out = str(tmp_path / "run")
    pretrain(data_path=str(tmp_path / "images"), output_dir=out, channels=2, **settings)
    transform = load_backbone(f"{out}/checkpoint.pth").transform
    assert (transform.value_range, len(transform.mean)) == ((0.0, 2.0), 2)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"mean": (0.5, 0.5)}, "mean has 2 numbers, but channels is 5: give as many"),
        ({"channels": 3, "value_range": (0.0, 1.0)}, "value_range is 0 1, which has no effect with 3 channels"),
        ({"show_channels": (0, 1, 5)}, "show_channels is 0 1 5, expected three numbers from 0 to 4"),
        ({"value_range": (1.0, 0.0)}, "value_range is 1 0, expected the values of black and white: 0 1"),
        ({"augment_device": "cuda"}, "channels is 5, but augment_device cuda is for 3 channels: expected cpu"),
        ({"channels": 1, "channel_drop": 0.5}, "channel_drop is 0.5, which has no effect with one channel"),
        ({"channel_drop": 2.0}, "channel_drop is 2.0, expected a probability"),
    ],
)
def test_invalid_settings_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        PretrainConfig(**{"channels": 5, **settings})
