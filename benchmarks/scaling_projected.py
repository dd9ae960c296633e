"""What more GPUs would give, from operations and bytes: arithmetic, no measurement on a GPU.

Counted here, by running each network on tensors without memory (FakeTensorMode): multiplications, parameters, bytes
that the forward pass keeps for the backward pass. Assumed: the constants below. B batch, K prototypes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from dino_xcit.models import DINOHead, ViewNetwork, build_backbone
from dino_xcit.models.xca import XCA

PEAK = 989e12
"""FLOP/s of an H100 SXM in bfloat16, dense: NVIDIA's data sheet."""
NVLINK = 450e9
"""Bytes a second that a ring over the GPUs of one H100 machine moves through each of them (NVLink 4, one direction)."""
BETWEEN_MACHINES = 8 * 400e9 / 8
"""Bytes a second between machines: 8 cards of 400 Gbit/s, one a GPU."""
LATENCY = 30e-6
"""Seconds that a message takes however short it is."""
BATCH = 64
"""Images a GPU and step."""
IMAGENET = 1_281_167
JPEG_BYTES = 110e3
ALL_WORK_MS, WORKERS_SHARE_MS = 3.84, 2.63
"""A core's milliseconds an image: all of the augmentation, and what is left where the GPU finishes it (results.md)."""
GLOBALS, LOCALS = (2, 224), (8, 96)


@dataclass(frozen=True)
class Counted:
    """One network."""

    arch: str
    forward_gmac: float
    """Of the backbone, one image of 224 pixels: 1e9 multiplications."""
    gflop_an_image: float
    """Of a whole step: teacher on 2 x 224, student on 2 x 224 + 8 x 96 three times (the backward pass is two)."""
    backward_share: float
    """Of those operations."""
    trained: int
    """Parameters whose gradients are exchanged."""
    all_parameters: int
    """Of one of the two networks."""
    kept_a_token: float
    """Bytes of activations under bfloat16 autocast, a token of the student."""
    tokens_an_image: int
    """In all of the student's views."""
    batch_norms: int

    @property
    def sync_messages(self) -> int:
        """BatchNorm's in a pass: a layer's statistics for both sizes there and back, and the teacher's globals."""
        return 5 * self.batch_norms


