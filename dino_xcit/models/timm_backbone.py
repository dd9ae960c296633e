"""timm models as backbones (``timm:NAME``). B batch, N tokens, D features."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import timm
from timm.layers.patch_embed import PatchEmbed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from dino_xcit.errors import InputError, near_matches, one_line
from dino_xcit.models.output import BackboneOutput


def build_timm(name: str, drop_path_rate: float = 0.0) -> TimmBackbone:
    """Build a timm model with random weights and no classifier; a tag in the name (``resnet50.a1_in1k``) is ignored.

    Raises:
        InputError: timm has no such model, or the model has no stochastic depth but ``drop_path_rate`` is not 0.
    """
    if not timm.is_model(name):
        known = timm.list_models()
        raise InputError(
            f"timm has no model named {name!r}{near_matches(name, known)} (timm {timm.__version__}; "
            "timm.list_models() prints all)"
        )
    # Transformers must interpolate their position embeddings for several crop sizes. Not all models accept these
    # options.
    drop_path: dict[str, Any] = {"drop_path_rate": drop_path_rate}
    for options in (drop_path | {"dynamic_img_size": True}, drop_path):
        with contextlib.suppress(TypeError):
            return TimmBackbone(timm.create_model(name, num_classes=0, **options))
    if drop_path_rate:
        raise InputError(f"backbone timm:{name} has no stochastic depth: give --drop-path-rate 0")
    return TimmBackbone(timm.create_model(name, num_classes=0))


class TimmBackbone(nn.Module):
    """A timm model without its classifier.

    ``cls_token`` is the input of the model's classifier (class token or pooled map); ``patch_tokens`` are its last
    features without prefix tokens. A timm XCiT normalises and doubles its patch tokens in class attention; use
    ``layers=[-1]`` for those of the last XCA block.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = model
        self.map_dim = int(model.num_features)  # type: ignore[arg-type]
        """Width of the patch tokens."""
        # Some convolutional networks widen the pooled map before their classifier.
        self.embed_dim: int = getattr(self.model, "head_hidden_size", self.map_dim)

    def forward(
        self, images: Tensor, layers: Sequence[int] = (), drop_path_keys: Tensor | None = None
    ) -> BackboneOutput:
        """See :meth:`dino_xcit.models.xcit.XCiT.forward`; ``drop_path_keys`` is ignored: timm draws its own masks.

        Plain transformers ignore incomplete patches, see :func:`whole_patches`.

        Raises:
            InputError: the model does not support this image size.
        """
        with _explaining_size(images):
            return self._features(self._fitted(images), layers)

    def maps(self, images: Tensor, layers: Sequence[int]) -> list[Tensor]:
        """Return the maps [B, D, h, w] of ``layers``, indices of timm's ``feature_info``, without the final norm.

        Raises:
            InputError: the model does not support this image size.
        """
        options: dict[str, Any] = {"norm": False, "output_fmt": "NCHW", "intermediates_only": True}
        with _explaining_size(images):
            found = self.model.forward_intermediates(self._fitted(images), indices=sorted(set(layers)), **options)
        by_layer = dict(zip(sorted(set(layers)), found, strict=True))
        return [by_layer[layer] for layer in layers]

    def _fitted(self, images: Tensor) -> Tensor:
        embed = getattr(self.model, "patch_embed", None)
        # These are the cases in which timm's embedding rejects incomplete patches.
        if isinstance(embed, PatchEmbed) and not embed.strict_img_size and not embed.dynamic_img_pad:
            return whole_patches(images, embed.patch_size)
        return images

    def _features(self, images: Tensor, layers: Sequence[int]) -> BackboneOutput:
        if not layers:
            return self._output(self.model.forward_features(images), images)
        depth = len(getattr(self.model, "feature_info", ()))
        indices = [index % depth if depth else index for index in layers]
        has_class_token = isinstance(self.model, VisionTransformer) and self.model.has_class_token
        options: dict[str, Any] = {"indices": indices, "norm": False, "output_fmt": "NCHW"}
        options |= {"return_prefix_tokens": True} if has_class_token else {}
        features, maps = self.model.forward_intermediates(images, **options)
        output = self._output(features, images)
        places = [sorted(set(indices)).index(index) for index in indices]  # timm returns sorted unique layers
        if has_class_token:
            maps, prefixes = zip(*maps, strict=True)
            output.layer_cls = tuple(self.model.norm(prefixes[place][:, 0]) for place in places)
        output.layers = tuple(maps[place].flatten(2).transpose(1, 2) for place in places)
        return output

    def _output(self, features: Tensor, images: Tensor) -> BackboneOutput:
        return BackboneOutput(self.model.forward_head(features, pre_logits=True), *self._patches(features, images))

    def _patches(self, features: Tensor, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        if features.ndim == 4:
            if features.shape[1] != self.map_dim:  # some hierarchical transformers keep [B, h, w, D]
                features = features.permute(0, 3, 1, 2)
            grid = (features.shape[2], features.shape[3])
            return features.flatten(2).transpose(1, 2), grid
        prefix = getattr(self.model, "num_prefix_tokens", 1 if hasattr(self.model, "cls_token") else 0)
        patches = features[:, prefix:]
        tokens = patches.shape[1]
        aspect = images.shape[2] / images.shape[3]
        height = max(1, round((tokens * aspect) ** 0.5))
        while tokens % height:
            height -= 1
        return patches, (height, tokens // height)


@contextlib.contextmanager
def _explaining_size(images: Tensor) -> Iterator[None]:
    try:
        yield
    except AssertionError as error:  # timm asserts supported sizes
        raise InputError(
            f"this model cannot take images of {images.shape[2]} x {images.shape[3]} pixels ({one_line(error)}): "
            "choose another --eval-crop (run_retrieval.py: --fit centre, or --fit square with --image-size), or "
            "other crop sizes when training"
        ) from error


def whole_patches(images: Tensor, patch: Sequence[int]) -> Tensor:
    """Crop the rows and columns of incomplete patches.

    The patch embedding of DINO's transformers (a convolution whose stride is its kernel size) ignores them; timm's
    raises.

    Args:
        images: [B, 3, height, width], normalised.
        patch: height and width of a patch.

    Returns:
        [B, 3, h, w], multiples of the patch size. A side below one patch is padded with zeros (the mean colour).
    """
    height, width = images.shape[2:]
    if height % patch[0] == 0 and width % patch[1] == 0:
        return images
    rows, columns = (max(1, side // of) * of for side, of in zip((height, width), patch, strict=True))
    return F.pad(images, (0, columns - width, 0, rows - height))  # negative padding crops
