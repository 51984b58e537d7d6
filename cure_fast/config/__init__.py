"""The typed configuration of a run: frozen dataclasses and their checks.

Every field is a flag of the same name on the command line (``batch_size`` is ``--batch-size``), so
names are unique across the groups. The docstring under a field is the flag's help and states its
unit and range. A check that fails raises :class:`InputError` with flag, expectation and value.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal, dataclass_transform

from cure_fast.config.attack_names import parse_attack
from cure_fast.config.checks import POSITIVE, Bounds, Checked, Count, Share, Whole, check
from cure_fast.config.steps import STEP_SHARE

# The ball of an attack: what bounds its change of an image.
Norm = Literal["linf", "l2"]
# Of an L2 ball; those of L-inf end at 1, where each pixel may be anything.
Radius = Annotated[float, Bounds(0, 1000)]
# What a file of generated images is called by.
GENERATED_PREFIX = "npz:"
# Two radii cross the ball.
StepShare = Annotated[float, Bounds(0, 2)]


@dataclass(frozen=True, kw_only=True)
class DataConfig(Checked):
    """Images, the held-out validation split, and how batches are fed."""

    data: str = "cifar10"
    """Data set: cifar10, cifar100, svhn, digits, folder:PATH with PATH/train/<class>/ and
    PATH/test/<class>/ image folders, torchvision:NAME such as torchvision:FashionMNIST, or
    package.module:function of your own, which returns images and labels of train and test."""
    data_root: str = "data"
    """Folder that holds the data sets, or receives them when they are downloaded."""
    image_size: Annotated[int, Bounds(1, 4096)] | None = None
    """Pixels to resize the shorter side of each image to, and then to crop out of its middle, 1 to
    4096; None takes images as they are, which must then be square and of one size."""
    download: bool = True
    """Download a data set of torchvision when it is not below the data root."""
    train_images: Count | None = None
    """Number of training images to use, drawn evenly over the classes; None takes all."""
    val_images: Count = 1000
    """Images held out of the training set to pick the best checkpoint, 1 or more per class."""
    split_seed: Whole = 0
    """Seed of the draw of training and validation images, 0 or more."""
    aux: str | None = None
    """Generated images to train on beside those of the data set, npz:PATH with the arrays image,
    uint8 [M, H, W, 3], and label [M]; none of them is validated or tested on."""
    aux_share: Annotated[float, Bounds(POSITIVE, 0.99)] = 0.7
    """Share of each batch that --aux is, above 0 and at most 0.99; an epoch has as many images as
    without it."""
    aux_hash: str | None = None
    """Checksum that the images of --aux must have, as a run records it; None takes any."""
    augment: Literal["crop-flip", "idbh-weak", "idbh-strong", "idbh-svhn"] = "crop-flip"
    """Training augmentation: crop and flip, or IDBH: a crop moved, a change of colour or shape,
    and a rectangle blackened in half of the images (weak) or all (strong; svhn: made for it)."""
    crop_padding: Annotated[int, Bounds(0, 64)] = 4
    """Augmentation crop-flip: padding in pixels, 0 to 64, before a random crop; 0 for none."""
    crop_mode: Literal["zero", "reflect"] = "zero"
    """What that padding holds: zeros, or the image mirrored at its outermost pixels."""
    flip: bool = True
    """Any augmentation: mirror each image left to right with probability 1/2."""
    loader: Literal["auto", "ffcv", "resident", "torch"] = "auto"
    """How batches are fed; auto takes resident below 16 MB of images, above FFCV where it is
    installed, else resident, else torch."""
    workers: Annotated[int, Bounds(0, 1024)] | None = None
    """Threads (FFCV) or processes (torch) that load batches; None takes 1 or, for torch, all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(bool(self.data.strip()), "data", self.data, "the name of a data set")
        named = self.aux is None or self.aux.removeprefix(GENERATED_PREFIX) not in ("", self.aux)
        check(named, "aux", self.aux, f"{GENERATED_PREFIX}PATH, a file of generated images")


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Checked):
    """The network and where its first weights come from."""

    model: str = "resnet18"
    """Architecture; `cure-fast list` shows all. package.module:function calls that function of your
    own with num_classes=N, for a torch.nn.Module from images in [0, 1] to logits."""
    width: Annotated[int, Bounds(1, 4096)] | None = None
    """Channels of the first stage (widening factor for wide ResNets, length of a token for
    transformers); None takes the published."""
    stem: Literal["cifar", "imagenet"] = "cifar"
    """First layer: 3x3 stride 1 (cifar), or 7x7 stride 2 and max-pool (imagenet), which is what
    the public CURE code builds for ResNet-50 and -101."""
    normalize: Literal["none", "dataset"] = "none"
    """First layer of the model: none, or the data set's mean and deviation taken out."""
    init_from: str | None = None
    """File with the first weights (.safetensors, or a .pt of plain tensors); None trains them."""
    teacher: tuple[str, ...] = ()
    """Networks that the method learns from, NAME:RUN or NAME:FILE each, such as robust:runs/at, by
    the names that `cure-fast list methods` shows."""


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(Checked):
    """Natural training before the method starts (skipped with --init-from)."""

    pretrain_epochs: Annotated[int, Bounds(0, 100_000)] = 0
    """Epochs of natural pre-training, 0 or more; 0 skips the stage."""
    pretrain_lr: Annotated[float, Bounds(POSITIVE)] = 0.1
    """Peak learning rate of the stage, above 0."""
    pretrain_weight_decay: Share = 5e-4
    """Weight decay of the stage, 0 to 1."""
    pretrain_schedule: Literal["multistep", "onecycle", "cosine", "constant"] = "multistep"
    """Learning-rate schedule of the stage; multistep drops to a tenth at 1/2 and 3/4 of it."""


