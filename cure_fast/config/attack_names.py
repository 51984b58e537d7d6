"""Attacks on a finished model by name, as ``--attacks`` takes them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from cure_fast.config.checks import nearest, shown
from cure_fast.errors import InputError

# What `attacks` takes, for listings.
ATTACKS = {
    "natural": "no attack",
    "fgsm": "one step of length eps along the sign of the gradient of the cross-entropy",
    "pgdK": "K steps (1 to 1000) on the cross-entropy, uniform start, last iterate",
    "pgdK-t": "K steps on the logit of each of the up to 9 likeliest other classes less the true's",
    "cwK": "K steps (1 to 1000) on the margin loss (Carlini, Wagner), uniform start, last iterate",
    "aa": "AutoAttack, version standard: APGD-CE, targeted APGD-DLR, targeted FAB, Square",
}


NAMES = {
    "natural": "Natural",
    "fgsm": "FGSM",
    "aa": "AutoAttack",
    # The attacks that AutoAttack is made of.
    "apgd-ce": "APGD-CE",
    "apgd-t": "APGD-T",
    "fab-t": "FAB-T",
    "square": "Square",
}


def attack_name(attack: str) -> str:
    """Return what people read instead of an attack's word: ``PGD-20`` for ``pgd20``."""
    if steps := re.fullmatch(r"(pgd|cw)(\d+)(-t)?", attack):
        targeted = ", targeted" if steps[3] else ""
        return f"{'PGD' if steps[1] == 'pgd' else 'C&W'}-{steps[2]}{targeted}"
    return NAMES.get(attack, attack)


@dataclass(frozen=True)
class AttackSpec:
    """An attack by name, as the user writes it, with its number of gradient steps if it has one."""

    name: str
    family: Literal["natural", "fgsm", "pgd", "pgd-t", "cw", "aa"]
    steps: int = 0

    @property
    def iterated(self) -> bool:
        """Whether it has a random start, and steps of a length that can be chosen."""
        return self.family in ("pgd", "pgd-t", "cw")


def parse_attack(text: str) -> AttackSpec:
    """Return the attack that ``text`` names; raise ``InputError`` with the valid forms if none."""
    spec = known_attack(text)
    if spec is None:
        examples = ("natural", "fgsm", "pgd20", "cw20", "aa")
        raise InputError(
            f"--attacks: expected {', '.join(ATTACKS)} with K from 1 to 1000 (such as pgd20), "
            f"with commas between, got {shown(text)}.{nearest(text, examples)}"
        )
    return spec


def parse_single(text: str) -> AttackSpec:
    """Return the attack that ``text`` names if it is one with one image as its result.

    That is ``fgsm``, ``pgdK`` or ``cwK``; another raises ``InputError``.
    """
    spec = known_attack(text)
    if spec is None or spec.family not in ("fgsm", "pgd", "cw"):
        near = nearest(text, ("fgsm", "pgd20", "cw20"))
        raise InputError(f"--attack: expected fgsm, pgdK or cwK, got {shown(text)}.{near}")
    return spec


def known_attack(text: str) -> AttackSpec | None:
    """Return the attack that ``text`` names, or None."""
    if text in ("natural", "fgsm", "aa"):
        return AttackSpec(text, text, 1 if text == "fgsm" else 0)
    found = re.fullmatch(r"(pgd|cw)([1-9][0-9]{0,2}|1000)(-t)?", text)
    if found is None or (found[1] == "cw" and found[3]):
        return None
    family = "cw" if found[1] == "cw" else "pgd-t" if found[3] else "pgd"
    return AttackSpec(text, family, int(found[2]))
