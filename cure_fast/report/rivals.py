"""What others reach without extra data: the results that CURE and PIAT are held against."""

from __future__ import annotations

from dataclasses import dataclass

from cure_fast.config import Config
from cure_fast.evaluation.record import main_settings

DAJAT = "Addepalli et al., NeurIPS 2022"
AR_AT = "Waseda et al., ICLR 2025"


@dataclass(frozen=True)
class Rival:
    """Published accuracies in percent: CIFAR-10, 10,000 test images, L-inf 8/255, AutoAttack."""

    name: str
    model: str
    natural: float
    aa: float
    source: str


RIVALS = (
    Rival("DAJAT", "resnet18", 85.71, 52.48, DAJAT),
    Rival("DAJAT", "resnet18", 86.67, 51.56, f"{DAJAT}, 110 epochs"),
    Rival("AR-AT", "resnet18", 87.82, 49.02, AR_AT),
    Rival("AR-AT + SWA", "resnet18", 86.44, 50.28, AR_AT),
    Rival("PGD-AT + WA", "resnet18", 82.36, 50.49, "FastAT Benchmark, arXiv 2604.22853"),
    Rival("DAJAT", "wrn34-10", 88.71, 57.81, DAJAT),
    Rival("AR-AT + SWA", "wrn34-10", 90.06, 54.03, AR_AT),
    Rival("OA-AT", "wrn34-10", 85.32, 58.04, "Addepalli et al., ECCV 2022"),
)


def rivals_of(config: Config) -> list[Rival]:
    """Return the rivals on the data and within the ball of a run, for its architecture."""
    main = main_settings(config)
    if (config.data.data, main["norm"], main["eps"]) != ("cifar10", "linf", 8 / 255):
        return []
    return [rival for rival in RIVALS if rival.model == config.model.model]