@dataclass(frozen=True, kw_only=True)
class AttackConfig(Checked):
    """The attack inside each training step."""

    eps: Radius = 8 / 255
    """Radius of the ball in pixel units, 0 to 1, with --norm l2 to 1000; a decimal or a fraction
    such as 8/255."""
    norm: Norm = "linf"
    """The ball: each pixel changes by at most --eps (linf), or the square root of the sum of all
    squared changes of an image is at most --eps (l2), which then has to be given."""
    step_size: Radius | None = None
    """Length of one attack step in pixel units, as --eps; None takes --step-share of --eps."""
    step_share: StepShare = 0.25
    """Length of one attack step as a share of --eps, 0 to 2, where --step-size gives none."""
    attack_steps: Annotated[int, Bounds(0, 1000)] = 10
    """Number of attack steps, 0 to 1000."""
    start: Literal["normal", "uniform", "zero"] = "normal"
    """First perturbation: 0.001 times a standard normal, uniform in the ball, or zero."""
    clamp_start: bool = True
    """Clamp the perturbed images to [0, 1] before the first step too. The public codes of TRADES
    and CURE take their first gradient where the noise leads, and clamp from the first step on."""
    attack_mode: Literal["eval", "train"] = "eval"
    """BatchNorm during the attack: running statistics (eval) or the batch's own (train)."""
    attack_ramp: Share = 0.0
    """Share of the run, 0 to 1, over which the attack grows from one step to attack_steps; 0 takes
    all steps from the start. Above 0 early training is faster, against a weaker attack."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.norm == "linf":
            for name in ("eps", "step_size"):
                if (value := getattr(self, name)) is not None:
                    Bounds(0, 1).check(name, value)

    @property
    def step_length(self) -> float:
        """Length of one attack step in pixel units: as given, else the share of the radius."""
        return self.eps * self.step_share if self.step_size is None else self.step_size


@dataclass(frozen=True, kw_only=True)
class OptimConfig(Checked):
    """Optimiser and schedule."""

    epochs: Annotated[int, Bounds(1, 100_000)] = 200
    """Passes over the training images, 1 or more."""
    batch_size: Annotated[int, Bounds(1, 1_000_000)] = 128
    """Images per step, 1 or more."""
    micro_batch_size: int | None = None
    """Images per pass, 2 or more, whose gradients add up to a step's; None takes --batch-size.
    It is halved where memory runs out. BatchNorm sees one pass at a time."""
    optimizer: Literal["sgd", "adam"] = "sgd"
    """Optimiser: SGD with momentum, or Adam (which the public CURE code takes for DeiT)."""
    lr: Annotated[float, Bounds(POSITIVE, 1000)] = 0.1
    """Peak learning rate, above 0."""
    momentum: Annotated[float, Bounds(0, 0.999999)] = 0.9
    """Momentum of SGD, in [0, 1); with --schedule onecycle-cosine any but 0 goes from 0.95 to 0.85
    at the peak of the rate, and back."""
    nesterov: bool = False
    """Nesterov's form of momentum."""
    weight_decay: Share = 5e-4
    """L2 penalty, 0 to 1, whose gradient is added: weight decay times weight."""
    schedule: Literal[
        "multistep",
        "linear",
        "onecycle",
        "onecycle-cosine",
        "cosine",
        "constant",
        "rice",
        "trades76",
        "mart",
        "seat",
        "piat",
    ] = "multistep"
    """Learning rate: multistep and linear follow --milestones; onecycle rises linearly for a
    quarter of the run, then falls linearly to zero; onecycle-cosine is torch's OneCycleLR, which
    takes the same quarter and moves the momentum too; cosine falls to zero. The others are those
    of their papers: rice, trades76 and mart drop, seat and piat fall in straight lines."""
    milestones: tuple[float, ...] = (0.5, 0.75)
    """Where the rate changes, as increasing fractions of the run, 0 to 1 (0.5,0.75: epochs 100 and
    150 of 200)."""
    lr_factors: tuple[float, ...] | None = None
    """Share of --lr, 0 to 1, for each milestone: from there on (multistep), or reached there in a
    straight line that begins with 1 (linear); None takes 0.1, 0.01 and so on."""
    clip_grad: Annotated[float, Bounds(POSITIVE)] | None = None
    """Largest norm of a step's whole gradient, above 0; longer ones are cut to it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.micro_batch_size is not None:
            most = max(2, self.batch_size)
            Bounds(2, most).check("micro_batch_size", self.micro_batch_size)
        marks, factors = self.milestones, self.lr_factors
        rising = list(marks) == sorted(set(marks)) and all(0 <= mark <= 1 for mark in marks)
        expected = "increasing fractions of the run, each between 0 and 1"
        check(rising, "milestones", marks, expected)
        if factors is not None:
            fit = len(factors) == len(marks) and all(0 <= factor <= 1 for factor in factors)
            expected = f"numbers from 0 to 1, one for each of the {len(marks)} --milestones"
            check(fit, "lr_factors", factors, expected)
        can_look_ahead = self.momentum > 0 and self.optimizer == "sgd"
        expected = "--optimizer sgd and a positive --momentum with it"
        check(can_look_ahead or not self.nesterov, "nesterov", True, expected)


@dataclass(frozen=True, kw_only=True)
class EvalConfig(Checked):
    """Validation after each epoch and the attacks on the finished model."""

    attacks: tuple[str, ...] = ("natural", "pgd20", "cw20")
    """Attacks on the test images: natural, fgsm, pgdK, cwK (K steps), pgdK-t (targeted), aa
    (AutoAttack standard)."""
    eval_eps: Radius | None = None
    """Radius of these attacks in pixel units, 0 to 1, in L2 to 1000; None takes --eps."""
    eval_norm: Norm | None = None
    """Ball of these attacks, linf or l2; None takes --norm. Another one needs --eval-eps."""
    eval_step_size: Radius | None = None
    """Step of pgdK and cwK in pixel units, as the radius; None takes --eval-step-share of it."""
    eval_step_share: StepShare = STEP_SHARE
    """Step of pgdK and cwK as a share of the radius, 0 to 2, where --eval-step-size gives none; for
    K below 20 it is at least 2.5/K, so that the steps cross the ball."""
    restarts: Count = 1
    """Random starts of pgdK, pgdK-t and cwK, 1 or more; an image is right that is so after all."""
    limit: Count | None = None
    """Test images to use, the first ones, 1 or more; None takes all."""
    aa_limit: Count | None = None
    """Test images for AutoAttack alone, the first ones; None takes --limit."""
    eval_batch_size: Annotated[int, Bounds(1, 1e6)] = 256
    """Images per batch of an attack, 1 or more; changes the time, not the result, but for aa, which
    draws its random starts per batch."""
    networks: tuple[str, ...] = ()
    """Further networks of the run to attack beside its result, such as raw or revision."""
    evaluate: tuple[Literal["best", "last"], ...] = ("best",)
    """Epochs of the result to attack: that of the best validation, the last, or both, for the
    difference that papers call robust overfitting."""
    val_every: Count = 1
    """Epochs between validations, 1 or more."""
    val_attack_steps: Annotated[int, Bounds(1, 1000)] = 10
    """PGD steps of the validation attack, 1 to 1000."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for attack in self.attacks:
            parse_attack(attack)
        check(bool(self.attacks), "attacks", self.attacks, "at least one attack")
        check(bool(self.evaluate), "evaluate", self.evaluate, "best, last, or both")


