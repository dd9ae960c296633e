"""Networks for images of other than three channels."""

from __future__ import annotations

from torch import Tensor, nn

from dino_xcit.errors import InputError


def first_convolution(backbone: nn.Module) -> tuple[str, nn.Conv2d]:
    """Return the name and the module of the convolution that reads the image.

    Raises:
        InputError: the first layer is no convolution.
    """
    layers = ((name, one) for name, one in backbone.named_modules() if not list(one.children()))
    name, first = next(layers)
    if not isinstance(first, nn.Conv2d) or first.groups != 1:
        raise InputError(f"the backbone's first layer is a {type(first).__name__}: expected --channels 3")
    return name, first


def set_channels(backbone: nn.Module, channels: int) -> None:
    """Replace the first convolution, for three channels, by one with random weights for ``channels``."""
    name, old = first_convolution(backbone)
    parent, _, child = name.rpartition(".")
    new = nn.Conv2d(
        channels, old.out_channels, old.kernel_size, old.stride, old.padding, old.dilation,  # type: ignore[arg-type]
        bias=old.bias is not None, padding_mode=old.padding_mode, device=old.weight.device, dtype=old.weight.dtype,
    )  # fmt: skip
    setattr(backbone.get_submodule(parent), child, new)


def adapted(weight: Tensor, channels: int) -> Tensor:
    """Adapt the first convolution's weight [D, C, h, w] to ``channels``.

    Each gets the mean over the C, scaled by C / channels, so that an image whose channels are equal has the same
    features.
    """
    return weight.mean(dim=1, keepdim=True).mul(weight.shape[1] / channels).repeat(1, channels, 1, 1)
