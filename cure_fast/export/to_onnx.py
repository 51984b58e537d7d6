"""The model as an ONNX file: ``images`` in, ``logits`` out, normalisation inside."""

from __future__ import annotations

import copy
import importlib.util
import os
import warnings
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from cure_fast.errors import InputError
from cure_fast.export.source import Source, describe
from cure_fast.export.verify import check_equal
from cure_fast.files import replacing
from cure_fast.models.pointwise import restore_pointwise

PACKAGES = ("onnx", "onnxruntime", "onnxscript")


def check_packages() -> None:
    """Raise :class:`InputError` with the command to run, unless what ONNX needs is installed."""
    missing = [name for name in PACKAGES if not importlib.util.find_spec(name)]
    if missing:
        raise InputError(
            f"--format onnx: needs {', '.join(PACKAGES)}; not installed: {', '.join(missing)}. "
            f"Run: python -m pip install {' '.join(PACKAGES)}"
        )


def export_onnx(source: Source, images: Tensor, out: Path) -> float:
    """Write ``out``, whole and verified under ONNX Runtime on the CPU, or not at all.

    The file takes images of the height and width of ``images``, any number at a time; see
    :func:`check_equal` for what is compared and returned.
    """
    # ONNX Runtime reads it at its import, and otherwise keeps an identifier of the machine and
    # a log of its use in the home folder.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    import onnx
    import onnxruntime

    model = copy.deepcopy(source.model)
    restore_pointwise(model)
    with warnings.catch_warnings():
        # Of torch's exporter to itself; users can do nothing about them.
        warnings.simplefilter("ignore", FutureWarning)
        program = torch.onnx.export(
            model,
            (images[:2],),
            dynamo=True,
            verbose=False,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
        )
    assert program is not None
    described = program.model_proto
    graph = described.graph
    parts = (graph.node, graph.input, graph.output, graph.value_info, graph.initializer, [graph])
    for part in chain(*parts):
        # The exporter's notes, which hold the paths of this machine's sources.
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
    onnx.helper.set_model_props(described, describe(source))
    with replacing(out) as temporary:
        onnx.save(described, str(temporary))
        onnx.checker.check_model(str(temporary))
        providers = ["CPUExecutionProvider"]
        session = onnxruntime.InferenceSession(str(temporary), providers=providers)

        def run(images: Tensor) -> Tensor:
            return torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])

        return check_equal(source.model, run, images)