# Parts of the fast engine that can be left out; see cure_fast/engine/fast.py.
EngineFeature = Literal["graph", "stack", "copies", "fuse", "compile", "compile-loss"]


@dataclass(frozen=True, kw_only=True)
class RunConfig(Checked):
    """Where and how the run executes."""

    out: str | None = None
    """Run folder; None takes runs/<data>-<model>-<method>+<policies>-s<seed>."""
    device: str = "auto"
    """cpu, cuda, cuda:N, or auto: the GPU where there is one."""
    threads: Annotated[int, Bounds(1, 1024)] | Literal["auto"] = "auto"
    """CPU threads that torch computes with, 1 to 1024, or auto: OMP_NUM_THREADS where that is set,
    else what is quickest in a second's trial at the start; a resumed run keeps its number."""
    seed: Whole = 0
    """Seed of the weights, the batch order, the augmentation and the attacks, 0 or more."""
    amp: Literal["auto", "off", "bf16", "fp16"] = "auto"
    """Precision of training: auto is bf16 on GPUs that have it, fp16 with loss scaling on others,
    float32 on the CPU. Evaluation is always float32."""
    deterministic: bool = False
    """Use deterministic GPU algorithms (slower)."""
    sync_batchnorm: bool = False
    """Several processes (torchrun): let BatchNorm normalise by the images of all of them, as one
    process does; else each one normalises its own, and running statistics are their mean."""
    rank_timeout: Annotated[float, Bounds(1, 1e6)] = 1800.0
    """Several processes: seconds, 1 or more, that one waits for the others before it ends."""
    engine: Literal["auto", "eager", "fast"] = "auto"
    """How steps are computed: eager is PyTorch operation by operation, fast captures a whole step
    in a CUDA graph of fused kernels; auto is fast on a GPU and eager on the CPU."""
    engine_without: tuple[EngineFeature, ...] = ()
    """Parts of the fast engine to leave out, to find what each one gains."""
    log_every: Count = 20
    """Steps between rows of step metrics, 1 or more."""
    checkpoint_every: Count = 1
    """Epochs between checkpoints, 1 or more."""
    on_save_failure: Literal["continue", "stop"] = "continue"
    """When a checkpoint cannot be written (disk full): train on with the one before, or stop."""
    max_skipped: Annotated[int, Bounds(0, 1000)] = 10
    """Steps in a row that are left out because their loss or gradient is not finite, 0 to 1000; one
    more ends the run. The fast engine looks at it where a row is logged, and at an epoch's end."""
    tensorboard: bool = True
    """Write TensorBoard events beside metrics.jsonl."""
    wandb: str | None = None
    """Project of Weights & Biases that receives the same numbers (needs the package wandb)."""
    trackio: str | None = None
    """Project of trackio that receives the same numbers (needs the package trackio)."""
    cache: str = "~/.cache/cure-fast"
    """Folder for naturally pre-trained weights and FFCV files, shared between runs."""


@dataclass_transform(frozen_default=True, kw_only_default=True)
@dataclass(frozen=True, kw_only=True)
class MethodSettings(Checked):
    """Settings of a method or a policy; each has its own, whose fields are flags.

    Classes derived from it are frozen dataclasses without a decorator of their own.

    Attributes:
        main: fields that help shows with the method; the others it shows last. Empty for all.
    """

    main: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls) -> None:
        dataclass(frozen=True, kw_only=True)(cls)


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole run."""

    name: str = "custom"
    """Name of the recipe, recorded in the run folder."""
    method: str = "cure"
    """Training method or preset; `cure-fast list` shows all."""
    settings: MethodSettings = field(default_factory=MethodSettings)
    policies: Mapping[str, MethodSettings] = field(default_factory=dict, hash=False)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    attack: AttackConfig = field(default_factory=AttackConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        if self.evaluated_norm == "linf":
            for name in ("eval_eps", "eval_step_size"):
                if (value := getattr(self.eval, name)) is not None:
                    Bounds(0, 1).check(name, value)

    @property
    def evaluated_norm(self) -> Norm:
        """The ball of the attacks on the finished model."""
        return self.eval.eval_norm or self.attack.norm
