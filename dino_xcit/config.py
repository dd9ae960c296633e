"""Settings of training runs, with defaults, bounds and help texts.

Names follow DINO. Values are checked on construction, so an invalid run fails before it starts.
Modules that need PyTorch are imported lazily: commands parse their flags without it.
"""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Gt, Le, Lt

from dino_xcit.bounds import FilePath, Group, Seed, ZeroIsAuto, check_bounds, marked, refuse_changed, shown
from dino_xcit.errors import InputError
from dino_xcit.transform import IMAGENET_MEAN, IMAGENET_STD, WHITE, EvalTransform, PixelFormat

if TYPE_CHECKING:
    from dino_xcit.augment import MultiCropAugmentation


class ResumeSafe:
    """Marks a setting that may change on resume because it does not affect the result of training.

    For batch_size_per_gpu and accumulation_steps only the product with the number of ranks matters, unless the method
    compares the images of one forward pass, as Sinkhorn-Knopp and KoLeo do.
    """


class StateField:
    """Marks a setting that determines the tensors of a checkpoint: a run never resumes with another value."""


@dataclass(frozen=True)
class TrainConfig:
    """Settings of any training run."""

    weights_flag: ClassVar[str] = "--init-weights"
    """The flag for initial weights, for messages."""
    labelfree_metric: ClassVar[str] = ""
    """Evaluator metric without labels that selects best-labelfree.pth; higher is better."""
    recipe: Annotated[str, ResumeSafe, Group("data")] = ""
    """Named set of settings."""
    data_path: str = ""
    """Training data."""
    epochs: Annotated[int, Ge(1), Group("optimisation")] = 100
    """Number of epochs."""
    batch_size_per_gpu: Annotated[int, Ge(1), ResumeSafe] = 64
    """Images per forward pass and rank."""
    accumulation_steps: Annotated[int, Ge(1), ResumeSafe] = 1
    """Forward passes per step: the global batch is batch_size_per_gpu * ranks * accumulation_steps."""
    optimizer: Annotated[Literal["adamw", "sgd", "lars"], StateField] = "adamw"
    """Optimizer."""
    lr: Annotated[float, Ge(0)] = 0.0005
    """Peak learning rate for a global batch of lr_reference_batch images; scaled linearly with the global batch."""
    lr_reference_batch: Annotated[int, Ge(0)] = 256
    """Global batch size to which lr refers; 0: do not scale lr."""
    min_lr: Annotated[float, Ge(0)] = 1e-6
    """Learning rate at the end of the run."""
    warmup_epochs: Annotated[float, Ge(0)] = 10.0
    """Epochs of linear learning-rate warm-up; shortened with a warning if it covers the whole run."""
    warmup_start_lr: Annotated[float, Ge(0)] = 0.0
    """Learning rate of the first step."""
    weight_decay: Annotated[float, Ge(0)] = 0.04
    """Weight decay of the first step."""
    clip_grad: Annotated[float, Ge(0)] = 3.0
    """Maximum gradient norm; 0: no clipping."""
    clip_mode: Literal["per-parameter", "global"] = "per-parameter"
    """What clip_grad limits: the norm of each parameter's gradient (as in DINO), or the global norm of all
    gradients."""
    seed: Annotated[Seed, Group("machine")] = 0
    """Seed of the weights, the order of the images, the crops and drop-path."""
    device: Annotated[Literal["auto", "cpu", "cuda"], ResumeSafe] = "auto"
    """Device for training; auto: a GPU if available."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Precision of the networks; auto: bf16 on a GPU that supports it, fp16 on other GPUs, fp32 on a CPU. DINO's flag
    --use_fp16 true|false selects fp16 or fp32 and must not contradict --precision."""
    activation_checkpointing: Annotated[Literal["off", "on", "auto"], ResumeSafe] = "off"
    """Recompute the stem and the XCA (cross-covariance attention) blocks in the backward pass: less memory, more time,
    the same result (bit for bit with deterministic kernels, as on the CPU). auto (pretraining): only as many blocks as
    the measured memory requires. Only for this project's XCiT."""
    kernels: Annotated[Literal["auto", "eager", "compile", "fused"], ResumeSafe] = "auto"
    """How XCiT's blocks run in training. eager: PyTorch's operators. fused: Triton kernels, on a GPU. compile:
    torch.compile, whose first step takes minutes; later runs use its cache. auto: for pretraining on a GPU, the fastest
    whose gradients agree with eager's, measured on your GPU before the run; otherwise eager. Only for this project's
    XCiT. We have timed none of them on a GPU yet."""
    deterministic: Annotated[bool, ResumeSafe] = False
    """Use deterministic kernels only; slower on a GPU."""
    num_workers: Annotated[int, Ge(-1), ResumeSafe] = -1
    """Loader workers per rank; -1: the available cores per rank, at most 10 (20 with a GPU)."""
    hang_timeout: Annotated[float, Ge(1), ResumeSafe] = 600.0
    """Seconds that one phase may take without progress before the run ends with code 4. Set it above the longest
    phase, such as the k-NN search."""
    max_unreadable: Annotated[float, Ge(0), Le(1), ResumeSafe] = 0.05
    """Maximum share of unreadable images, which are replaced by others; the run ends if it is exceeded."""
    output_dir: Annotated[FilePath, ResumeSafe, Group("checkpoints")] = ""
    """Directory for checkpoints, metrics and report. Default: runs/RECIPE-ARCH."""
    resume: Annotated[Literal["auto", "changed", "never"], ResumeSafe] = "auto"
    """auto: resume if output_dir contains this run, fail if it contains another; changed: resume with changed settings;
    never: start from scratch and overwrite."""
    saveckp_freq: Annotated[int, Ge(0), ResumeSafe] = 20
    """Epochs between checkpoints that are kept permanently (one is written every epoch); 0: none."""
    save_every: Annotated[int, Ge(0), ResumeSafe] = 0
    """Steps between additional checkpoints within an epoch; 0: save at epoch ends only."""
    keep_last: Annotated[int, Ge(1), ResumeSafe] = 2
    """Number of newest checkpoints to keep, besides the best ones. Keep at least 2: resuming falls back to an
    older checkpoint if the newest is damaged."""
    max_failed_saves: Annotated[int, Ge(1), ResumeSafe] = 3
    """Number of consecutive failed saves (such as on a full disk) that ends the run."""
    max_skipped_steps: Annotated[int, Ge(1), ResumeSafe] = 30
    """Number of consecutive skipped steps (not finite, weights unchanged) that ends the run with code 3. fp16 skips a
    few steps at the start, until its loss scale settles."""
    max_steps: Annotated[int, Ge(0), ResumeSafe] = 0
    """Number of steps after which the run saves and stops; 0: stop after the last epoch. Does not change schedules."""
    log_every: Annotated[int, Ge(1), ResumeSafe] = 10
    """Steps between logged metrics; only logged steps synchronise with the device."""
    quiet: Annotated[bool, ResumeSafe] = False
    """Print warnings and errors only."""
    wandb: Annotated[str, ResumeSafe] = ""
    """Weights & Biases project to log the metrics to; empty: none. Needs pip install 'dino-xcit[wandb]', and wandb
    login or WANDB_MODE=offline."""
    best_metric: Annotated[str, ResumeSafe, Group("evaluation")] = ""
    """Evaluator metric that selects best.pth; higher is better."""


