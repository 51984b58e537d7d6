"""The highest accuracies under AutoAttack that are published, which a new figure is held against.

They are those of RobustBench (Croce et al., NeurIPS Datasets and Benchmarks 2021), as its files
``model_info`` have them on 31 March 2025 (commit 78fcc9e), with the lower of AutoAttack's and any
external attack's figure; of networks without further images also what papers say of themselves.
"""

from __future__ import annotations

from dataclasses import dataclass

from cure_fast.config import Norm


@dataclass(frozen=True)
class Highest:
    """What is highest of a data set within a ball: percent under AutoAttack, and whose.

    Attributes:
        eps: radius in pixel units; within a larger one less is right.
        any: with any further images, synthetic ones too.
        alone: with the data set's own training images alone.
    """

    data: str
    norm: Norm
    eps: float
    any: float
    any_of: str
    alone: float
    alone_of: str


HIGHEST = (
    Highest(
        "cifar10",
        "linf",
        8 / 255,
        73.71,
        "Bartoldson et al., ICML 2024, WRN-94-16",
        60.07,
        "Rebuffi et al., NeurIPS 2021, WRN-70-16",
    ),
    Highest(
        "cifar10",
        "l2",
        0.5,
        84.97,
        "Wang et al., ICML 2023, WRN-70-16",
        # Gowal et al., 2020, have 74.50, and these by their abstract 2.16 more.
        76.66,
        "Rebuffi et al., NeurIPS 2021, WRN-70-16",
    ),
    Highest(
        "cifar100",
        "linf",
        8 / 255,
        42.66,
        "Wang et al., ICML 2023, WRN-70-16",
        32.52,
        "Cui et al., NeurIPS 2024, WRN-34-10",
    ),
)


def highest_for(data: str, norm: str, eps: float) -> Highest | None:
    """Return what is published of the data set in this ball or a smaller one, or None."""
    for row in HIGHEST:
        # TRADES and others write 0.031 for 8/255.
        if (row.data, row.norm) == (data, norm) and eps >= row.eps - 5e-4:
            return row
    return None