def count(arch: str, out_dim: int = 65536) -> Counted:
    """All of it without a single multiplication."""
    with torch.device("meta"):
        backbone = build_backbone(arch, drop_path_rate=0.0)
        net = ViewNetwork(backbone, DINOHead(int(backbone.embed_dim), out_dim))  # type: ignore[arg-type]
    for part in net.modules():
        if isinstance(part, XCA):
            part.path = "direct"  # the paper's operations, whatever is faster here
    batch_norms = sum(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in net.modules())
    fake = FakeTensorMode()
    net.to_empty(device="cpu")._apply(fake.from_tensor)
    patch = int(arch.rpartition("p")[2])
    with fake:

        def images(count: int, size: int) -> torch.Tensor:
            return torch.empty(count, 3, size, size)

        student = flops(lambda: net([images(*GLOBALS), images(*LOCALS)]))
        teacher = flops(lambda: net([images(*GLOBALS)]))
        one = flops(lambda: net.backbone(images(1, 224)))
        # Weights that autocast has converted are kept too: the slope between two sizes leaves them out.
        kept = {size: bytes_kept(net, images(1, size)) for size in (192, 384)}
    tokens = {size: (size // patch) ** 2 for size in (*kept, GLOBALS[1], LOCALS[1])}
    parameters = list(net.parameters())
    # The counter takes a depthwise convolution's backward pass for a full one's: two forward passes instead.
    return Counted(
        arch=arch,
        forward_gmac=one / 2e9,
        gflop_an_image=(3 * student + teacher) / 1e9,
        backward_share=2 * student / (3 * student + teacher),
        trained=sum(p.numel() for p in parameters if p.requires_grad),
        all_parameters=sum(p.numel() for p in parameters),
        kept_a_token=(kept[384] - kept[192]) / (tokens[384] - tokens[192]),
        tokens_an_image=sum(number * tokens[size] for number, size in (GLOBALS, LOCALS)),
        batch_norms=batch_norms,
    )


def flops(run: Callable[[], object]) -> int:
    """Operations, two a multiplication, as PyTorch's own counter has them."""
    with FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops())


def bytes_kept(net: ViewNetwork, images: torch.Tensor) -> int:
    """What the backbone's forward pass keeps for the backward pass, parameters not counted, under bfloat16 autocast."""
    own = {parameter.untyped_storage()._cdata for parameter in net.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autocast("cpu", torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        net.backbone(images)
        return sum(tensor.untyped_storage().nbytes() for key, tensor in kept.items() if key not in own)


def ring_seconds(message: float, ranks: int, bandwidth: float) -> float:
    """An all-reduce of ``message`` bytes: each rank sends and receives 2 (n - 1) / n of them."""
    return LATENCY + 2 * (ranks - 1) / ranks * message / bandwidth


def exposed_seconds(
    buckets: Sequence[tuple[float, float]], backward: float, ranks: int, bandwidth: float, own_bytes: float
) -> float:
    """What of the exchange outlasts the backward pass.

    Args:
        buckets: (share of the backward pass after which it starts, bytes), in the order of starting; one after another.
        backward: seconds.
        own_bytes: of the one further message after it.
    """
    free = 0.0
    for share, size in buckets:
        free = max(free, share * backward) + ring_seconds(size, ranks, bandwidth)
    return max(0.0, free - backward) + ring_seconds(own_bytes, ranks, bandwidth)


def scaled_buckets(
    shares: Sequence[tuple[float, float]], trained: int, out_dim: int = 65536
) -> list[tuple[float, float]]:
    """The buckets measured for one network, for another: the prototypes as they are, the rest in proportion."""
    prototypes = 4.0 * 256 * out_dim
    (first, _), *rest = shares
    total = sum(size for _, size in rest)
    return [(first, prototypes), *((share, size * (4 * trained - prototypes) / total) for share, size in rest)]


@dataclass(frozen=True)
class Projected:
    """One network at one utilisation on so many GPUs."""

    images_a_second: float
    step_ms: float
    all_reduce_ms: float
    """Of the gradients, whether hidden or not."""
    exposed_ms: float
    """What of it, and of the one other message, outlasts the backward pass."""
    sync_ms: float
    """BatchNorm's messages, which everything waits for."""
    efficiency: float

    @classmethod
    def of(
        cls,
        counted: Counted,
        utilisation: float,
        ranks: int,
        buckets: Sequence[tuple[float, float]],
        bandwidth: float | None = None,
        passes: int = 1,
        out_dim: int = 65536,
    ) -> Projected:
        """``passes`` forward passes a step; the exchange overlaps with the last one's backward pass."""
        bandwidth = bandwidth or (NVLINK if ranks <= 8 else BETWEEN_MACHINES)
        one_pass = BATCH * counted.gflop_an_image * 1e9 / (utilisation * PEAK)
        backward = counted.backward_share * one_pass
        exposed = exposed_seconds(buckets, backward, ranks, bandwidth, 4.0 * out_dim) if ranks > 1 else 0.0
        sync = passes * counted.sync_messages * LATENCY if ranks > 1 else 0.0
        step = passes * one_pass + exposed + sync
        return cls(
            images_a_second=ranks * passes * BATCH / step,
            step_ms=1e3 * step,
            all_reduce_ms=1e3 * sum(ring_seconds(size, ranks, bandwidth) for _, size in buckets) if ranks > 1 else 0.0,
            exposed_ms=1e3 * exposed,
            sync_ms=1e3 * sync,
            efficiency=passes * one_pass / step,
        )