@dataclass(frozen=True)
class PretrainConfig(TrainConfig):
    """Pretrain an image encoder. Precedence of settings: flags, --config FILE.yaml, the recipe, these defaults.

    With your own images, recipe auto replaces some of these defaults; the run prints them.
    """

    labelfree_metric = "rankme"
    recipe: Annotated[str, ResumeSafe, Group("data")] = ""
    """Named set of settings: auto (dino, adapted to the number and the size of the images), dino (the defaults of
    facebookresearch/dino), xcit-dino-300ep (closest to the published XCiT models), sample (the embedded images of
    Fashion-MNIST), sample-long (all of Fashion-MNIST), scenes (its objects on textures). Default: sample without
    --data-path, else auto."""
    data_path: str = ""
    """Training images: a folder (with or without class sub-folders), a .txt list of paths, tar:PATTERN (WebDataset),
    parquet:PATTERN, hf:NAME_OR_DIR (Hugging Face datasets), imagenet:DIR (as downloaded), sample:fashion-mnist,
    sample:fashion-mnist-full, sample:scenes or torchvision:NAME; see docs/data.md. Training does not use labels."""
    arch: Annotated[str, StateField, Group("model")] = "xcit_small_12_p16"
    """Backbone: an official XCiT name (xcit_nano_12_p16 ... xcit_large_24_p8, also _p4), xcit_pico_4_p4 or
    xcit_micro_4_p16 for small images, a ViT such as vit_small_12_p16, or timm:NAME."""
    init_weights: FilePath = ""
    """Initial weights of student and teacher: any file that run_knn.py reads, hf-hub:ORG/NAME or timm:NAME; see
    docs/checkpoints.md. Heads are loaded if their shapes match; optimizer and epoch are not. Ignored on resume."""
    init_network: Literal["teacher", "student"] = "teacher"
    """Network to load from init_weights, for files that contain both."""
    allow_missing: tuple[str, ...] = ()
    """Backbone keys that may be missing from init_weights, by name or as PREFIX*; they keep their random weights."""
    allow_unexpected: tuple[str, ...] = ()
    """Keys of init_weights that may be missing from the backbone, by name or as PREFIX*; they are ignored."""
    drop_path_rate: Annotated[float, Ge(0), Lt(1)] = 0.1
    """Stochastic depth rate of the student."""
    method: Annotated[str, StateField, Group("method")] = "dino"
    """Training method: dino, simdino, or one registered with dino_xcit.methods.register_method."""
    out_dim: Annotated[int, Ge(2), StateField] = 65536
    """Number of prototypes K of the DINO head; not used by simdino."""
    norm_last_layer: Annotated[bool, StateField] = True
    """Fix the norm of the prototypes at 1. True is more stable; False gives better features for small models."""
    use_bn_in_head: Annotated[bool, StateField] = False
    """Use BatchNorm in the hidden layers of the head."""
    head_hidden_dim: Annotated[int, Ge(1), StateField] = 2048
    """Width of the head's two hidden layers."""
    head_bottleneck_dim: Annotated[int, Ge(1), StateField] = 256
    """Width of the head's output before the prototypes."""
    momentum_teacher: Annotated[float, Ge(0), Le(1)] = 0.996
    """EMA momentum of the teacher, increased to 1 with a cosine schedule; use higher values for small batches."""
    student_temp: Annotated[float, Gt(0)] = 0.1
    """Softmax temperature of the student."""
    warmup_teacher_temp: Annotated[float, Gt(0)] = 0.04
    """Softmax temperature of the teacher in the first epoch."""
    teacher_temp: Annotated[float, Gt(0)] = 0.04
    """Softmax temperature of the teacher after its warm-up; values above 0.07 are rarely stable."""
    warmup_teacher_temp_epochs: Annotated[int, Ge(0)] = 0
    """Epochs of linear warm-up of the teacher temperature."""
    centering: Literal["centering", "sinkhorn_knopp"] = "centering"
    """Method that keeps all prototypes in use: DINO's moving center, or DINOv2's Sinkhorn-Knopp, which assigns each
    batch evenly to them and works better in short runs."""
    center_momentum: Annotated[float, Ge(0), Le(1)] = 0.9
    """EMA momentum of the center; no effect with sinkhorn_knopp."""
    koleo_weight: Annotated[float, Ge(0)] = 0.0
    """Weight of DINOv2's KoLeo regulariser, which spreads the student's features of the global crops; 0 in DINO."""
    coding_rate_weight: Annotated[float, Ge(0)] = 1.0
    """For simdino: weight of the coding rate, multiplied by (p + m) / (p m) for m images and p dimensions."""
    coding_rate_eps: Annotated[float, Gt(0)] = 0.5
    """For simdino: squared precision of the coding rate; smaller values spread the features more."""
    weight_decay_end: Annotated[float, Ge(0), Group("optimisation")] = 0.4
    """Weight decay of the last step, reached with a cosine schedule."""
    freeze_last_layer: Annotated[int, Ge(0)] = 1
    """Number of epochs at the start in which the prototypes are frozen."""
    global_crops_scale: Annotated[tuple[float, float], Group("crops")] = (0.4, 1.0)
    """Minimum and maximum share of the image area in a global crop."""
    local_crops_scale: tuple[float, float] = (0.05, 0.4)
    """Minimum and maximum share of the image area in a local crop."""
    local_crops_number: int = 8
    """Local crops per image; there are always two global crops."""
    global_crops_size: int = 224
    """Side of a global crop in pixels."""
    local_crops_size: int = 96
    """Side of a local crop in pixels."""
    resolution_schedule: str = ""
    """Crop sizes by share of the run, such as "0:112/48 0.7:224/96" (SHARE:GLOBAL/LOCAL): small crops take less time.
    Shares are rounded to whole epochs; the last sizes are global_crops_size and local_crops_size. Empty: those in all
    epochs. The blur radius follows the global crops."""
    crop_ratio: tuple[float, float] = (0.75, 4 / 3)
    """Minimum and maximum aspect ratio (width / height) of a crop."""
    flip: float = 0.5
    """Probability of a horizontal flip."""
    jitter: float = 0.8
    """Probability of colour jitter."""
    brightness: float = 0.4
    """Strength of the brightness jitter."""
    contrast: float = 0.4
    """Strength of the contrast jitter."""
    saturation: float = 0.2
    """Strength of the saturation jitter."""
    hue: float = 0.1
    """Strength of the hue jitter, as a fraction of the colour circle."""
    gray: float = 0.2
    """Probability of conversion to greyscale."""
    global_blur: tuple[float, float] = (1.0, 0.1)
    """Probability of blur in the first and the second global crop."""
    local_blur: float = 0.5
    """Probability of blur in a local crop."""
    blur_radius: tuple[float, float] = (0.1, 2.0)
    """Minimum and maximum std of the Gaussian blur in pixels."""
    solarize: float = 0.2
    """Probability of solarisation in the second global crop."""
    channels: Annotated[int, Ge(1)] = 3
    """Number of channels of the images. Other numbers than 3 take PNG, TIFF and NPY files of that many channels. There,
    channel_gain and channel_drop replace saturation, hue and gray."""
    value_range: tuple[float, ...] = ()
    """Values that map to black and white in images that are neither of 8 nor of 16 bits, such as 0 1 (not for 3
    channels). NaN maps to black."""
    channel_gain: float = 0.2
    """Strength of a random gain of each channel, from 1 - channel_gain to 1 + channel_gain (not for 3 channels)."""
    channel_drop: float = 0.2
    """Probability that a random channel is black (neither for 3 channels nor for one)."""
    show_channels: Annotated[tuple[int, ...], ResumeSafe] = ()
    """Indices (from 0) of the three channels that pictures show as red, green and blue, such as 4 1 0. Stored in the
    checkpoint (not for 3 channels). Default: 0 1 2; of one or two channels, 0 as grey."""
    mean: tuple[float, ...] = IMAGENET_MEAN
    """Mean of each channel, for normalisation. Default for other than 3 channels: measured on 256 images."""
    std: Annotated[tuple[float, ...], Gt(0)] = IMAGENET_STD
    """Std of each channel, for normalisation. Default as of mean."""
    white_level: Annotated[int, Ge(0), Le(WHITE), ZeroIsAuto] = WHITE
    """White value of 16-bit images, such as 4095 for 12-bit data; auto (or 0): measured on 64 images. Stored in the
    checkpoint for the evaluators."""
    dry_run: Annotated[bool, ResumeSafe, Group("machine")] = False
    """Only check the data, train a few steps, and print memory, speed, duration, disk space and doubtful settings."""
    augment_device: Annotated[Literal["cpu", "cuda"], ResumeSafe] = "cpu"
    """Device for colour jitter, blur and solarisation. cpu: in the loader workers; cuda: by Triton kernels on the
    training GPU (not measured on one). The views are bit-identical."""
    best_metric: Annotated[str, ResumeSafe, Group("evaluation")] = "knn_top1"
    """Evaluator metric that selects best.pth; higher is better."""
    report_pictures: Annotated[bool, ResumeSafe] = True
    """Put pictures of the training images into report.html: views, attention, patch features, neighbours."""
    on_collapse: Annotated[Literal["warn", "stop"], ResumeSafe] = "warn"
    """What a verdict of collapse does: warn, or stop the run with code 3 (docs/monitoring.md)."""
    knn_every: Annotated[int, Ge(0), ResumeSafe] = 0
    """Epochs between k-NN evaluations during training (needs labels); 0: none."""
    knn_holdout: Annotated[int, Ge(0), ResumeSafe] = 0
    """Number of training images to hold out and evaluate on instead of the validation images, for model selection
    without the validation images; 0: evaluate on the validation images."""
    knn_max_images: Annotated[int, Ge(1), ResumeSafe] = 100_000
    """Maximum number of training images for the k-NN during training (evenly spaced)."""
    train_data: Annotated[str, ResumeSafe] = ""
    """Labelled training images for the k-NN during training. Default: those of data_path."""
    val_data: Annotated[str, ResumeSafe] = ""
    """Labelled validation images for the k-NN during training. Default: the validation part of data_path."""
    eval_resize: Annotated[int, Ge(0), ResumeSafe] = 0
    """Length of the shorter side after resizing for evaluation, stored in the checkpoint; 0: 8/7 of the crop, such as
    256 for 224."""
    eval_crop: Annotated[int, Ge(0), ResumeSafe] = 0
    """Size of the centre crop for evaluation, stored in the checkpoint; 0: global_crops_size."""

    def __post_init__(self) -> None:
        """Check all values.

        Raises:
            InputError: a value is out of bounds, or two settings conflict.
        """
        from dino_xcit.weights import Allowed

        check_bounds(self)
        if self.method == "simdino" and (self.koleo_weight or self.centering != "centering"):
            found = f"koleo_weight is {self.koleo_weight:g} and centering is {self.centering}"
            raise InputError(f"{found}, but method simdino uses neither: expected 0 and centering")
        if self.koleo_weight > 0 and self.batch_size_per_gpu < 2:
            raise InputError("batch_size_per_gpu is 1, but koleo_weight compares images: expected at least 2")
        for name in ("train_data", "val_data"):
            value = getattr(self, name)
            if value and (not self.knn_every or self.knn_holdout):
                why = "no k-NN runs during training (knn_every is 0)"
                if self.knn_every:
                    why = f"the k-NN during training uses held-out images (knn_holdout is {self.knn_holdout})"
                raise InputError(f"{name} is {value}, but {why}: leave {name} out, or change that setting")
        for name in ("mean", "std"):
            numbers = getattr(self, name)
            if len(numbers) != self.channels and numbers not in (IMAGENET_MEAN, IMAGENET_STD):
                raise InputError(
                    f"{name} has {len(numbers)} numbers, but channels is {self.channels}: give as many, or leave "
                    f"{name} out with --recipe auto, which measures them"
                )
        self.pixel_format.check()
        if self.channels == 3:
            refuse_changed(self, ("channel_gain", "channel_drop"), "with 3 channels")
        if self.channels == 1:
            refuse_changed(self, ("channel_drop",), "with one channel")
        if self.channels != 3 and self.augment_device == "cuda":
            raise InputError(f"channels is {self.channels}, but augment_device cuda is for 3 channels: expected cpu")
        if not self.is_xcit:
            refuse_xcit_only(self, self.arch)
        Allowed(self.allow_missing, self.allow_unexpected).check()
        self.augmentation()
        self.first_augmentations()

    @property
    def is_xcit(self) -> bool:
        """Whether the network is this project's XCiT."""
        return not self.arch.startswith(("timm:", "vit_"))

    def augmentation(self) -> MultiCropAugmentation:
        """Return the multi-crop augmentation of this run."""
        from dino_xcit.augment import MultiCropAugmentation

        names = inspect.signature(MultiCropAugmentation).parameters
        return MultiCropAugmentation(**{name: getattr(self, name) for name in names})

    def first_augmentations(self) -> list[MultiCropAugmentation]:
        """Return the augmentation of each epoch before the last stage of ``resolution_schedule``.

        Raises:
            InputError: the schedule is invalid.
        """
        stages = self.resolution_schedule.split()
        found = [re.fullmatch(r"(\d*\.?\d+):(\d+)/(\d+)", stage) for stage in stages]
        starts = [round(float(one[1]) * self.epochs) for one in found if one]
        if len(starts) < len(stages):
            raise InputError(
                f"resolution_schedule is {self.resolution_schedule!r}: expected SHARE:GLOBAL/LOCAL of each stage, such "
                "as '0:112/48 0.7:224/96'"
            )
        if stages and (starts[0] or sorted({*starts, self.epochs}) != [*starts, self.epochs]):
            raise InputError(
                f"the stages of resolution_schedule {self.resolution_schedule!r} begin at epochs {starts} of "
                f"{self.epochs}: expected the first at 0, and at least one epoch in each (give more --epochs?)"
            )
        sizes = [(int(one[2]), int(one[3])) for one in found if one]
        if stages and sizes[-1] != (self.global_crops_size, self.local_crops_size):
            raise InputError(
                f"resolution_schedule ends with crops of {sizes[-1][0]} and {sizes[-1][1]} pixels, but the run's are "
                f"{self.global_crops_size} and {self.local_crops_size}: expected the same, for example by "
                f"--global-crops-size {sizes[-1][0]} --local-crops-size {sizes[-1][1]}"
            )
        augmentations = []
        for (large, small), (start, end) in zip(sizes[:-1], itertools.pairwise(starts), strict=True):
            own: dict[str, Any] = {"global_crops_size": large, "local_crops_size": small, "resolution_schedule": ""}
            own["blur_radius"] = tuple(radius * large / self.global_crops_size for radius in self.blur_radius)
            augmentations += [dataclasses.replace(self, **own).augmentation()] * (end - start)
        return augmentations

    @property
    def pixel_format(self) -> PixelFormat:
        """Return how the values of image files become pixels."""
        return PixelFormat(self.channels, self.white_level, self.value_range, self.show_channels)

    def eval_transform(self) -> EvalTransform:
        """Return the transform for evaluating this run's backbone."""
        crop = self.eval_crop or self.global_crops_size
        resize = self.eval_resize or round(crop * 8 / 7)
        return EvalTransform(
            resize, crop, "bicubic", self.mean, self.std, self.white_level, self.value_range, self.show_channels
        )


def refuse_xcit_only(config: TrainConfig, arch: str) -> None:
    """Raise InputError if a setting needs this project's XCiT, for another ``arch``."""
    for name, others in (("activation_checkpointing", ("off",)), ("kernels", ("auto", "eager"))):
        if getattr(config, name) not in others:
            raise InputError(
                f"{name} {getattr(config, name)} needs this project's XCiT, but arch is {arch}: expected {name} "
                f"{others[-1]}"
            )


def differences(stored: dict[str, object], current: TrainConfig) -> list[str]:
    """Return the changed fields as ``name stored -> current``, without those marked :class:`ResumeSafe`."""
    out, safe = [], marked(type(current), ResumeSafe)
    for field in dataclasses.fields(current):
        if field.name in safe:
            continue
        # Fields that an older checkpoint lacks had the value of the current default.
        then, now = stored.get(field.name, field.default), getattr(current, field.name)
        then = tuple(then) if isinstance(then, list) else then
        if then != now:
            out.append(f"{field.name} {shown(then)} -> {shown(now)}")
    return out
