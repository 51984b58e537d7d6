"""How long a part's steps take by estimate, so that what fits into its time is known before.

The rates are guesses for an H200, on the slow side; what is measured replaces them as it comes in.
"""

from __future__ import annotations

from bench.gpu.plan import ORDER, STEP_PARTS, Plan, passes
from bench.gpu.robin import COUNTING, turn_steps

# Operations per second of an engine's passes over a network of 64 to 512 channels. The authors' are
# in TF32.
RATES = {
    "fast": 250e12,
    "eager+compile": 200e12,
    "eager+reduce-overhead": 200e12,
    "eager": 120e12,
    "authors": 100e12,
}
# A wider network fills the device better.
FASTER = {"wrn34-10": 1.6}
# Seconds that the host takes to launch one layer's kernels of one pass.
LAUNCH = 30e-6
LAUNCHED_ONE_BY_ONE = ("eager", "eager+compile", "authors")
# Seconds of NumPy's percentile per parameter of the network, on one core.
PERCENTILE = 5e-9
PARAMETERS = {"resnet18": 11.2e6, "preactresnet18": 11.2e6, "wrn34-10": 46.2e6}
CONVOLUTIONS = {"resnet18": 20, "preactresnet18": 20, "wrn34-10": 34}
# Seconds of a network with 20 convolutions: the first contender of an engine, and one after it,
# which finds some of what it needs compiled.
BUILDS = {
    "fast": (60.0, 25.0),
    "eager+compile": (75.0, 35.0),
    "eager+reduce-overhead": (60.0, 60.0),
    "eager": (4.0, 2.0),
    "authors": (4.0, 2.0),
}
# Seconds before the first contender: images, the ceiling, libraries.
START = 25.0


def step_seconds(model: str, method: str, engine: str, batch: int, flops: float) -> float:
    """Return the seconds of a step, where ``flops`` are those of an image's forward pass."""
    count = passes(method, 10)
    if engine == "authors":
        # TRADES' natural logits come anew in each attack step, CURE has a sweep more than it needs.
        count += {"trades": 12, "cure": 6}.get(method, 0)
    seconds = count * batch * flops / (RATES[engine] * FASTER.get(model, 1.0))
    if engine in LAUNCHED_ONE_BY_ONE:
        seconds = max(seconds, count * CONVOLUTIONS[model] * LAUNCH)
    if (method, engine) == ("cure", "authors"):
        seconds += PERCENTILE * PARAMETERS[model]
    return seconds


def build_seconds(model: str, engine: str, *, first: bool) -> float:
    """Return the seconds of setting a contender up, its first steps and what they compile."""
    return BUILDS[engine][0 if first else 1] * CONVOLUTIONS[model] / 20


def fitting(part: str, plan: Plan, flops: float) -> tuple[list[tuple[str, str]], float]:
    """Return the methods and engines of a part that fit into its time, and their seconds.

    They are taken in their order; what does not fit is passed over.
    """
    model, batch = STEP_PARTS[part]
    chosen, engines, needed = [], set(), START
    for method, engine in ORDER:
        one = step_seconds(model, method, engine, batch, flops)
        count, settling = turn_steps(one, plan)
        seconds = build_seconds(model, engine, first=engine not in engines) + COUNTING
        seconds += one * (plan.sizes.warmups + plan.sizes.rounds[0] * (count + settling))
        if needed + seconds <= plan.seconds:
            chosen.append((method, engine))
            engines.add(engine)
            needed += seconds
    return chosen, needed
