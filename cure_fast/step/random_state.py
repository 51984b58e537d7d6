"""The random numbers of the whole process: torch's, Python's and NumPy's, stored and restored.

What a run draws by itself comes from generators of its own (``Run.generators``). These are the
sources that other code draws from: a layer, a data set, a library.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

# NumPy's global generator takes no larger seed.
NUMPY_SEEDS = 2**32


def seed_all(seed: int) -> None:
    """Seed every source with ``seed``, 0 or more; NumPy's takes its last 32 bits."""
    random.seed(seed)
    np.random.seed(seed % NUMPY_SEEDS)
    torch.manual_seed(seed)


def random_state() -> dict[str, Any]:
    """Return the state of every source as tensors and plain values, fit for ``weights_only=True``.

    Returns:
        ``torch``: uint8 tensor; ``cuda``: one per GPU, none where CUDA is not in use; ``python``:
        what ``random.getstate`` gives; ``numpy``: the global generator's, its key as int64 [624].
    """
    numpy = np.random.get_state(legacy=False)
    # Asking for the state of a GPU that nothing uses would start CUDA.
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    key = torch.from_numpy(numpy["state"]["key"].astype(np.int64))
    return {
        "torch": torch.get_rng_state(),
        "cuda": cuda,
        "python": random.getstate(),
        "numpy": {**numpy, "state": {"key": key, "pos": numpy["state"]["pos"]}},
    }


def restore_random_state(state: dict[str, Any] | None) -> None:
    """Restore what :func:`random_state` returned; ``None`` changes nothing.

    GPUs that this machine lacks are left out.

    Raises:
        KeyError, TypeError, ValueError, RuntimeError: if it is something else.
    """
    if state is None:
        return
    key = np.asarray(state["numpy"]["state"]["key"], dtype=np.uint32)
    np.random.set_state({**state["numpy"], "state": {**state["numpy"]["state"], "key": key}})
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    torch.set_rng_state(state["torch"].cpu())
    if torch.cuda.is_available():
        for index, gpu in enumerate(state["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(gpu.cpu(), index)
