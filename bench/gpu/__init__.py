"""The GPU benchmark: what this machine can do, and what of it each training engine gets.

    python -m bench.gpu                        all parts, on the CUDA GPU
    python -m bench.gpu --part gate            the engines' tests, at most nine minutes
    python -m bench.gpu --part resnet18-128    one part, at most eight minutes
    python -m bench.gpu --tiny --device cpu    a rehearsal on tiny shapes

Each part is a process of its own and writes its figures as JSON and as Markdown; ``summary.md``
sets them beside the targets. No figure is taken before the engines' tests have passed; a part runs
them first, unless its folder says that they passed on the same sources and machine (gate.py).
"""

from __future__ import annotations
