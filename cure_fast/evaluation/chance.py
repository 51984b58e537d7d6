"""Results that say a network has learnt nothing, or has lost by its training, and what to look at.

The attacks may be sound and such numbers right: nothing else speaks against them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from cure_fast.evaluation.attack_result import AttackResult
from cure_fast.evaluation.trust import ORDER_NOISE
from cure_fast.methods import find_method

# A network has learnt where it is right by so many standard deviations more often than by chance.
SURE = 3
# Of fewer images that cannot be told.
LEAST_IMAGES = 64


def beats_chance(right: int, count: int, share: float) -> bool:
    """Return whether more of ``count`` images are right than if each were so with chance ``share``.

    By three standard deviations of the binomial distribution.
    """
    return right > count * share + _margin(count, share)


def below_chance(right: int, count: int, share: float) -> bool:
    """Return whether fewer are right than by guessing, by as much as :func:`beats_chance` asks."""
    return right < count * share - _margin(count, share)


def _margin(count: int, share: float) -> float:
    return SURE * math.sqrt(count * share * (1 - share))


def chance_warnings(record: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return what the networks of a record have not learnt, one sentence each, by their keys.

    Args:
        record: as :func:`.results.new_record` makes it.
    """
    classes = record["classes"]
    results = {
        key: {name: AttackResult.from_dict(told) for name, told in entry["attacks"].items()}
        for key, entry in record["models"].items()
    }
    told = {key: _untaught(key, record, attacks, classes) for key, attacks in results.items()}
    # Of a run, whose method says what its result is to withstand.
    hardened = "network" in record and find_method(record["method"]).uses_attack
    for key in ("trained", "last") if hardened else ():
        if key in results and not told[key]:
            told[key] = _not_hardened(results[key], results.get("start", {}), len(classes))
    return told


def _untaught(
    key: str,
    record: Mapping[str, Any],
    attacks: Mapping[str, AttackResult],
    classes: list[str],
) -> list[str]:
    """Return whether natural images are told apart no better than by chance, in a sentence."""
    natural = attacks.get("natural")
    if natural is None or natural.count < LEAST_IMAGES:
        return []
    flags = "--lr, --epochs and --eps"
    if "network" not in record:
        flags = "--data, --model and --normalize, which have to be those it was trained with"
    elif key == "start":
        flags = "--pretrain-lr and --pretrain-epochs, or at --init-from"
    shares = {k: share for k, share in enumerate(natural.by_class) if share is not None}
    known = [k for k, share in shares.items() if share]
    if len(shares) > 1 and len(known) == 1 and shares[known[0]] == 100:
        name = classes[known[0]]
        return [
            f"natural: every image of class {name} is right and none of any other: that class is "
            f"answered whatever is shown; look at {flags}"
        ]
    if not beats_chance(natural.correct, natural.count, 1 / len(classes)):
        return [
            f"natural: {natural.correct} of {natural.count} images are right, and guessing gets "
            f"about {natural.count / len(classes):.0f}: no better than chance; look at {flags}"
        ]
    return []


def _not_hardened(
    trained: Mapping[str, AttackResult], start: Mapping[str, AttackResult], classes: int
) -> list[str]:
    """Return where adversarial training has left less than its start has, or than guessing."""
    found, flags = [], "look at --eps and --step-size, in pixel units of [0, 1], and at --lr"
    attacked = {name: result for name, result in trained.items() if name != "natural"}
    worse = [
        f"{name} {result.accuracy:.1f} % after {start[name].accuracy:.1f} %"
        for name, result in attacked.items()
        if name in start
        and start[name].count == result.count >= LEAST_IMAGES
        and start[name].accuracy - result.accuracy > ORDER_NOISE
    ]
    if worse:
        found.append(f"less robust than the start that it was trained from: {', '.join(worse)}; ")
    weakest = min(attacked.values(), key=lambda result: result.accuracy, default=None)
    if weakest and below_chance(weakest.correct, weakest.count, 1 / classes):
        found.append(
            f"{weakest.attack}: {weakest.accuracy:.1f} % are right, fewer than the "
            f"{100 / classes:.1f} % of guessing, which no attack lowers; "
        )
    return [text + flags for text in found]
