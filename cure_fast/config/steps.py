"""How long the steps of an evaluation's attack are, and which lengths do not fit a ball."""

from __future__ import annotations

# Steps that add up to less than this share of eps cannot explore the ball.
SHORTEST_PATH = 0.9
# Length of a step as a share of eps, where no recipe says another.
STEP_SHARE = 0.1
# From so many steps on that share is taken, as the compared codes do: 20 steps of 0.003 at 8/255.
# Fewer would not cross the ball with it; theirs add up to this many eps.
SHARED_FROM, CROSSING = 20, 2.5
# A step longer than the ball's diameter, in eps, leads out of it from wherever it starts.
DIAMETER = 2.0


def evaluation_step(eps: float, steps: int, *, size: float | None, share: float) -> float:
    """Return the length of a step of pgdK, cwK and the like in pixel units, for K ``steps``.

    ``size`` is what was given. Without it a step is ``share * eps`` long, and for fewer than 20
    steps at least 2.5 eps / K, but never longer than the ball.
    """
    if size is not None:
        return size
    if steps >= SHARED_FROM:
        return eps * share
    return max(eps * share, min(CROSSING / steps, DIAMETER) * eps)


def step_warning(eps: float, steps: int, step_size: float) -> str | None:
    """Return in a sentence why steps of this length do not explore the ball; None where they do."""
    if eps == 0 or steps == 0:
        return None
    if step_size > DIAMETER * eps:
        return f"a step of {step_size:g} crosses the whole ball of eps {eps:g}"
    if steps * step_size < SHORTEST_PATH * eps:
        return f"{steps} steps of {step_size:g} do not reach eps {eps:g}"
    return None
