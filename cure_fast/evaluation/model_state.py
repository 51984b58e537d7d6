"""Whether a model is still as it was, and what it is made of."""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any

from torch import Tensor, nn, uint8

from cure_fast.errors import CureFastError

# Where Python prints an object by its place in memory, which is another in every process.
ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


class Watch:
    """Tells whether parameters and buffers of a model are as they were when this was made.

    Buffers are compared by their content: PyTorch does not count what BatchNorm writes to its
    statistics. Of parameters it counts every write in place, and that count and the address are
    compared, which costs nothing. A write through ``.data`` is seen only by ``thorough`` watches
    and looks, which read all of the parameters.

    Attributes:
        hashes: SHA-256 of each tensor by name; empty without ``thorough``.
    """

    def __init__(self, model: nn.Module, *, thorough: bool) -> None:
        self.model = model
        self.hashes = state_hashes(model) if thorough else {}
        self.marks = _marks(model)

    def check(self, *, thorough: bool = False) -> None:
        """Raise :class:`CureFastError` unless the model is unchanged, naming what is not."""
        looks: list[tuple[dict[str, Any], dict[str, Any]]] = [(self.marks, _marks(self.model))]
        if thorough and self.hashes:
            looks.append((self.hashes, state_hashes(self.model)))
        changed = sorted(
            {n for was, now in looks for n in {**was, **now} if was.get(n) != now.get(n)}
        )
        if changed:
            raise CureFastError(
                f"the evaluation changed {', '.join(changed[:5])} of the model, so it did not "
                "measure the model it was given. A forward pass in evaluation mode must not write "
                "to buffers."
            )


def _marks(model: nn.Module) -> dict[str, Any]:
    """Return what changes when a parameter or buffer is written to or replaced, by name."""
    return {name: tensor_hash(tensor) for name, tensor in model.named_buffers()} | {
        # Tensors made in inference mode are not counted.
        name: tensor_hash(p) if p.is_inference() else (id(p), p.data_ptr(), p._version)
        for name, p in model.named_parameters()
    }


def state_hashes(model: nn.Module) -> dict[str, str]:
    """Return the SHA-256 of every parameter and buffer by name, also where no state dict has it."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: tensor_hash(tensor) for name, tensor in sorted(tensors.items())}


def tensor_hash(tensor: Tensor) -> str:
    """Return the SHA-256 of a tensor's dtype, shape and values, whatever its device and layout."""
    values = tensor.detach().cpu().contiguous()
    found = hashlib.sha256(f"{values.dtype}{tuple(values.shape)}".encode())
    if values.numel():
        found.update(values.flatten().view(uint8).numpy().data)
    return found.hexdigest()


def layers_hash(model: nn.Module) -> str:
    """Return a SHA-256 of what the model is built of besides tensors.

    It covers each module's name, type and printed settings (``extra_repr``), such as strides,
    slopes and the eps of BatchNorm. What a module does not print (code of ``forward``, attributes
    of its own) is not in it: such a change needs another name or folder. Logits of fixed images
    would tell more, but differ in their last bits between batch sizes and numbers of threads.
    """
    layers = [
        (name, type(module).__qualname__, ADDRESS.sub("", module.extra_repr()))
        for name, module in model.named_modules()
    ]
    return hashlib.sha256(json.dumps(layers).encode()).hexdigest()
