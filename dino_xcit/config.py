"""Every setting of a pretraining run and of an export, with its default: the only place that has them.

DINO's names are kept. Values are checked here, so that a run that cannot work ends before it starts.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal, get_args, get_origin, get_type_hints

from dino_xcit.augment import MultiCropAugmentation
from dino_xcit.errors import InputError
from dino_xcit.transform import IMAGENET_MEAN, IMAGENET_STD, EvalTransform
from dino_xcit.weights.load import Allowed


@dataclass(frozen=True)
class PretrainConfig:
    """Settings of run_pretrain.py. Precedence: flags, then --config FILE.yaml, then the recipe, then these defaults."""

    # ---- what
    arch: str = "xcit_small_12_p16"
    """Backbone: an official XCiT name (xcit_nano_12_p16 ... xcit_large_24_p8, also _p4), xcit_pico_4_p4 or
    xcit_micro_4_p16 for small images, a ViT by its sizes (vit_small_12_p16), or timm:NAME."""
    recipe: str = ""
    """Named settings: dino (the reference's defaults), xcit-dino-300ep (nearest to the published XCiT models), sample
    and sample-long (the embedded sample). Default: sample without --data-path, else dino."""
    data_path: str = ""
    """Images to learn from: a folder (class sub-folders or not), a .txt list of paths, tar:PATTERN (WebDataset),
    parquet:PATTERN, hf:NAME_OR_DIR (Hugging Face datasets), imagenet:DIR (as downloaded), sample:fashion-mnist,
    sample:fashion-mnist-full or torchvision:NAME; docs/data.md.
    Labels are never used for training."""
    output_dir: str = ""
    """Where checkpoints, metrics and curves go. Default: runs/RECIPE-ARCH."""
    init_weights: str = ""
    """Start student and teacher from these weights instead of random ones: any file that run_knn.py reads,
    hf-hub:ORG/NAME or timm:NAME; docs/checkpoints.md. The heads too, where the file has them in this run's shapes;
    never optimizer or epoch. A resumed run does not read it again."""
    init_network: Literal["teacher", "student"] = "teacher"
    """Which network of init_weights, for files that hold both."""
    allow_missing: tuple[str, ...] = ()
    """Keys of the backbone that init_weights may lack, by name or by their beginning and *: they start fresh."""
    allow_unexpected: tuple[str, ...] = ()
    """Keys of init_weights that the backbone may lack, likewise: they are left aside."""

    # ---- head and loss
    method: str = "dino"
    """How the network learns: dino, simdino, or a method registered with dino_xcit.methods.register_method."""
    out_dim: int = 65536
    """Prototypes K of the DINO head."""
    norm_last_layer: bool = True
    """Freeze the prototypes' lengths at 1: stabler; false gives better features for small models."""
    use_bn_in_head: bool = False
    """BatchNorm in the head's hidden layers."""
    head_hidden_dim: int = 2048
    """Width of the head's two hidden layers."""
    head_bottleneck_dim: int = 256
    """Width of the head's output before the prototypes."""
    momentum_teacher: float = 0.996
    """Share of the teacher kept at each step, rising to 1 by a cosine; higher for small batches."""
    student_temp: float = 0.1
    """Softmax temperature of the student."""
    warmup_teacher_temp: float = 0.04
    """Softmax temperature of the teacher in the first epoch."""
    teacher_temp: float = 0.04
    """Softmax temperature of the teacher after its warm-up; above 0.07 is seldom stable."""
    warmup_teacher_temp_epochs: int = 0
    """Epochs over which the teacher's temperature rises."""
    centering: Literal["centering", "sinkhorn_knopp"] = "centering"
    """What keeps all prototypes in use: DINO's moving center, or DINOv2's Sinkhorn-Knopp, which spreads each batch
    evenly over them: better in short runs."""
    center_momentum: float = 0.9
    """Share of the center kept at each step; without effect under sinkhorn_knopp."""
    koleo_weight: float = 0.0
    """Weight of DINOv2's KoLeo regulariser, which spreads the student's features of the global crops; 0 as in DINO."""
    coding_rate_weight: float = 1.0
    """Weight of SimDINO's coding rate, times (p + m) / (p m) for m images in p dimensions."""
    coding_rate_eps: float = 0.5
    """Precision at which SimDINO measures the coding rate; smaller values spread the features more."""

    # ---- optimisation
    epochs: int = 100
    """Passes over the images."""
    batch_size_per_gpu: int = 64
    """Images in one forward pass of one process."""
    accumulation_steps: int = 1
    """Forward passes a step: the global batch is batch_size_per_gpu * processes * accumulation_steps."""
    optimizer: Literal["adamw", "sgd", "lars"] = "adamw"
    """Optimizer of the student."""
    lr: float = 0.0005
    """Highest learning rate, for a global batch of lr_reference_batch images; scaled linearly with the batch."""
    lr_reference_batch: int = 256
    """The batch that lr is meant for; 0: take lr as it is."""
    min_lr: float = 1e-6
    """Learning rate at the end of the run."""
    warmup_epochs: float = 10.0
    """Epochs of linear learning-rate warm-up; shortened, with a warning, if the run is not longer."""
    warmup_start_lr: float = 0.0
    """Learning rate of the first step."""
    weight_decay: float = 0.04
    """Weight decay of the first step."""
    weight_decay_end: float = 0.4
    """Weight decay of the last step, by a cosine."""
    clip_grad: float = 3.0
    """Largest gradient norm; 0: no clipping."""
    clip_mode: Literal["per-parameter", "global"] = "per-parameter"
    """Whether each parameter's gradient has that limit (the reference) or all together."""
    freeze_last_layer: int = 1
    """Epochs during which the prototypes do not move."""
    drop_path_rate: float = 0.1
    """Stochastic depth of the student."""

    # ---- multi-crop
    global_crops_scale: tuple[float, float] = (0.4, 1.0)
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
    std: tuple[float, float, float] = IMAGENET_STD
    """Standard deviation of each channel, for normalisation."""

    # ---- machine
    seed: int = 0
    """Seed of the weights, the order of the images, the crops and drop-path."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; auto: a GPU if there is one."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Arithmetic of the networks; auto: bf16 on a GPU that has it, else fp16 there, fp32 on a CPU.
    --use_fp16 true|false of DINO means fp16 or fp32, and is refused beside a --precision that says otherwise."""
    activation_checkpointing: bool = False
    """Compute stem and XCA blocks again in the backward pass instead of keeping what they computed: less memory, more
    time, the same result (to the last bit where kernels are repeatable, as on the CPU). For this project's XCiT."""
    compile: bool = False
    """Let torch.compile make the XCA blocks' kernels. The first step then takes minutes (later runs find the kernels in
    its cache). On the CPU that was measured it does not pay; on GPUs it is not measured. For this project's XCiT."""
    deterministic: bool = False
    """Only kernels that give the same bits each time; slower on a GPU."""
    num_workers: int = -1
    """Loader processes a rank; -1: chosen from the cores at hand."""
    augment_device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where colours are jittered and views blurred and solarised: cpu, in the loader processes; cuda, where training is
    on a GPU; auto: cpu, and cuda as soon as a GPU waits for images. The views are the same to the last bit."""

    # ---- checkpoints and measuring
    resume: Literal["auto", "changed", "never"] = "auto"
    """auto: resume if output_dir holds this run, refuse if it holds another; changed: resume with other settings;
    never: start anew and overwrite."""
    saveckp_freq: int = 20
    """Every so many epochs a checkpoint is kept for good (one is written every epoch); 0: none."""
    save_every: int = 0
    """Also save every so many steps within an epoch; 0: only at its end."""
    keep_last: int = 2
    """Number of newest checkpoints to keep, besides the best by best_metric. Keep at least 2: resuming falls back to an
    older checkpoint if the newest is damaged."""
    max_failed_saves: int = 3
    """Consecutive failed saves (a full disk, say) before the run ends."""
    max_skipped_steps: int = 30
    """Consecutive non-finite steps before the run ends with code 3. fp16 skips a few at the start, until its loss scale
    settles."""
    max_unreadable: float = 0.05
    """Share of images that may be unreadable before the run ends; up to there others stand in for them."""
    hang_timeout: float = 600.0
    """Seconds that one phase may take without progress before the run ends with code 4. Set it above the longest
    phase, such as the k-NN search."""
    max_steps: int = 0
    """Stop after so many steps, with a complete checkpoint; 0: after the last epoch. Schedules do not change."""
    log_every: int = 10
    """Steps between two lines of metrics; between them the device is never waited for."""
    wandb: str = ""
    """Weights & Biases project for the metrics (pip install 'dino-xcit[wandb]', then wandb login, or
    WANDB_MODE=offline in the environment); empty: none."""
    best_metric: str = "knn_top1"
    """Evaluator metric that selects best.pth; higher is better."""
    knn_every: int = 0
    """Epochs between two k-NN measurements while training (needs labels); 0: none."""
    knn_holdout: int = 0
    """Measure on so many training images, held out from the k-NN's training part, instead of the validation images:
    for choosing settings without looking at the validation images. 0: use the validation images."""
    knn_max_images: int = 100_000
    """At most so many training images take part in the k-NN while training (evenly spread)."""
    train_data: str = ""
    """Labelled training images of the k-NN while training, where not beside data_path."""
    val_data: str = ""
    """Labelled validation images of the k-NN while training, where not beside data_path."""
    eval_resize: int = 0
    """Shorter side for evaluation, stored in the checkpoint; 0: 8/7 of the crop, as 256 for 224."""
    eval_crop: int = 0
    """Centre crop for evaluation, stored in the checkpoint; 0: global_crops_size."""

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            InputError: names the field, its value and what is expected.
        """
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            for number in value if isinstance(value, tuple) else (value,):
                if isinstance(number, float) and not math.isfinite(number):
                    raise InputError(f"{field.name} is {number}, expected a finite number")
        at_least: dict[str, float] = {
            "out_dim": 2, "head_hidden_dim": 1, "head_bottleneck_dim": 1, "epochs": 1, "batch_size_per_gpu": 1,
            "accumulation_steps": 1, "lr_reference_batch": 0, "lr": 0, "min_lr": 0, "warmup_epochs": 0,
            "warmup_start_lr": 0, "weight_decay": 0, "weight_decay_end": 0, "koleo_weight": 0, "coding_rate_weight": 0,
            "freeze_last_layer": 0,
            "warmup_teacher_temp_epochs": 0, "num_workers": -1, "saveckp_freq": 0, "save_every": 0, "max_steps": 0,
            "log_every": 1, "knn_every": 0, "knn_holdout": 0, "knn_max_images": 1, "eval_resize": 0, "eval_crop": 0,
            "seed": 0, "keep_last": 1, "max_failed_saves": 1, "max_skipped_steps": 1, "max_unreadable": 0,
            "hang_timeout": 1,
        }  # fmt: skip
        for name, minimum in at_least.items():
            value = getattr(self, name)
            if value < minimum:
                raise InputError(f"{name} is {value}, expected at least {minimum:g}")
        if self.seed >= 1 << 63:  # as PyTorch's generators take it
            raise InputError(f"seed is {self.seed}, expected less than 2^63, such as 0")
        if self.method == "simdino" and (self.koleo_weight or self.centering != "centering"):
            raise InputError(
                f"koleo_weight is {self.koleo_weight:g} and centering is {self.centering}, but method is simdino, "
                "which has neither: expected 0 and centering"
            )
        if self.koleo_weight > 0 and self.batch_size_per_gpu < 2:
            raise InputError(
                "koleo_weight needs other images to compare with: batch_size_per_gpu is 1, expected 2 or more"
            )
        for name in (
            "student_temp",
            "coding_rate_eps",
            "warmup_teacher_temp",
            "teacher_temp",
            *(f"std[{i}]" for i in range(3)),
        ):
            value = self.std[int(name[4])] if name.startswith("std[") else getattr(self, name)
            if not value > 0:
                raise InputError(f"{name} is {value}, expected more than 0")
        for name in ("momentum_teacher", "center_momentum"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} is {getattr(self, name)}, expected between 0 and 1, such as 0.996")
        if not 0 <= self.drop_path_rate < 1:
            raise InputError(f"drop_path_rate is {self.drop_path_rate}, expected 0 or more and below 1, such as 0.1")
        for name, hint in get_type_hints(type(self)).items():
            if get_origin(hint) is Literal and getattr(self, name) not in get_args(hint):
                raise InputError(f"{name} is {getattr(self, name)!r}, expected one of {', '.join(get_args(hint))}")
        for name in ("train_data", "val_data"):
            value = getattr(self, name)
            if value and not self.knn_every:
                raise InputError(f"{name} is {value}, but knn_every is 0: expected --knn-every 1, or no {name}")
            if value and self.knn_holdout:
                raise InputError(
                    f"{name} is {value}, but knn_holdout is {self.knn_holdout}, which measures on images of data_path: "
                    f"expected --knn-holdout 0, or no {name}"
                )
        for name in ("activation_checkpointing", "compile"):
            if getattr(self, name) and self.arch.startswith(("timm:", "vit_")):
                raise InputError(f"{name} is for this project's XCiT, but arch is {self.arch}: expected {name} false")
        Allowed(self.allow_missing, self.allow_unexpected).check()
        self.augmentation()

    def augmentation(self) -> MultiCropAugmentation:
        """The multi-crop augmentation of this run."""
        names = (
            "global_crops_scale", "local_crops_scale", "local_crops_number", "global_crops_size", "local_crops_size",
            "crop_ratio", "flip", "jitter", "brightness", "contrast", "saturation", "hue", "gray", "global_blur",
            "local_blur", "blur_radius", "solarize",
        )  # fmt: skip
        return MultiCropAugmentation(**{name: getattr(self, name) for name in names})

    def eval_transform(self) -> EvalTransform:
        """How this run's backbone wants its images when it is measured."""
        crop = self.eval_crop or self.global_crops_size
        return EvalTransform(resize=self.eval_resize or round(crop * 8 / 7), crop=crop, mean=self.mean, std=self.std)


RESUME_SAFE_FIELDS = frozenset(
    {
        "output_dir", "device", "activation_checkpointing", "compile",
        "num_workers", "augment_device", "resume", "saveckp_freq", "save_every", "max_steps",
        "log_every", "wandb",
        "knn_every", "knn_holdout", "knn_max_images", "train_data", "val_data", "eval_resize", "eval_crop", "recipe",
        "deterministic", "batch_size_per_gpu", "accumulation_steps", "keep_last", "max_failed_saves",
        "max_skipped_steps", "max_unreadable", "hang_timeout", "best_metric",
    }
)  # fmt: skip
"""Fields that may change on resume: they do not affect what is learned. Of batch_size_per_gpu and accumulation_steps
only the product with the number of ranks matters."""


STATE_FIELDS = frozenset(
    {
        "arch", "method", "out_dim", "norm_last_layer", "use_bn_in_head", "head_hidden_dim", "head_bottleneck_dim",
        "optimizer",
    }
)  # fmt: skip
"""Fields that determine the tensors of a checkpoint: a run never resumes with other values."""


def differences(stored: dict[str, object], current: PretrainConfig) -> list[str]:
    """The fields that differ, as ``name stored -> current``, without :data:`RESUME_SAFE_FIELDS`."""
    out = []
    for field in dataclasses.fields(PretrainConfig):
        if field.name in RESUME_SAFE_FIELDS:
            continue
        # A field that an older checkpoint lacks had the value of today's default.
        then, now = stored.get(field.name, field.default), getattr(current, field.name)
        if (list(then) if isinstance(then, (list, tuple)) else then) != (list(now) if isinstance(now, tuple) else now):
            out.append(f"{field.name} {then} -> {now}")
    return out


EXPORT_TARGETS = ("timm", "safetensors", "hf", "onnx", "torch-export")


@dataclass(frozen=True)
class ExportConfig:
    """Settings of python -m dino_xcit.export."""

    weights: str = ""
    """Checkpoint to export, any that run_knn.py reads."""
    to: str = ""
    """timm: a folder for timm.create_model; safetensors: one file with the official names; hf: timm's folder with a
    model card, ready for the Hugging Face Hub; onnx: one file for onnxruntime; torch-export: a .pt2 file."""
    out: str = ""
    """Where it goes: a folder for timm and hf, a file for the others."""
    network: Literal["teacher", "student"] = "teacher"
    """Which network of a checkpoint that holds both."""
    arch: str = ""
    """Architecture, where the file neither says nor shows it."""
    patch_tokens: bool = False
    """onnx and torch-export: a second output, the patch tokens of the last block that mixes patches."""
    card: tuple[str, ...] = ()
    """hf: result files of the evaluators (--json) for the model card; they must have measured these weights."""
    images: str = ""
    """Images on which the export is compared with its original (a folder, or another form of docs/data.md). Default:
    scikit-image's photographs where it is installed, else the sample's."""
    tolerance: float = 1e-5
    """The greatest relative difference between export and original that passes in any case; above it, thirty
    times the original's own rounding in float32 does."""
    overwrite: bool = False
    """Replace an earlier export at --out."""

    def check(self) -> None:
        """Check every value.

        Raises:
            InputError: names the field, its value and what is expected.
        """
        for name, hint in (("weights", "a checkpoint such as runs/.../checkpoint.pth"), ("out", "a path to write to")):
            if not getattr(self, name):
                raise InputError(f"no --{name} given, expected {hint}")
        if self.to not in EXPORT_TARGETS:
            raise InputError(f"to is {self.to!r}, expected one of {', '.join(EXPORT_TARGETS)}, such as --to timm")
        if self.patch_tokens and self.to not in ("onnx", "torch-export"):
            raise InputError(f"patch_tokens is an output of onnx and torch-export, but to is {self.to}: leave it out")
        if self.card and self.to != "hf":
            raise InputError(f"card goes into the model card of --to hf, but to is {self.to}: leave it out, or --to hf")
        if not 0 <= self.tolerance <= 0.01:
            raise InputError(f"tolerance is {self.tolerance}, expected 0 to 0.01, such as 1e-5")
