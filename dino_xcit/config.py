"""Every setting of a pretraining run and of an export, with its default: the only place that has them.

DINO's names are kept. Values are checked here, so that a run that cannot work ends before it starts.
What needs PyTorch is imported where it is used: a command reads its flags before.
"""

from __future__ import annotations

import dataclasses
import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Ge, Gt, Le, Lt

from dino_xcit.bounds import FilePath, Group, Seed, ZeroIsAuto, check_bounds, marked, shown
from dino_xcit.errors import InputError
from dino_xcit.transform import IMAGENET_MEAN, IMAGENET_STD, WHITE, EvalTransform

if TYPE_CHECKING:
    from dino_xcit.augment import MultiCropAugmentation


class ResumeSafe:
    """Mark of a setting that may change on resume: it does not affect what is learned. Of batch_size_per_gpu and
    accumulation_steps only the product with the number of ranks matters."""


class StateField:
    """Mark of a setting that determines the tensors of a checkpoint: a run never resumes with another value."""


@dataclass(frozen=True)
class PretrainConfig:
    """Settings of run_pretrain.py. Precedence: flags, then --config FILE.yaml, then the recipe, then these defaults."""

    recipe: Annotated[str, ResumeSafe, Group("data")] = ""
    """Named settings: dino (the reference's defaults), xcit-dino-300ep (nearest to the published XCiT models), sample
    and sample-long (the embedded sample). Default: sample without --data-path, else dino."""
    data_path: str = ""
    """Images to learn from: a folder (class sub-folders or not), a .txt list of paths, tar:PATTERN (WebDataset),
    parquet:PATTERN, hf:NAME_OR_DIR (Hugging Face datasets), imagenet:DIR (as downloaded), sample:fashion-mnist,
    sample:fashion-mnist-full or torchvision:NAME; docs/data.md.
    Labels are never used for training."""

    arch: Annotated[str, StateField, Group("model")] = "xcit_small_12_p16"
    """Backbone: an official XCiT name (xcit_nano_12_p16 ... xcit_large_24_p8, also _p4), xcit_pico_4_p4 or
    xcit_micro_4_p16 for small images, a ViT by its sizes (vit_small_12_p16), or timm:NAME."""
    init_weights: FilePath = ""
    """Start student and teacher from these weights instead of random ones: any file that run_knn.py reads,
    hf-hub:ORG/NAME or timm:NAME; docs/checkpoints.md. The heads too, where the file has them in this run's shapes;
    never optimizer or epoch. A resumed run does not read it again."""
    init_network: Literal["teacher", "student"] = "teacher"
    """Which network of init_weights, for files that hold both."""
    allow_missing: tuple[str, ...] = ()
    """Keys of the backbone that init_weights may lack, by name or by their beginning and *: they start fresh."""
    allow_unexpected: tuple[str, ...] = ()
    """Keys of init_weights that the backbone may lack, likewise: they are left aside."""
    drop_path_rate: Annotated[float, Ge(0), Lt(1)] = 0.1
    """Stochastic depth of the student."""

    method: Annotated[str, StateField, Group("method")] = "dino"
    """How the network learns: dino, simdino, or a method registered with dino_xcit.methods.register_method."""
    out_dim: Annotated[int, Ge(2), StateField] = 65536
    """Prototypes K of the DINO head."""
    norm_last_layer: Annotated[bool, StateField] = True
    """Freeze the prototypes' lengths at 1: stabler; false gives better features for small models."""
    use_bn_in_head: Annotated[bool, StateField] = False
    """BatchNorm in the head's hidden layers."""
    head_hidden_dim: Annotated[int, Ge(1), StateField] = 2048
    """Width of the head's two hidden layers."""
    head_bottleneck_dim: Annotated[int, Ge(1), StateField] = 256
    """Width of the head's output before the prototypes."""
    momentum_teacher: Annotated[float, Ge(0), Le(1)] = 0.996
    """Share of the teacher kept at each step, rising to 1 by a cosine; higher for small batches."""
    student_temp: Annotated[float, Gt(0)] = 0.1
    """Softmax temperature of the student."""
    warmup_teacher_temp: Annotated[float, Gt(0)] = 0.04
    """Softmax temperature of the teacher in the first epoch."""
    teacher_temp: Annotated[float, Gt(0)] = 0.04
    """Softmax temperature of the teacher after its warm-up; above 0.07 is seldom stable."""
    warmup_teacher_temp_epochs: Annotated[int, Ge(0)] = 0
    """Epochs over which the teacher's temperature rises."""
    centering: Literal["centering", "sinkhorn_knopp"] = "centering"
    """What keeps all prototypes in use: DINO's moving center, or DINOv2's Sinkhorn-Knopp, which spreads each batch
    evenly over them: better in short runs."""
    center_momentum: Annotated[float, Ge(0), Le(1)] = 0.9
    """Share of the center kept at each step; without effect under sinkhorn_knopp."""
    koleo_weight: Annotated[float, Ge(0)] = 0.0
    """Weight of DINOv2's KoLeo regulariser, which spreads the student's features of the global crops; 0 as in DINO."""
    coding_rate_weight: Annotated[float, Ge(0)] = 1.0
    """Weight of SimDINO's coding rate, times (p + m) / (p m) for m images in p dimensions."""
    coding_rate_eps: Annotated[float, Gt(0)] = 0.5
    """Precision at which SimDINO measures the coding rate; smaller values spread the features more."""

    epochs: Annotated[int, Ge(1), Group("optimisation")] = 100
    """Passes over the images."""
    batch_size_per_gpu: Annotated[int, Ge(1), ResumeSafe] = 64
    """Images in one forward pass of one process."""
    accumulation_steps: Annotated[int, Ge(1), ResumeSafe] = 1
    """Forward passes a step: the global batch is batch_size_per_gpu * processes * accumulation_steps."""
    optimizer: Annotated[Literal["adamw", "sgd", "lars"], StateField] = "adamw"
    """Optimizer of the student."""
    lr: Annotated[float, Ge(0)] = 0.0005
    """Highest learning rate, for a global batch of lr_reference_batch images; scaled linearly with the batch."""
    lr_reference_batch: Annotated[int, Ge(0)] = 256
    """The batch that lr is meant for; 0: take lr as it is."""
    min_lr: Annotated[float, Ge(0)] = 1e-6
    """Learning rate at the end of the run."""
    warmup_epochs: Annotated[float, Ge(0)] = 10.0
    """Epochs of linear learning-rate warm-up; shortened, with a warning, if the run is not longer."""
    warmup_start_lr: Annotated[float, Ge(0)] = 0.0
    """Learning rate of the first step."""
    weight_decay: Annotated[float, Ge(0)] = 0.04
    """Weight decay of the first step."""
    weight_decay_end: Annotated[float, Ge(0)] = 0.4
    """Weight decay of the last step, by a cosine."""
    clip_grad: float = 3.0
    """Largest gradient norm; 0: no clipping."""
    clip_mode: Literal["per-parameter", "global"] = "per-parameter"
    """Whether each parameter's gradient has that limit (the reference) or all together."""
    freeze_last_layer: Annotated[int, Ge(0)] = 1
    """Epochs during which the prototypes do not move."""

    global_crops_scale: Annotated[tuple[float, float], Group("crops")] = (0.4, 1.0)
    """Share of the image's area in a global crop: least, most."""
    local_crops_scale: tuple[float, float] = (0.05, 0.4)
    """Share of the image's area in a local crop: least, most."""
    local_crops_number: int = 8
    """Local crops an image; there are always two global ones."""
    global_crops_size: int = 224
    """Pixels a side of a global crop."""
    local_crops_size: int = 96
    """Pixels a side of a local crop."""
    crop_ratio: tuple[float, float] = (0.75, 4 / 3)
    """Width / height of a crop: least, most."""
    flip: float = 0.5
    """Probability of a horizontal flip."""
    jitter: float = 0.8
    """Probability of colour jitter."""
    brightness: float = 0.4
    """Strength of the jitter's brightness."""
    contrast: float = 0.4
    """Strength of the jitter's contrast."""
    saturation: float = 0.2
    """Strength of the jitter's saturation."""
    hue: float = 0.1
    """Strength of the jitter's hue, in turns of the colour circle."""
    gray: float = 0.2
    """Probability of losing the colour."""
    global_blur: tuple[float, float] = (1.0, 0.1)
    """Probability of blur in the first and in the second global crop."""
    local_blur: float = 0.5
    """Probability of blur in a local crop."""
    blur_radius: tuple[float, float] = (0.1, 2.0)
    """Standard deviation of the blur in pixels: least, most."""
    solarize: float = 0.2
    """Probability of solarisation in the second global crop."""
    mean: tuple[float, float, float] = IMAGENET_MEAN
    """Mean of each channel, for normalisation."""
    std: Annotated[tuple[float, float, float], Gt(0)] = IMAGENET_STD
    """Standard deviation of each channel, for normalisation."""
    white_level: Annotated[int, Ge(0), Le(WHITE), ZeroIsAuto] = WHITE
    """Value of 16-bit grey images that is white, such as 4095 where 12 bits are used; auto (or 0): measured on 64
    images. Stored in the checkpoint for the evaluators."""

    seed: Annotated[Seed, Group("machine")] = 0
    """Seed of the weights, the order of the images, the crops and drop-path."""
    device: Annotated[Literal["auto", "cpu", "cuda"], ResumeSafe] = "auto"
    """Where to train; auto: a GPU if there is one."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Arithmetic of the networks; auto: bf16 on a GPU that has it, else fp16 there, fp32 on a CPU.
    --use_fp16 true|false of DINO means fp16 or fp32, and is refused beside a --precision that says otherwise."""
    activation_checkpointing: Annotated[bool, ResumeSafe] = False
    """Compute stem and XCA blocks again in the backward pass instead of keeping what they computed: less memory, more
    time, the same result (to the last bit where kernels are repeatable, as on the CPU). For this project's XCiT."""
    compile: Annotated[bool, ResumeSafe] = False
    """Let torch.compile make the XCA blocks' kernels. The first step then takes minutes (later runs find the kernels in
    its cache). On the CPU that was measured it does not pay; on GPUs it is not measured. For this project's XCiT."""
    deterministic: Annotated[bool, ResumeSafe] = False
    """Only kernels that give the same bits each time; slower on a GPU."""
    num_workers: Annotated[int, Ge(-1), ResumeSafe] = -1
    """Loader processes a rank; -1: chosen from the cores at hand."""
    augment_device: Annotated[Literal["auto", "cpu", "cuda"], ResumeSafe] = "auto"
    """Where colours are jittered and views blurred and solarised: cpu, in the loader processes; cuda, where training is
    on a GPU; auto: cpu, and cuda as soon as a GPU waits for images. The views are the same to the last bit."""
    hang_timeout: Annotated[float, Ge(1), ResumeSafe] = 600.0
    """Seconds that one phase may take without progress before the run ends with code 4. Set it above the longest
    phase, such as the k-NN search."""
    max_unreadable: Annotated[float, Ge(0), ResumeSafe] = 0.05
    """Share of images that may be unreadable before the run ends; up to there others stand in for them."""

    output_dir: Annotated[FilePath, ResumeSafe, Group("checkpoints")] = ""
    """Where checkpoints, metrics and curves go. Default: runs/RECIPE-ARCH."""
    resume: Annotated[Literal["auto", "changed", "never"], ResumeSafe] = "auto"
    """auto: resume if output_dir holds this run, refuse if it holds another; changed: resume with other settings;
    never: start anew and overwrite."""
    saveckp_freq: Annotated[int, Ge(0), ResumeSafe] = 20
    """Every so many epochs a checkpoint is kept for good (one is written every epoch); 0: none."""
    save_every: Annotated[int, Ge(0), ResumeSafe] = 0
    """Also save every so many steps within an epoch; 0: only at its end."""
    keep_last: Annotated[int, Ge(1), ResumeSafe] = 2
    """Number of newest checkpoints to keep, besides the best by best_metric. Keep at least 2: resuming falls back to an
    older checkpoint if the newest is damaged."""
    max_failed_saves: Annotated[int, Ge(1), ResumeSafe] = 3
    """Consecutive failed saves (a full disk, say) before the run ends."""
    max_skipped_steps: Annotated[int, Ge(1), ResumeSafe] = 30
    """Consecutive non-finite steps before the run ends with code 3. fp16 skips a few at the start, until its loss scale
    settles."""
    max_steps: Annotated[int, Ge(0), ResumeSafe] = 0
    """Stop after so many steps, with a complete checkpoint; 0: after the last epoch. Schedules do not change."""
    log_every: Annotated[int, Ge(1), ResumeSafe] = 10
    """Steps between two lines of metrics; between them the device is never waited for."""
    wandb: Annotated[str, ResumeSafe] = ""
    """Weights & Biases project for the metrics (pip install 'dino-xcit[wandb]', then wandb login, or
    WANDB_MODE=offline in the environment); empty: none."""

    best_metric: Annotated[str, ResumeSafe, Group("evaluation")] = "knn_top1"
    """Evaluator metric that selects best.pth; higher is better."""
    knn_every: Annotated[int, Ge(0), ResumeSafe] = 0
    """Epochs between two k-NN measurements while training (needs labels); 0: none."""
    knn_holdout: Annotated[int, Ge(0), ResumeSafe] = 0
    """Measure on so many training images, held out from the k-NN's training part, instead of the validation images:
    for choosing settings without looking at the validation images. 0: use the validation images."""
    knn_max_images: Annotated[int, Ge(1), ResumeSafe] = 100_000
    """At most so many training images take part in the k-NN while training (evenly spread)."""
    train_data: Annotated[str, ResumeSafe] = ""
    """Labelled training images of the k-NN while training, where not beside data_path."""
    val_data: Annotated[str, ResumeSafe] = ""
    """Labelled validation images of the k-NN while training, where not beside data_path."""
    eval_resize: Annotated[int, Ge(0), ResumeSafe] = 0
    """Shorter side for evaluation, stored in the checkpoint; 0: 8/7 of the crop, as 256 for 224."""
    eval_crop: Annotated[int, Ge(0), ResumeSafe] = 0
    """Centre crop for evaluation, stored in the checkpoint; 0: global_crops_size."""

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            InputError: names the field, its value and what is expected.
        """
        from dino_xcit.weights import Allowed

        check_bounds(self)
        if self.method == "simdino" and (self.koleo_weight or self.centering != "centering"):
            found = f"koleo_weight is {self.koleo_weight:g} and centering is {self.centering}"
            raise InputError(f"{found}, but method is simdino, which has neither: expected 0 and centering")
        if self.koleo_weight > 0 and self.batch_size_per_gpu < 2:
            raise InputError("batch_size_per_gpu is 1, but koleo_weight compares images: expected 2 or more")
        for name in ("train_data", "val_data"):
            value = getattr(self, name)
            if value and (not self.knn_every or self.knn_holdout):
                found = f"knn_holdout is {self.knn_holdout}" if self.knn_every else "knn_every is 0"
                raise InputError(f"{name} is {value}, but {found}: expected knn_every 1, knn_holdout 0, or no {name}")
        for name in ("activation_checkpointing", "compile"):
            if getattr(self, name) and self.arch.startswith(("timm:", "vit_")):
                raise InputError(f"{name} is for this project's XCiT, but arch is {self.arch}: expected {name} false")
        Allowed(self.allow_missing, self.allow_unexpected).check()
        self.augmentation()

    def augmentation(self) -> MultiCropAugmentation:
        """The multi-crop augmentation of this run."""
        from dino_xcit.augment import MultiCropAugmentation

        names = inspect.signature(MultiCropAugmentation).parameters
        return MultiCropAugmentation(**{name: getattr(self, name) for name in names})

    def eval_transform(self) -> EvalTransform:
        """How this run's backbone wants its images when it is measured."""
        crop = self.eval_crop or self.global_crops_size
        resize = self.eval_resize or round(crop * 8 / 7)
        return EvalTransform(resize, crop, mean=self.mean, std=self.std, white_level=self.white_level)


RESUME_SAFE_FIELDS = frozenset(marked(PretrainConfig, ResumeSafe))
STATE_FIELDS = frozenset(marked(PretrainConfig, StateField))


def differences(stored: dict[str, object], current: PretrainConfig) -> list[str]:
    """The fields that differ, as ``name stored -> current``, without :data:`RESUME_SAFE_FIELDS`."""
    out = []
    for field in dataclasses.fields(PretrainConfig):
        if field.name in RESUME_SAFE_FIELDS:
            continue
        # A field that an older checkpoint lacks had the value of today's default.
        then, now = stored.get(field.name, field.default), getattr(current, field.name)
        then = tuple(then) if isinstance(then, list) else then
        if then != now:
            out.append(f"{field.name} {shown(then)} -> {shown(now)}")
    return out
