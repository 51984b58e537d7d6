"""What a run of the benchmark measures, and on which shapes."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

METHODS = ("cure", "trades", "pgd_at", "natural")
ENGINES = ("fast", "eager+compile", "eager+reduce-overhead", "authors", "eager")
MODELS = ("resnet18", "preactresnet18", "wrn34-10")
# In the order of their turn: what targets name comes first.
BATCHES = (128, 512, 256)
# Parts that measure steps: a model and a batch size each, as what is compared is measured in turns.
STEP_PARTS = {f"{model}-{batch}": (model, batch) for batch in BATCHES for model in MODELS}
# Methods and engines in the order of their importance, which is that of their turn.
ORDER = (
    ("cure", "fast"),
    ("trades", "fast"),
    ("cure", "authors"),
    ("cure", "eager+compile"),
    ("cure", "eager"),
    ("pgd_at", "fast"),
    ("natural", "fast"),
    ("trades", "authors"),
    ("trades", "eager"),
    ("pgd_at", "authors"),
    ("natural", "authors"),
    ("pgd_at", "eager"),
    ("natural", "eager"),
    ("trades", "eager+compile"),
    ("pgd_at", "eager+compile"),
    ("natural", "eager+compile"),
    ("cure", "eager+reduce-overhead"),
)
EPOCH_IMAGES = 50_000
LEARNING_RATE = 0.01


@dataclass(frozen=True)
class Sizes:
    """Shapes and counts of a run.

    Attributes:
        batch: images per step where one size is measured.
        batches: images per step that stand for one of :data:`BATCHES`; one that is not named stands
            for itself.
        image: height and width of an image.
        networks: what stands for a model; a model that is not named stands for itself.
        widths: by network; one that is not named has its published width.
        attack_steps: steps of PGD.
        images: in the data set that feeds the steps.
        warmups: steps before anything is timed; the first capture graphs and compile.
        rounds: least and most rounds.
        steps: least and most timed steps of a turn.
        settling: steps of a turn before the timed ones.
        fed_steps: timed steps of a turn that is fed by a loader, more than it has batches ready.
        fed_settling: steps before these.
        methods: by part; one that is not named has all.
        matrices: sides of the square matrices whose product is timed.
        convolution_batches: images per timed convolution.
    """

    batch: int = 128
    batches: dict[int, int] = field(default_factory=dict)
    image: int = 32
    networks: dict[str, str] = field(default_factory=dict)
    widths: dict[str, int] = field(default_factory=dict)
    attack_steps: int = 10
    images: int = EPOCH_IMAGES
    warmups: int = 8
    rounds: tuple[int, int] = (5, 30)
    steps: tuple[int, int] = (2, 10)
    settling: int = 1
    fed_steps: tuple[int, int] = (40, 40)
    fed_settling: int = 10
    methods: dict[str, tuple[str, ...]] = field(default_factory=dict)
    matrices: tuple[int, ...] = (4096, 8192, 16384)
    convolution_batches: tuple[int, ...] = (128, 512)

    def network(self, model: str) -> str:
        """Return the network that is built for a model, a key of ``cure_fast.models.MODELS``."""
        return self.networks.get(model, model)


PUBLISHED = Sizes()
TINY = Sizes(
    batch=4,
    batches={128: 4, 512: 6, 256: 5},
    image=8,
    networks={"resnet18": "resnet-small"},
    widths={"resnet-small": 4, "preactresnet18": 4, "wrn34-10": 1},
    attack_steps=1,
    images=120,
    warmups=2,
    rounds=(5, 5),
    steps=(1, 1),
    settling=0,
    fed_steps=(2, 2),
    fed_settling=0,
    methods={part: ("natural",) for part in STEP_PARTS if part != "resnet18-128"},
    matrices=(64,),
    convolution_batches=(4,),
)


@dataclass(frozen=True)
class Plan:
    """One invocation.

    Attributes:
        device: what is measured.
        tiny: whether shapes are tiny, so that figures say nothing about speed.
        seconds: that a part may take.
        out: folder of the results.
        command: as it was typed; for one of several parts, that part's, with paths as typed.
        started: reading of ``time.monotonic`` at the start.
    """

    device: torch.device
    tiny: bool
    seconds: float
    out: Path
    command: tuple[str, ...] = ()
    started: float = field(default_factory=time.monotonic)

    @property
    def sizes(self) -> Sizes:
        """Shapes and counts."""
        return TINY if self.tiny else PUBLISHED

    @property
    def on_gpu(self) -> bool:
        """Whether a GPU is measured."""
        return self.device.type == "cuda"

    @property
    def left(self) -> float:
        """Seconds that are left of :attr:`seconds`."""
        return self.started + self.seconds - time.monotonic()


def passes(method: str, attack_steps: int) -> int:
    """Return how many passes over an image a step of the method has to make at least.

    Each is one of: forward, backward to the inputs, backward to the weights. They cost the same.

    TRADES takes its natural logits once: 1 + 2 K for the attack, 2 forwards, 2 backwards of 2. CURE
    adds 2 forwards of the revision model and 2 backwards: three sets of gradients take 4 sweeps.
    """
    attack = 2 * attack_steps
    return {
        "natural": 3,
        "pgd_at": attack + 3,
        "trades": 1 + attack + 2 + 4,
        "cure": 1 + attack + 2 + 2 + 8,
    }[method]
