"""Weights and a description of the model as safetensors."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from cure_fast.evaluation.results import load_model
from cure_fast.export.source import Source, describe
from cure_fast.export.verify import check_equal
from cure_fast.files import replacing
from cure_fast.models.weights import read_metadata, save_weights


def export_safetensors(source: Source, images: Tensor, out: Path) -> float:
    """Write the file and return the largest difference of logits of the model read back from it.

    Args:
        source: what is exported.
        images: to compare on, [N, 3, H, W], float32 in [0, 1].
        out: file to write; it is whole and verified, or not there.
    """
    with replacing(out) as temporary:
        save_weights(source.model, temporary, describe(source))
        written = load_model(temporary, read_metadata(temporary)).eval()
        return check_equal(source.model, written, images)
